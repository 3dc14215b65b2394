"""Does fusion sampling move the frontier between likeness and prompt, for PromptNet's words and for other subjects?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import comfy.sample
import comfy.samplers
import comfy.sd
import torch
from PIL import Image, ImageDraw, ImageFont

from ...encoders.concepts import Concept
from ...encoders.reference import NOISE
from ...host.fastcomposer import conditioning as fastcomposer
from ...host.fastcomposer.files import Parts
from ...host.model.window import Window
from ...host.profusion import finetuning
from ...host.profusion import promptnet as words
from ...host.profusion.guider import FusionGuider, Guidance
from ...host.profusion.sampler import fusion_sampler
from ...host.shapeland import load_clip_vision
from ...host.weaver import fusion
from ...host.weaver.prompts import encode_prompts
from ...shapeland.models import WEIGHTS
from ...shapeland.world import SIZE
from ...subjects.partition import Partition, assemble
from ...subjects.subject import Subject
from ...subjects.variants import Motion, make_variants
from ...training.concepts.pictures import Pictures
from ..comparison import compare, explain
from ..metrics import Row
from ..scenes import Case, Reference
from ..sheet import contact_sheet
from ..studio import NEGATIVE_PROMPT, Studio
from ..templates import TemplateCase, load_bank, template_case
from . import Report
from .fastcomposer import FILE, load_parts
from .freecustom import patched

SYSTEM = "profusion"
OF_A_CONCEPT = "profusion_concept"
"""Name of the kept pictures of a concept."""
SUBJECTS = (1, 2)
STEPS, SCHEDULER = 25, "ddim_uniform"
CFG = 4.0
SCALES = {"subject_scale": 4.0, "text_scale": 3.0, "fusion_scale": 4.0, "gamma": 0.6}
PROMPTNET = WEIGHTS / "promptnet" / "shapeland.safetensors"
VARIANTS_OF_A_PICTURE = 16
"""On which PromptNet is fine-tuned, with the picture itself."""
NO_REFINEMENT = {"text_scale": 0.0}

GUIDED = {"cfg_2": 2.0, "cfg": CFG, "cfg_7": 7.0}
FUSED = {
    "weak": {"subject_scale": 2.0, "text_scale": 2.0, "fusion_scale": 3.0},
    "fusion": {},
    "strong": {"subject_scale": 7.0, "text_scale": 5.0, "fusion_scale": 7.0},
}
"""The points of a frontier, from weak to strong: scales of plain guidance, and changes of the scales of fusion."""
COMPOSABLE = "composable"
KINDS = {
    "PromptNet": "",
    "fine-tuned": "tuned",
    "FastComposer": "fastcomposer",
    "FreeCustom": "mrsa",
    "trained concept": "concept",
}
"""Kinds of subjects, and what the names of their variants begin with."""

# Per variant of PromptNet's subjects: fusion steps, window, and what is changed of the scales.
CHANGED: dict[str, tuple[int, Window, dict]] = {
    "fusion_m2": (2, Window(), {}),
    "no_refinement": (1, Window(), NO_REFINEMENT),
    "gamma_1": (1, Window(), {"gamma": 1.0}),
    "late": (1, Window(0.4, 1.0), {}),
    "last_fifth": (1, Window(0.8, 1.0), {}),
    "reuse": (1, Window(), {"reuse": True}),
}
SHOWN = ("default", "plain", "cfg", "composable", "tuned_cfg", "tuned_fusion", "mrsa_cfg", "mrsa_fusion")

ABOUT = f"""

Subjects are words that PromptNet makes of one picture, but where a name says another. *plain* and *cfg* are plain
guidance at {CFG:g} by the text and with the words. *default* is fusion sampling with the scales 4 for subjects, 3 for
text, 4 in the fusion stage, and gamma 0.6. *cfg_2* and *cfg_7* are plain guidance at 2 and 7; *weak* is fusion
sampling with the scales 2, 2 and 3, and *strong* with 7, 5 and 7. *composable* is *default* without the fusion stage.
The others change one thing of it: *fusion_m2* has two fusion stages, *no_refinement* is refined towards the subjects
alone, *gamma_1* leaves the subjects' words as they are in the fusion stage, *late* has that stage in the last 60
percent of the schedule and *last_fifth* in the last 20, *reuse* evaluates the negative prompt once per step, *once*
makes the words once per sampling, and *separate* has a conditioning of its own for each subject, in the whole
picture.

