"""Does FastComposer draw the references' subjects, and what does giving them more of the steps cost?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ...encoders.reference import NOISE
from ...host.fastcomposer import conditioning as fastcomposer
from ...host.fastcomposer import files
from ...host.fastcomposer.delay import Delay, delayed
from ...host.shapeland import load_clip_vision
from ...samplers.switching import NEAREST
from ...shapeland.models import WEIGHTS
from ...subjects.subject import Subject
from ..comparison import compare, explain
from ..metrics import Row
from ..scenes import Case
from ..sheet import contact_sheet
from ..studio import Studio
from . import Report

SYSTEM = "fastcomposer"
SUBJECTS = (1, 2)
ALPHA = 0.8
ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
FILE = WEIGHTS / SYSTEM / "shapeland.safetensors"
UNLOCALIZED = WEIGHTS / SYSTEM / "shapeland_no_localization.safetensors"
SHOWN = ("default", "plain", "alpha_0.4", "alpha_0.6", "alpha_1.0", "no_localization")

ABOUT = f"""

*default* is alpha {ALPHA:g}; *alpha_X* gives the subjects the last part X of the steps. *plain* is the untouched model;
alpha_0.0 differs from it by the LoRA alone. *no_localization* was trained without the localization loss, otherwise
alike."""


def report(studio: Studio, pictures: int, chance: float, tell: Callable[[str], None]) -> Report:
    """Measures the curve over alpha and the ablation; arguments as in `compare`."""
    vision = load_clip_vision()
    parts = {"": load_parts(FILE, studio, vision), "no_localization": load_parts(UNLOCALIZED, studio, vision)}
    draw = partial(draw_variants, studio, parts)
    rows, shown = compare(SYSTEM, studio, SUBJECTS, pictures, chance, tell, draw, SHOWN)
    return Report(rows, explain(chance) + ABOUT, contact_sheet(shown), {"alpha": curve(rows)})


def load_parts(file: Path, studio: Studio, vision) -> files.Parts:
    """Loads FastComposer's weights for Shapeland.

    Raises:
        FileNotFoundError: they are missing.
    """
    if not file.exists():
        raise FileNotFoundError(f"FastComposer's weights for Shapeland are not at {file}: see shapeland/README.md.")
    return files.load(str(file), studio.model, studio.clip, vision)


def draw_variants(studio: Studio, parts: dict[str, files.Parts], case: Case, count: int) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of every variant with the same noise."""
    own = parts[""]
    plans = {"default": (own, ALPHA), **{f"alpha_{alpha}": (own, alpha) for alpha in ALPHAS}}
    plans["no_localization"] = (parts["no_localization"], ALPHA)
    drawn = {"plain": studio.draw(studio.model, case.prompt, case.seed, count)}
    for name, (weights, alpha) in plans.items():
        if name == f"alpha_{ALPHA}":
            drawn[name] = drawn["default"]
        else:
            positive = conditioning(weights, case, alpha)
            drawn[name] = studio.draw(weights.model, case.prompt, case.seed, count, positive)
    return drawn


def conditioning(weights: files.Parts, case: Case, alpha: float) -> list:
    """The positive conditioning of a case, made with the functions that the nodes call."""
    subjects = fastcomposer.encode_subjects(
        weights.clip_vision,
        [Subject(r.image, r.noun, r.mask) for r in case.references],
        background=NOISE,
        crop=True,
    )
    text_only, fused, _ = fastcomposer.fuse(weights.clip, weights.fuser, case.prompt, subjects)
    return delayed(text_only, fused, Delay(alpha, None, 0, NEAREST))


def curve(rows: list[Row], side: int = 360) -> Image.Image:
    """Identity, leakage and prompt consistency over alpha, one panel per number of subjects."""
    colors = {"identity": "#1f77b4", "prompt": "#2ca02c", "leakage": "#d62728"}
    margin = 44
    picture = Image.new("RGB", (len(SUBJECTS) * side, side), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for panel, subjects in enumerate(SUBJECTS):
        left, bottom, span = panel * side + margin, side - margin, side - 2 * margin
        pen.rectangle((left, bottom - span, left + span, bottom), outline="gray")
        pen.text((left, 8), f"{subjects} subject{'s' * (subjects > 1)}", "black", font)
        pen.text((left + span // 2 - 18, bottom + 18), "alpha", "black", font)
        for value in (0.0, 0.5, 1.0):
            pen.text((left + value * span - 8, bottom + 3), f"{value:g}", "black", font)
            pen.text((left - 26, bottom - value * span - 8), f"{value:g}", "black", font)
        for place, (metric, color) in enumerate(colors.items()):
            points = [
                (left + float(row.variant[6:]) * span, bottom - min(1.0, max(0.0, row.mean)) * span)
                for row in rows
                if row.subjects == subjects and row.metric == metric and row.variant.startswith("alpha_")
            ]
            pen.line(points, color, 2)
            for x, y in points:
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=color)
            pen.text((left + 90 + 70 * place, 8), metric, color, font)
    return picture
