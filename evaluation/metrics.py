"""The metrics of the report: pure functions of the judge's readings of a picture, and means with their intervals.

Intervals are t-intervals over the means of *cases*. Pictures of one case share their references and are not
independent, so 16 cases of 4 pictures are 16 observations; with one picture per case it is the ordinary interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from ..shapeland.judge import Reading
from ..shapeland.score import assign, score_picture
from ..shapeland.world import Mention
from ..training.data.greedy import greedy_match

LEAD = "_lead"
"""Suffix of the name of a metric's paired difference: the default's value minus this variant's, picture by picture."""

_CLEAR_OF_THINGS = 5  # side in pixels of the square by which masks are dilated before the background is measured


@dataclass(frozen=True)
class Row:
    """One line of the report: the mean and 95% interval of a metric for one variant of a system, over n pictures.

    `subjects` is 0 for pictures with any number of things.
    """

    system: str
    variant: str
    subjects: int
    metric: str
    mean: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict:
        """The row as a dict."""
        return asdict(self)


def identity(mentions: Sequence[Mention], readings: list[Reading], references: torch.Tensor, chance: float) -> float:
    """Mean cosine between each subject's thing in the picture and its reference.

    Args:
        mentions: one per subject.
        readings: the judge's readings of one picture.
        references: (N, d), unit embeddings of the references' things.
        chance: value of a missing thing, the mean cosine of unrelated identities.
    """
    found = _embeddings(mentions, readings)
    values = [chance if e is None else float(e @ r) for e, r in zip(found, references, strict=True)]
    return sum(values) / len(values)


def leakage(mentions: Sequence[Mention], readings: list[Reading], references: torch.Tensor, chance: float) -> float:
    """Mean cosine between each subject's thing and the *other* subjects' references; arguments as in `identity`.

    A picture without leakage scores `chance`. Needs at least two subjects.
    """
    found = _embeddings(mentions, readings)
    values = [
        chance if e is None else float(e @ reference)
        for i, e in enumerate(found)
        for j, reference in enumerate(references)
        if i != j
    ]
    return sum(values) / len(values)


def _embeddings(mentions: Sequence[Mention], readings: list[Reading]) -> list[torch.Tensor | None]:
    """The embedding of the largest thing with each mention's noun, or None."""
    return [things[0].embedding if things else None for things in assign(list(mentions), readings)]


def worst(readings: list[Reading], references: torch.Tensor) -> float:
    """Identity of the worst subject, as FastComposer's protocol scores several (arXiv 2305.10431, section 5.1): the
    largest things, as many as there are references, are paired with these by `greedy_minimum`.

    Args:
        readings: the judge's readings of one picture, the largest first.
        references: (N, d), unit embeddings of the references' things.
    """
    largest = [reading.embedding for reading in readings[: len(references)]]
    return greedy_minimum(torch.stack(largest) @ references.mT) if largest else 0.0


def greedy_minimum(similarity: torch.Tensor) -> float:
    """Score of the worst reference after greedy pairing.

    The largest value of all makes a pair, its row and column are removed, and so on: greedy as in the paper, not the
    assignment with the largest sum. Negative similarity counts as 0, and so does a reference without a partner.

    Args:
        similarity: (found, references).
    """
    found, references = similarity.shape
    if found < references:
        return 0.0
    likeness = similarity.clamp(min=0).cpu().numpy()
    return min(float(likeness[pair]) for pair in greedy_match(likeness, threshold=0.0))


def prompt(mentions: Sequence[Mention], readings: list[Reading]) -> float:
    """1 if every noun appears as often as asked for and no other does, else 0."""
    return float(score_picture(list(mentions), readings).nouns_right)


def background(picture: torch.Tensor, readings: list[Reading], asked: torch.Tensor, reference: torch.Tensor) -> float:
    """How far the background has moved from the color asked for (0) to that of the references (1).

    The median color outside all things (of the whole picture if they cover it) is projected onto the line between the
    two colors and clipped to its ends.

    Args:
        picture: (H, W, 3) in [0, 1].
        readings: the judge's readings, with masks (H, W).
        asked, reference: colors (3,), different from each other.
    """
    covered = torch.zeros(picture.shape[:2])
    for reading in readings:
        covered[reading.mask.cpu()] = 1.0
    wide = F.max_pool2d(covered[None, None], _CLEAR_OF_THINGS, 1, _CLEAR_OF_THINGS // 2)[0, 0] > 0
    free = picture[~wide | wide.all()]
    line = reference - asked
    share = (free.median(0).values - asked) @ line / (line @ line)
    return float(share.clamp(0, 1))


def interval(
    values: Sequence[float], cases: Sequence[Hashable], least: float, most: float
) -> tuple[float, float, float, int]:
    """Mean of the cases' means, the ends of its 95% t-interval, and the number of values.

    The interval is clipped to the metric's range. A single case gives no spread, so its interval is the range.

    Args:
        values: one per picture.
        cases: the case that each value belongs to.
        least, most: range of the metric.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("interval: expected at least one value, got none")
    members: dict[Hashable, list[float]] = {}
    for value, case in zip(values, cases, strict=True):
        members.setdefault(case, []).append(value)
    means = [sum(group) / len(group) for group in members.values()]
    mean = sum(means) / len(means)
    if len(means) == 1:
        return mean, least, most, len(values)
    from scipy.stats import t

    variance = sum((m - mean) ** 2 for m in means) / (len(means) - 1)
    reach = float(t.ppf(0.975, len(means) - 1)) * math.sqrt(variance / len(means))
    return mean, max(least, mean - reach), min(most, mean + reach), len(values)


RANGES = {
    "identity": (-1.0, 1.0),
    "leakage": (-1.0, 1.0),
    "background": (0.0, 1.0),
    "worst": (0.0, 1.0),
    "prompt": (0.0, 1.0),
    "structure": (0.0, 1.0),
}
"""Smallest and largest value of each metric; structure is `templates.structure`."""


def report_rows(
    system: str,
    subjects: int,
    values: dict[str, dict[str, list[float]]],
    cases: Sequence[Hashable],
    compared: Sequence[str],
    ranges: Mapping[str, tuple[float, float]] = RANGES,
) -> list[Row]:
    """The rows for one number of subjects.

    Args:
        system: system name in the rows.
        subjects: number of subjects.
        values: per variant and metric, one value per picture, with pictures in the same order everywhere.
        cases: the case of each picture.
        compared: variants for which the paired lead of "default" is given too.
        ranges: smallest and largest value of each metric.
    """
    rows = []
    for variant, by_metric in values.items():
        for metric, column in by_metric.items():
            least, most = ranges[metric]
            rows.append(Row(system, variant, subjects, metric, *interval(column, cases, least, most)))
            if variant in compared:
                lead = [a - b for a, b in zip(values["default"][metric], column, strict=True)]
                spread = most - least
                rows.append(Row(system, variant, subjects, metric + LEAD, *interval(lead, cases, -spread, spread)))
    return rows