Other kinds of subjects have *cfg_2*, *cfg*, *cfg_7*, *weak*, *fusion*, *strong* and *composable*, with the same
scales. *tuned_* is PromptNet and the model's attention fine-tuned, as the node does it by default, on the picture and
{VARIANTS_OF_A_PICTURE} variants of it, and *tuned_alone* is *tuned_fusion* trained on the picture alone;
*fastcomposer_* are FastComposer's subjects, *mrsa_* FreeCustom's. *concept_* have cases of their own, with one of the
trained concepts in the whole picture, and *concept_fusion* for what their stars compare with."""


def report(studio: Studio, pictures: int, chance: float, tell: Callable[[str], None]) -> Report:
    """Measures every variant; arguments as for `compare`.

    Raises:
        FileNotFoundError: weights are missing; the message says which.
    """
    vision, bank = load_clip_vision(), load_bank()
    parts = load_parts(FILE, studio, vision)
    if not PROMPTNET.exists():
        raise FileNotFoundError(f"PromptNet's weights for Shapeland are not at {PROMPTNET}: see shapeland/README.md.")
    draw = partial(draw_variants, studio, parts, words.load(str(PROMPTNET)), vision)
    rows, shown = compare(SYSTEM, studio, SUBJECTS, pictures, chance, tell, draw, SHOWN)
    of_a_concept = partial(draw_concept, studio, bank)
    found, _ = compare(OF_A_CONCEPT, studio, (1,), pictures, chance, tell, of_a_concept, case_of=template_case)
    for row in found:
        name = "fusion" if row.variant == "default" else row.variant
        rows.append(replace(row, system=SYSTEM, variant=_variant("concept", name)))
    sampling = f"euler, {SCHEDULER}, {STEPS} steps"
    return Report(rows, explain(chance) + ABOUT, contact_sheet(shown), {"frontier": frontier(rows)}, sampling)


def draw_variants(
    studio: Studio, parts: Parts, net: words.LoadedPromptNet, vision, case: Case, count: int
) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of every variant with the same noise; fine-tuned ones for one subject alone."""
    subjects = [Subject(r.image, r.noun, r.mask) for r in case.references]
    draw = partial(_draw, studio, case, count)

    def encode(found: words.LoadedPromptNet, subjects: list[Subject], **options) -> tuple[list, list]:
        return words.encode(found, studio.clip, vision, studio.vae, case.prompt, subjects, **options)

    model, tune = words.prepared(studio.model), partial(_tuned, studio, net, vision, case.references[0])
    text, subject = encode(net, subjects)
    drawn = {"plain": draw(_plain(studio, model, text)), **_frontier(studio, draw, "", model, text, subject)}
    for name, (steps, window, changes) in CHANGED.items():
        drawn[name] = draw(_fusing(studio, model, text, [subject], changes), steps, window)
    _, unchanging = encode(net, subjects, update=words.ONCE)
    drawn["once"] = draw(_fusing(studio, model, text, [unchanging], {}), 1)
    if len(subjects) == 1:
        tuned, own = tune(model, VARIANTS_OF_A_PICTURE)
        drawn |= _frontier(studio, draw, "tuned", tuned, *encode(own, subjects))
        tuned, own = tune(model, 0)
        own_text, own_subject = encode(own, subjects)
        drawn["tuned_alone"] = draw(_fusing(studio, tuned, own_text, [own_subject], {}), 1)
    else:
        apart = [encode(net, [one])[1] for one in subjects]
        drawn["separate"] = draw(_fusing(studio, model, text, apart, {}), 1)
    encoded = fastcomposer.encode_subjects(parts.clip_vision, subjects, background=NOISE, crop=True)
    text, subject, _ = fastcomposer.fuse(parts.clip, parts.fuser, case.prompt, encoded)
    drawn |= _frontier(studio, draw, "fastcomposer", parts.model, text, subject)
    prompt = studio.encode(case.prompt)
    drawn |= _frontier(studio, draw, "mrsa", patched(studio, case, {}, {}), prompt, prompt)
    return drawn


