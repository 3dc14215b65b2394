"""Does fusion sampling move the frontier between likeness and prompt, for subjects of other systems?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import comfy.sample
import comfy.samplers
import torch

from ...encoders.reference import NOISE
from ...host.fastcomposer import conditioning as fastcomposer
from ...host.fastcomposer.files import Parts
from ...host.model.window import Window
from ...host.profusion.guider import FusionGuider, Guidance
from ...host.profusion.sampler import fusion_sampler
from ...host.shapeland import load_clip_vision
from ...shapeland.world import SIZE
from ...subjects.subject import Subject
from ..comparison import compare, explain
from ..scenes import Case
from ..sheet import contact_sheet
from ..studio import NEGATIVE_PROMPT, Studio
from . import Report
from .fastcomposer import FILE, load_parts
from .freecustom import patched

SYSTEM = "profusion"
SUBJECTS = (1, 2)
STEPS, SCHEDULER = 25, "ddim_uniform"
CFG = 4.0
SCALES = {"subject_scale": 4.0, "text_scale": 3.0, "fusion_scale": 4.0, "gamma": 0.6}

# Per variant: fusion steps, window, and what is changed of the scales.
FUSED: dict[str, tuple[int, Window, dict]] = {
    "default": (1, Window(), {}),
    "composable": (0, Window(), {}),
    "fusion_m2": (2, Window(), {}),
    "weak": (1, Window(), {"subject_scale": 2.0, "text_scale": 2.0, "fusion_scale": 3.0}),
    "gamma_1": (1, Window(), {"gamma": 1.0}),
    "late": (1, Window(0.4, 1.0), {}),
    "reuse": (1, Window(), {"reuse": True}),
}
SHOWN = ("default", "plain", "cfg", "composable", "mrsa_cfg", "mrsa_fusion")

ABOUT = """

Subjects are FastComposer's, and for *mrsa_cfg* and *mrsa_fusion* FreeCustom's. *plain* and *cfg* are plain guidance by
the text and by the subjects. *default* is fusion sampling with the scales 4 for subjects, 3 for text, 4 in the fusion
stage, and gamma 0.6. The others change one thing: *composable* has no fusion stage, *fusion_m2* two, *weak* the scales
2, 2 and 3, *gamma_1* leaves the subjects' words as they are in the fusion stage, *late* has that stage in the last 60
percent of the schedule, and *reuse* evaluates text and negative prompt once per step."""


def report(studio: Studio, pictures: int, chance: float, tell: Callable[[str], None]) -> Report:
    """Measures every variant; arguments as for `compare`."""
    parts = load_parts(FILE, studio, load_clip_vision())
    rows, shown = compare(
        SYSTEM, studio, SUBJECTS, pictures, chance, tell, partial(draw_variants, studio, parts), SHOWN
    )
    sampling = f"euler, {SCHEDULER}, {STEPS} steps; plain guidance at {CFG:g}"
    return Report(rows, explain(chance) + ABOUT, contact_sheet(shown), sampling=sampling)


def draw_variants(studio: Studio, parts: Parts, case: Case, count: int) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of every variant with the same noise."""
    subjects = [Subject(r.image, r.noun, r.mask) for r in case.references]
    encoded = fastcomposer.encode_subjects(parts.clip_vision, subjects, background=NOISE, crop=True)
    text, fused, _ = fastcomposer.fuse(parts.clip, parts.fuser, case.prompt, encoded)
    referring = patched(studio, case, {}, {})
    draw = partial(_draw, studio, case, count)
    drawn = {"plain": draw(_plain(studio, parts.model, text)), "cfg": draw(_plain(studio, parts.model, fused))}
    for name, (steps, window, changes) in FUSED.items():
        drawn[name] = draw(_fusing(studio, parts.model, text, fused, changes), steps, window)
    prompt = studio.encode(case.prompt)
    drawn["mrsa_cfg"] = draw(_plain(studio, referring, prompt))
    drawn["mrsa_fusion"] = draw(_fusing(studio, referring, prompt, prompt, {}), 1)
    return drawn


def _plain(studio: Studio, model, positive: list):
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, studio.encode(NEGATIVE_PROMPT))
    guider.set_cfg(CFG)
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
