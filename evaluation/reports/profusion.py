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
CONCEPT = "profusion_concept"
SUBJECTS = (1, 2)
STEPS, SCHEDULER = 25, "ddim_uniform"
CFG, CFGS = 4.0, (2.0, 7.0)
SCALES = {"subject_scale": 4.0, "text_scale": 3.0, "fusion_scale": 4.0, "gamma": 0.6}
CONCEPT_NAMES = {"default": "fusion"}
PROMPTNET = WEIGHTS / "promptnet" / "shapeland.safetensors"
VARIANTS_OF_A_PICTURE = 16
"""On which PromptNet is fine-tuned."""
NO_REFINEMENT = {"text_scale": 0.0}

# Per variant: fusion steps, window, and what is changed of the scales.
FUSED: dict[str, tuple[int, Window, dict]] = {
    "default": (1, Window(), {}),
    "composable": (0, Window(), {}),
    "fusion_m2": (2, Window(), {}),
    "no_refinement": (1, Window(), NO_REFINEMENT),
    "weak": (1, Window(), {"subject_scale": 2.0, "text_scale": 2.0, "fusion_scale": 3.0}),
    "strong": (1, Window(), {"subject_scale": 7.0, "text_scale": 5.0, "fusion_scale": 7.0}),
    "gamma_1": (1, Window(), {"gamma": 1.0}),
    "late": (1, Window(0.4, 1.0), {}),
    "reuse": (1, Window(), {"reuse": True}),
}
SHOWN = ("default", "plain", "cfg", "composable", "tuned_cfg", "tuned", "mrsa_cfg", "mrsa_fusion")
FRONTIERS = {
    "plain guidance": ("cfg_2", "cfg", "cfg_7"),
    "fusion sampling": ("weak", "default", "strong"),
    "fine-tuned, plain guidance": ("tuned_cfg",),
    "fine-tuned, fusion sampling": ("tuned",),
}
"""Curves of the plot, from weak to strong scales."""

ABOUT = f"""

Subjects are words that PromptNet makes of one picture, but where a name says another. *plain* and *cfg* are plain
guidance at {CFG:g} by the text and with the words, *cfg_X* at another scale. *default* is fusion sampling with the
scales 4 for subjects, 3 for text, 4 in the fusion stage, and gamma 0.6. The others change one thing: *composable* has
no fusion stage, *fusion_m2* two, *no_refinement* is refined towards the subjects alone, *weak* has the scales 2, 2 and
3 and *strong* 7, 5 and 7, *gamma_1* leaves the subjects' words as they are in the fusion stage, *late* has that stage
in the last 60 percent of the schedule, and *reuse* evaluates the negative prompt once per step. *tuned_cfg* and
*tuned* are *cfg* and *default* with PromptNet and the model's attention fine-tuned, as the node does it by default, on
{VARIANTS_OF_A_PICTURE} variants of the picture, and *tuned_alone* is *tuned* trained on the picture alone.

*fastcomposer_cfg* and *fastcomposer_fusion* have FastComposer's subjects, *mrsa_cfg* and *mrsa_fusion* FreeCustom's.
*concept_X* have cases of their own, with one of the trained concepts in the whole picture: by plain text, with the
concept by plain guidance, and by fusion sampling, which their stars compare with."""


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
    found, _ = compare(CONCEPT, studio, (1,), pictures, chance, tell, of_a_concept, case_of=template_case)
    rows += [replace(row, variant=f"concept_{CONCEPT_NAMES.get(row.variant, row.variant)}") for row in found]
    sampling = f"euler, {SCHEDULER}, {STEPS} steps"
    return Report(rows, explain(chance) + ABOUT, contact_sheet(shown), {"frontier": frontier(rows)}, sampling)


