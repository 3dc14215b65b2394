"""The loop that all reports share: every variant draws the same cases and seeds, and the judge reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from ..shapeland.judge import Reading
from . import metrics
from .metrics import Row
from .scenes import Case, make_case
from .sheet import SheetRow
from .studio import Studio

SEEDS_PER_CASE = 4
"""Pictures per case; they share a batch, and so one reference pass per step."""
SHEET_CASES = 5
"""Cases per number of subjects on the contact sheet, each with its first seed."""

Draw = Callable[[Case, int], dict[str, torch.Tensor]]
More = Callable[[Case, torch.Tensor, list[Reading]], dict[str, float]]

METRICS = """\
References show one thing each. The prompt names their nouns and another background, never their looks. Every variant
draws the same seeds, {seeds} per set of references.

- **identity**: cosine between the judge's embeddings of a subject's thing and its reference; a missing thing counts as
  unrelated (chance {chance:.3f}).
- **leakage**: for two and more subjects the cosine between a subject's thing and the *other* references; for one, how
  far the background has moved from the color asked for (0) to the reference's (1), which **background** gives for
  more.
- **worst**: for two and more subjects the score of FastComposer's protocol: things and references pair greedily by
  likeness, whatever their nouns, and the worst pair counts; a missing thing counts as 0.
- **prompt**: share of pictures with exactly the nouns asked for.
- *truth* is the world's own drawing of what was asked with the references' identities, the ceiling; *unrelated* the
  same with other identities, the floor. *plain* is the same prompt and seed on the untouched model.
- Intervals are 95% t-intervals over sets of references; where all sets are equal they have no width and say nothing
  about others. A star marks what differs from the default, by the interval of the paired difference."""


def explain(chance: float, per_case: int = SEEDS_PER_CASE) -> str:
    """The explanation of the shared metrics, for the document."""
    return METRICS.format(seeds=per_case, chance=chance)


def compare(
    system: str,
    studio: Studio,
    numbers: Sequence[int],
    pictures: int,
    chance: float,
    tell: Callable[[str], None],
    draw: Draw,
    shown: Sequence[str] | None = None,
    case_of: Callable[[int, int], Case] = make_case,
    per_case: int = SEEDS_PER_CASE,
    more: More | None = None,
) -> tuple[list[Row], list[SheetRow]]:
    """Draws and measures all variants; returns their rows, and the rows of the contact sheet.

    Args:
        system: system name in the rows.
        studio: models and judge.
        numbers: the numbers of subjects to measure.
        pictures: pictures per variant and number of subjects.
        chance: mean cosine of unrelated identities.
        tell: called with a sentence about the progress.
        draw: (case, count) -> pictures (count, H, W, 3) by variant, "default" and "plain" among them, from one noise.
        shown: the variants on the contact sheet, where a case has them; None means all.
        case_of: (number of subjects, index) -> case.
        per_case: pictures per case.
        more: (case, picture, readings) -> further metrics.
    """
    rows, sheet = [], []
    for subjects in numbers:
        values: dict[str, dict[str, list[float]]] = {}
        cases: list[int] = []
        for first in range(0, pictures, per_case):
            count = min(per_case, pictures - first)
            case = case_of(subjects, first // per_case)
            drawn = studio.kept.drawn(f"{system}_{subjects}_{first}_{count}", partial(draw, case, count))
            variants = list(drawn)
            drawn["truth"] = case.draw(count, [reference.identity for reference in case.references])
            drawn["unrelated"] = case.draw(count, None)
            add_metrics(studio, case, drawn, chance, values, more)
            cases += [case.seed] * count
            if first < SHEET_CASES * per_case:
                seen = {name: drawn[name][0] for name in shown or variants if name in drawn}
                sheet.append(SheetRow(case.prompt, tuple(r.image for r in case.references), seen))
            tell(f"{system}, {subjects} subjects: {first + count} of {pictures} pictures in {len(variants)} variants")
        compared = [name for name in variants if name != "default"]
        rows += metrics.report_rows(system, subjects, values, cases, compared)
    return rows, sheet


def add_metrics(
    studio: Studio,
    case: Case,
    drawn: dict[str, torch.Tensor],
    chance: float,
    values: dict[str, dict[str, list[float]]],
    more: More | None = None,
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
                scores["worst"] = metrics.worst(readings, references)
                scores["background"] = moved
            scores["prompt"] = metrics.prompt(case.mentions, readings)
            if more:
                scores |= more(case, picture, readings)
            for metric, value in scores.items():
                columns.setdefault(metric, []).append(value)