def draw_concept(studio: Studio, bank: dict[str, Concept], case: TemplateCase, count: int) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of a case of one concept, which acts in the whole picture."""
    prompts = encode_prompts(studio.clip, case.prompt, NEGATIVE_PROMPT, [bank[name] for name in case.names])
    everywhere = Partition(assemble([torch.ones(SIZE, SIZE)], 0.0))
    settings = fusion.FusionSettings(suppression=0.0)
    model, subject = fusion.apply(studio.model, prompts.positive, prompts.concepts, everywhere, settings)
    draw = partial(_draw, studio, case, count)
    text = studio.encode(case.prompt)
    return {"plain": draw(_plain(studio, studio.model, text)), **_frontier(studio, draw, "", model, text, subject)}


def _frontier(studio: Studio, draw: Callable, kind: str, model, text: list, subject: list) -> dict[str, torch.Tensor]:
    """The pictures of both frontiers of a kind of subjects, and without the fusion stage, by the names of variants."""
    drawn = {name: draw(_plain(studio, model, subject, scale)) for name, scale in GUIDED.items()}
    drawn |= {name: draw(_fusing(studio, model, text, [subject], changes), 1) for name, changes in FUSED.items()}
    drawn[COMPOSABLE] = draw(_fusing(studio, model, text, [subject], {}))
    return {_variant(kind, name): pictures for name, pictures in drawn.items()}


def _variant(kind: str, name: str) -> str:
    if kind:
        return f"{kind}_{name}"
    return "default" if name == "fusion" else name


def _tuned(studio: Studio, net: words.LoadedPromptNet, vision, reference: Reference, model, variants: int):
    """The model and the PromptNet, fine-tuned on a picture and variants of it, as the nodes do it."""
    made = make_variants(reference.image, reference.mask, max(1, variants), SIZE, 0, Motion())
    pictures = Pictures(list(made.images[: 1 + variants]), list(made.masks[: 1 + variants]), ["a {}"])
    found = finetuning.fine_tune(model, net, studio.clip, vision, studio.vae, pictures, finetuning.FineTuning(), SIZE)
    tuned, _ = comfy.sd.load_lora_for_models(model, None, found.lora, 1.0, 0.0)
    return tuned, found.promptnet


def _plain(studio: Studio, model, positive: list, cfg: float = CFG):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, studio.encode(NEGATIVE_PROMPT))
    guider.set_cfg(cfg)
    return guider


def _fusing(studio: Studio, model, text: list, subjects: list[list], changes: dict) -> FusionGuider:
    return FusionGuider(model, text, studio.encode(NEGATIVE_PROMPT), subjects, Guidance(**{**SCALES, **changes}))


def _draw(studio: Studio, case: Case, count: int, guider, fusion_steps: int = 0, window: Window | None = None):
    """Pictures of a guider with the case's noise."""
    side = SIZE // studio.vae.spacial_compression_decode()
    empty = torch.zeros(count, studio.vae.latent_channels, side, side)
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULER, STEPS)
    sampler = fusion_sampler(comfy.samplers.sampler_object("euler"), fusion_steps, 1.0, window or Window())
    noise = comfy.sample.prepare_noise(empty, case.seed)
    latents = guider.sample(noise, empty, sampler, sigmas, disable_pbar=True, seed=case.seed)
    return studio.vae.decode(latents).float().cpu()


def frontier(rows: list[Row], side: int = 240) -> Image.Image:
    """Likeness over prompt consistency, a panel per kind and number of subjects: further up and to the right is
    better."""
    curves = {
        "plain guidance": (GUIDED, "#1f77b4"),
        "fusion sampling": (FUSED, "#d62728"),
        "without the fusion stage": ((COMPOSABLE,), "#2ca02c"),
    }
    margin, foot = 36, 28
    picture = Image.new("RGB", (len(KINDS) * side, len(SUBJECTS) * side + foot), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    means = {(row.subjects, row.variant, row.metric): row.mean for row in rows if row.system == SYSTEM}
    for line, subjects in enumerate(SUBJECTS):
        for column, (title, kind) in enumerate(KINDS.items()):
            found = {
                label: [
                    tuple(means[subjects, variant, metric] for metric in ("prompt", "identity"))
                    for variant in (_variant(kind, name) for name in names)
                    if (subjects, variant, "identity") in means
                ]
                for label, (names, _) in curves.items()
            }
            if not any(found.values()):
                continue
            left, bottom, span = column * side + margin, (line + 1) * side - margin, side - 2 * margin
            pen.rectangle((left, bottom - span, left + span, bottom), outline="gray")
            pen.text((left, bottom - span - 20), f"{title}, {subjects} subject{'s' * (subjects > 1)}", "black", font)
            for value in (0.0, 0.5, 1.0):
                pen.text((left + value * span - 8, bottom + 3), f"{value:g}", "black", font)
                pen.text((left - 26, bottom - value * span - 8), f"{value:g}", "black", font)
            for label, (_, color) in curves.items():
                places = [(left + x * span, bottom - max(0.0, y) * span) for x, y in found[label]]
                pen.line(places, color, 2)
                for x, y in places:
                    pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
    for place, (label, (_, color)) in enumerate(curves.items()):
        x, y = margin + place * side, len(SUBJECTS) * side + 12
        pen.line((x, y, x + 24, y), color, 3)
        pen.text((x + 32, y - 8), label, "black", font)
    pen.text((margin + 3 * side, len(SUBJECTS) * side + 4), "identity over prompt", "black", font)
    return picture