def draw_variants(
    studio: Studio, parts: Parts, net: words.LoadedPromptNet, vision, case: Case, count: int
) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of every variant with the same noise; fine-tuned ones for one subject alone."""
    subjects = [Subject(r.image, r.noun, r.mask) for r in case.references]
    draw = partial(_draw, studio, case, count)

    def encode(found: words.LoadedPromptNet) -> tuple[list, list]:
        return words.encode(found, studio.clip, vision, studio.vae, case.prompt, subjects)

    model = words.prepared(studio.model)
    text, subject = encode(net)
    drawn = {"plain": draw(_plain(studio, model, text))}
    drawn |= {f"cfg_{scale:g}": draw(_plain(studio, model, subject, scale)) for scale in CFGS}
    drawn["cfg"] = draw(_plain(studio, model, subject))
    for name, (steps, window, changes) in FUSED.items():
        drawn[name] = draw(_fusing(studio, model, text, subject, changes), steps, window)
    if len(subjects) == 1:
        tune = partial(_tuned, studio, model, net, vision, case.references[0])
        tuned, own = tune(VARIANTS_OF_A_PICTURE)
        text, subject = encode(own)
        drawn["tuned_cfg"] = draw(_plain(studio, tuned, subject))
        drawn["tuned"] = draw(_fusing(studio, tuned, text, subject, {}), 1)
        tuned, own = tune(0)
        text, subject = encode(own)
        drawn["tuned_alone"] = draw(_fusing(studio, tuned, text, subject, {}), 1)
    encoded = fastcomposer.encode_subjects(parts.clip_vision, subjects, background=NOISE, crop=True)
    text, subject, _ = fastcomposer.fuse(parts.clip, parts.fuser, case.prompt, encoded)
    drawn["fastcomposer_cfg"] = draw(_plain(studio, parts.model, subject))
    drawn["fastcomposer_fusion"] = draw(_fusing(studio, parts.model, text, subject, {}), 1)
    referring, prompt = patched(studio, case, {}, {}), studio.encode(case.prompt)
    drawn["mrsa_cfg"] = draw(_plain(studio, referring, prompt))
    drawn["mrsa_fusion"] = draw(_fusing(studio, referring, prompt, prompt, {}), 1)
    return drawn


def draw_concept(studio: Studio, bank: dict[str, Concept], case: TemplateCase, count: int) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of a case of one concept, which acts in the whole picture."""
    prompts = encode_prompts(studio.clip, case.prompt, NEGATIVE_PROMPT, [bank[name] for name in case.names])
    everywhere = Partition(assemble([torch.ones(SIZE, SIZE)], 0.0))
    settings = fusion.FusionSettings(suppression=0.0)
    model, subject = fusion.apply(studio.model, prompts.positive, prompts.concepts, everywhere, settings)
    draw = partial(_draw, studio, case, count)
    text = studio.encode(case.prompt)
    return {
        "default": draw(_fusing(studio, model, text, subject, {}), 1),
        "plain": draw(_plain(studio, studio.model, text)),
        "cfg": draw(_plain(studio, model, subject)),
    }


def _tuned(studio: Studio, model, net: words.LoadedPromptNet, vision, reference: Reference, variants: int):
    """The model and the PromptNet, fine-tuned on variants of a picture as the nodes do it, or on the picture alone."""
    if variants:
        made = make_variants(reference.image, reference.mask, variants, SIZE, 0, Motion())
        images, masks = list(made.images), list(made.masks)
    else:
        images, masks = [reference.image], [reference.mask]
    pictures = Pictures(images, masks, ["a {}"])
    found = finetuning.fine_tune(model, net, studio.clip, vision, studio.vae, pictures, finetuning.FineTuning(), SIZE)
    tuned, _ = comfy.sd.load_lora_for_models(model, None, found.lora, 1.0, 0.0)
    return tuned, found.promptnet


def _plain(studio: Studio, model, positive: list, cfg: float = CFG):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, studio.encode(NEGATIVE_PROMPT))
    guider.set_cfg(cfg)
    return guider


def _fusing(studio: Studio, model, text: list, subject: list, changes: dict) -> FusionGuider:
    return FusionGuider(model, text, studio.encode(NEGATIVE_PROMPT), [subject], Guidance(**{**SCALES, **changes}))


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


def frontier(rows: list[Row], side: int = 360) -> Image.Image:
    """Likeness over prompt consistency, one panel per number of subjects: further up and to the right is better."""
    colors = ("#1f77b4", "#d62728", "#17becf", "#ff7f0e")
    margin = 44
    picture = Image.new("RGB", (len(SUBJECTS) * side, side + 18 * len(FRONTIERS)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    means = {(row.system, row.subjects, row.variant, row.metric): row.mean for row in rows}
    for panel, subjects in enumerate(SUBJECTS):
        left, bottom, span = panel * side + margin, side - margin, side - 2 * margin
        pen.rectangle((left, bottom - span, left + span, bottom), outline="gray")
        pen.text((left, 8), f"{subjects} subject{'s' * (subjects > 1)}: identity over prompt", "black", font)
        for value in (0.0, 0.5, 1.0):
            pen.text((left + value * span - 8, bottom + 3), f"{value:g}", "black", font)
            pen.text((left - 26, bottom - value * span - 8), f"{value:g}", "black", font)
        for names, color in zip(FRONTIERS.values(), colors, strict=True):
            points = [
                tuple(means[SYSTEM, subjects, name, metric] for metric in ("prompt", "identity"))
                for name in names
                if (SYSTEM, subjects, name, "identity") in means
            ]
            places = [(left + x * span, bottom - max(0.0, y) * span) for x, y in points]
            pen.line(places, color, 2)
            for x, y in places:
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
    for place, (name, color) in enumerate(zip(FRONTIERS, colors, strict=True)):
        y = side + 18 * place
        pen.line((margin, y + 8, margin + 24, y + 8), color, 3)
        pen.text((margin + 32, y), name, "black", font)
    return picture
