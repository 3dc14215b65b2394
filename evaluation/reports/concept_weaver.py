"""Does Concept Weaver draw each concept in its own place, and better than the usual alternatives?"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch

from ...encoders.concept_texts import Name, concept_text
from ...encoders.concepts import Concept
from ...host.model.families import family_of_concept
from ...host.structure import plugandplay
from ...host.structure.inversion import invert, renew
from ...host.weaver import fusion
from ...host.weaver.prompts import encode_prompts, encode_text, splice
from ...host.weaver.weights import DIFFUSION_MODEL
from ...subjects.partition import Partition, assemble
from ..comparison import compare, explain
from ..sheet import contact_sheet
from ..studio import CFG, NEGATIVE_PROMPT, Studio
from ..templates import BACKGROUND, TemplateCase, load_bank, structure, template_case
from . import Report

SYSTEM = "concept_weaver"
SUBJECTS = (2, 3, 5)
STEPS, SCHEDULER = 25, "ddim_uniform"
DILATION = 0.03
INJECTION = plugandplay.InjectionSettings(attention_until=1.0, blocks=plugandplay.PUBLISHED)
RENEWED = 0.6
"""Settings that keep shapes on Shapeland's UNet, where the paper's do not, and the share of the noise that can then be
fresh with three or more concepts."""
LAMBDAS = (0.0, 0.1, 0.5, 1.0)
SHOWN = (
    "default",
    "plain",
    "merged_loras",
    "score_mixing",
    "no_injection",
    "paper_injection",
    "template_noise",
    "joint_prompt",
    "lambda_0.0",
    "lambda_1.0",
    "own_ground",
)

ABOUT = f"""

Each case is a scene that the world draws (the template), inverted, and sampled again with as many of six trained
concepts, whose identities no word says. All variants start from the inverted noise, of which {RENEWED:g} is fresh where
the concepts are (Renew Noise), but *template_noise*, which is the default from the inverted noise as it is.

- **structure**: intersection over union of the template's masks and those of the result.
- *default* is feature fusion with lambda {fusion.FusionSettings().suppression:g} and Plug-and-Play with the attention
  of the published code's blocks in all steps; *paper_injection* takes the paper's blocks for
  {plugandplay.InjectionSettings().attention_until:g} of them, and *no_injection* leaves all of it out.
- *merged_loras* adds all concepts to the weights and puts all their words into one prompt, with the same injection as
  the default. *score_mixing* denoises the picture once per concept and mixes by the masks. *joint_prompt* gives all
  concepts the prompt with all their words, *lambda_X* is another suppression, *own_ground* has a seventh concept behind
  the others: an orange that no word of the world says. *plain* is the untouched model. *truth*
  and *unrelated* stand where the template's things do."""


def report(studio: Studio, pictures: int, chance: float, tell: Callable[[str], None]) -> Report:
    """Measures all variants on `pictures` templates for each number of concepts; arguments as in `compare`."""
    draw = partial(draw_variants, studio, load_bank())

    def kept(case, _picture, readings):
        return {"structure": structure(case, readings)}

    rows, shown = compare(
        SYSTEM, studio, SUBJECTS, pictures, chance, tell, draw, SHOWN, case_of=template_case, per_case=1, more=kept
    )
    sampling = f"euler, {SCHEDULER}, {STEPS} steps, cfg {CFG:g}"
    return Report(rows, explain(chance, 1) + ABOUT, contact_sheet(shown), sampling=sampling)


def draw_variants(studio: Studio, bank: dict[str, Concept], case: TemplateCase, _count: int) -> dict[str, torch.Tensor]:
    """Pictures (1, H, W, 3) of every variant from the template's noise."""
    concepts = [bank[name] for name in case.names]
    template = torch.from_numpy(case.template.image)[None]
    latent = {"samples": studio.vae.encode(template)}
    inverted = invert(studio.model, latent, studio.encode(case.prompt), STEPS, SCHEDULER)
    prompts = encode_prompts(studio.clip, case.prompt, NEGATIVE_PROMPT, concepts)
    weights = assemble(list(case.masks), DILATION)
    joint = joint_conditioning(studio, case.prompt, concepts)
    own = bank[BACKGROUND]
    on_it = re.sub(r"\w+ background", f"{own.placeholder} {own.class_word}", case.prompt)
    ground = fusion.PromptedConcept(own, encode_text(studio.clip, on_it, own))

    def injected(model, settings=INJECTION):
        return plugandplay.apply(model, inverted.source, settings)

    def fused(model, concepts_drawn=prompts.concepts, background=None, **changed):
        settings = fusion.FusionSettings(**changed)
        return fusion.apply(model, prompts.positive, concepts_drawn, Partition(weights), settings, background)

    base = injected(studio.model)
    renewed = renew(inverted.noise, weights, case.seed, RENEWED)
    variants = {
        "default": fused(base),
        "template_noise": fused(base),
        "plain": (studio.model, prompts.positive),
        "merged_loras": (injected(merged(studio.model, concepts)), joint),
        "score_mixing": fused(base, mode=fusion.SCORES),
        "no_injection": fused(studio.model),
        "paper_injection": fused(injected(studio.model, plugandplay.InjectionSettings())),
        "joint_prompt": fused(base, [fusion.PromptedConcept(concept, joint) for concept in concepts]),
        **{f"lambda_{value}": fused(base, suppression=value) for value in LAMBDAS},
        "own_ground": fused(base, background=ground),
    }
    return {
        name: studio.redraw(model, positive, noise["samples"], inverted.sigmas)
        for name, (model, positive) in variants.items()
        for noise in [inverted.noise if name == "template_noise" else renewed]
    }


def joint_conditioning(studio: Studio, prompt: str, concepts: list[Concept]) -> list:
    """ComfyUI's conditioning for one prompt with the words of all concepts."""
    for concept in concepts:
        prompt = concept_text(prompt, Name(concept.class_word, concept.placeholder), [])
    words = {concept.placeholder: concept.tokens for concept in concepts}
    return studio.clip.encode_from_tokens_scheduled(splice(studio.clip, prompt, words))


def merged(model, concepts: list[Concept]):
    """A clone of the MODEL with all concepts' differences added to its weights, as LoRA loaders add them."""
    patched = model.clone()
    for concept in concepts:
        layer = family_of_concept(concept.deltas).layer
        patches = {
            f"{DIFFUSION_MODEL}{layer(key, part)}.weight": ("diff", (delta.matrix(),))
            for key, parts in concept.deltas.items()
            for part, delta in parts.items()
        }
        patched.add_patches(patches)
    return patched
