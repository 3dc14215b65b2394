"""Does FreeCustom draw the references' subjects, and nothing else from the references?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ...host.freecustom import attention as freecustom
from ...host.freecustom.job import MrsaSettings
from ...host.model.sites import ALL_BLOCKS, LAST_STAGE, LAST_TWO_STAGES
from ...subjects.subject import Subject
from ..comparison import compare, explain
from ..scenes import Case
from ..sheet import contact_sheet
from ..studio import Studio
from . import Report

SYSTEM = "freecustom"
SUBJECTS = (1, 2, 3)

WEIGHT = 0.3
"""A weight that suits a model this small: at the published weight 3 the references drown out its few tokens."""
WEIGHTS = (0.1, 1.0)
ALMOST_ZERO = 1e-6  # weight 0 switches a subject off

# Per variant: changes to every subject, and to the settings. None is the untouched model.
VARIANTS: dict[str, tuple[dict, dict] | None] = {
    "default": ({}, {}),
    "plain": None,
    "no_mask": ({"mask": None}, {}),
    "zero_bias": ({"weight": ALMOST_ZERO}, {}),
    "all_blocks": ({}, {"blocks": ALL_BLOCKS}),
    "paper": ({}, {"formula": "paper"}),
    "last_stage": ({}, {"blocks": LAST_STAGE}),
    **{f"weight_{weight:g}": ({"weight": weight}, {}) for weight in WEIGHTS},
    "published": ({"weight": 3.0}, {}),
}

ABOUT = f"""

*default* is weight {WEIGHT:g} in the {LAST_TWO_STAGES}. The others change one thing: *no_mask* takes the whole
reference, *zero_bias* the mask with no weight, *all_blocks* looks at the references everywhere and *last_stage* in the
last stage alone, *paper* is the paper's formula in place of the published code's, in which the weight is a
factor, so that below 1 it weakens the references; *weight_X* is another weight and *published* the code's weight 3."""


def report(studio: Studio, pictures: int, chance: float, tell: Callable[[str], None]) -> Report:
    """Measures every variant on `pictures` pictures for each number of subjects; arguments as in `compare`."""
    draw = partial(draw_variants, studio)
    rows, shown = compare(SYSTEM, studio, SUBJECTS, pictures, chance, tell, draw)
    return Report(rows, explain(chance) + ABOUT, contact_sheet(shown))


def draw_variants(studio: Studio, case: Case, count: int) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of every variant with the same noise."""
    drawn = {}
    for name, changes in VARIANTS.items():
        model = studio.model if changes is None else patched(studio, case, *changes)
        drawn[name] = studio.draw(model, case.prompt, case.seed, count)
    return drawn


def patched(studio: Studio, case: Case, subject_changes: dict, setting_changes: dict):
    """The MODEL of one variant, made with the function that the node calls."""
    subjects = [
        Subject(r.image, r.noun, **{"mask": r.mask, "prompt": r.prompt, "weight": WEIGHT, **subject_changes})
        for r in case.references
    ]
    settings = MrsaSettings(**{"blocks": LAST_TWO_STAGES, **setting_changes})
    return freecustom.apply(studio.model, studio.vae, studio.clip, subjects, settings)
