"""Does FreeCustom put the references' subjects into the picture, and nothing else of the references?"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...attention.subject import Subject
from ...host import freecustom
from ...host.patching import ALL_BLOCKS
from ...host.studio import Studio
from .. import metrics
from ..scenes import Case, make_case
from ..sheet import SheetRow, contact_sheet
from . import Report

SYSTEM = "freecustom"
SUBJECTS = (1, 2, 3)
SEEDS_PER_CASE = 4
"""Pictures of one case share a batch, and so one reference pass per step."""
SHEET_CASES = 5
"""Cases per number of subjects on the contact sheet, with their first seed."""

ALMOST_ZERO = 1e-6  # weight 0 switches a subject off

# Per variant: what is changed of every subject, and of the settings. None is the untouched model.
VARIANTS: dict[str, tuple[dict, dict] | None] = {
    "default": ({}, {}),
    "plain": None,
    "no_mask": ({"mask": None}, {}),
    "zero_bias": ({"weight": ALMOST_ZERO}, {}),
    "all_blocks": ({}, {"blocks": ALL_BLOCKS}),
    "paper": ({}, {"formula": "paper"}),
}

ABOUT = f"""\
References show one thing each. The prompt names their nouns and another background, never their looks. Every variant
draws the same seeds, {SEEDS_PER_CASE} per set of references.

- **identity**: cosine between the judge's embeddings of a subject's thing and its reference; a missing thing counts as
  unrelated (chance {{chance:.3f}}).
- **leakage**: for two and more subjects the cosine between a subject's thing and the *other* references; for one, how
  far the background has moved from the colour asked for (0) to the reference's (1), which **background** gives for
  more.
- **prompt**: share of pictures with exactly the nouns asked for.
- *truth* is the world's own drawing of what was asked with the references' identities, the ceiling; *unrelated* the
  same with other identities, the floor. *plain* is the same prompt and seed on the untouched model.
- Intervals are 95% t-intervals over sets of references. A star marks what differs from the default, by the interval of
  the paired difference."""


def report(studio: Studio, pictures: int, chance: float, tell: Callable[[str], None]) -> Report:
    """Measures every variant on `pictures` pictures for each number of subjects.

    Args:
        studio: models and judge.
        pictures: per variant and number of subjects.
        chance: mean cosine of unrelated identities.
        tell: takes a sentence about the progress.
    """
    rows, shown = [], []
    for subjects in SUBJECTS:
        values: dict[str, dict[str, list[float]]] = {}
        cases: list[int] = []
        for first in range(0, pictures, SEEDS_PER_CASE):
            count = min(SEEDS_PER_CASE, pictures - first)
            case = make_case(subjects, first // SEEDS_PER_CASE)
            drawn = draw_variants(studio, case, count)
            measure(studio, case, drawn, chance, values)
            cases += [case.seed] * count
            if first < SHEET_CASES * SEEDS_PER_CASE:
                seen = {name: drawn[name][0] for name in VARIANTS}
                shown.append(SheetRow(case.prompt, tuple(r.image for r in case.references), seen))
            tell(f"{SYSTEM}, {subjects} subjects: {first + count} of {pictures} pictures in {len(VARIANTS)} variants")
        compared = [name for name in VARIANTS if name != "default"]
        rows += metrics.rows_of(SYSTEM, subjects, values, cases, compared)
    return Report(rows, ABOUT.format(chance=chance), contact_sheet(shown))


def draw_variants(studio: Studio, case: Case, count: int) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of every variant with the same noise, and the world's own drawings."""
    drawn = {}
    for name, changes in VARIANTS.items():
        model = studio.model if changes is None else patched(studio, case, *changes)
        drawn[name] = studio.draw(model, case.prompt, case.seed, count)
    drawn["truth"] = case.draw(count, [reference.identity for reference in case.references])
    drawn["unrelated"] = case.draw(count, None)
    return drawn


def patched(studio: Studio, case: Case, subject_changes: dict, setting_changes: dict):
    """The MODEL of one variant, made by what the node calls."""
    subjects = [
        Subject(**{"image": r.image, "noun": r.noun, "mask": r.mask, "prompt": r.prompt, **subject_changes})
        for r in case.references
    ]
    settings = freecustom.Settings(**setting_changes)
    return freecustom.apply(studio.model, studio.vae, studio.clip, subjects, settings)


def measure(
    studio: Studio,
    case: Case,
    drawn: dict[str, torch.Tensor],
    chance: float,
    values: dict[str, dict[str, list[float]]],
) -> None:
    """Appends the metrics of every picture to `values`, by variant and metric."""
    references = studio.embed(
        torch.stack([r.image for r in case.references]), torch.stack([r.mask for r in case.references])
    )
    for name, pictures in drawn.items():
        columns = values.setdefault(name, {})
        for picture, readings in zip(pictures, studio.read(pictures), strict=True):
            moved = metrics.background(picture, readings, case.asked, case.left)
            scores = {"identity": metrics.identity(case.mentions, readings, references, chance)}
            if len(case.references) == 1:
                scores["leakage"] = moved
            else:
                scores["leakage"] = metrics.leakage(case.mentions, readings, references, chance)
                scores["background"] = moved
            scores["prompt"] = metrics.prompt(case.mentions, readings)
            for metric, value in scores.items():
                columns.setdefault(metric, []).append(value)
