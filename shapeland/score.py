"""Scores of pictures, computed from the judge's readings: how well a picture shows what its caption asks for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from .judge import Reading
from .world import Mention


@dataclass(frozen=True)
class Score:
    """How well a picture matches its caption.

    `things`: number of things in the caption. `nouns_right`: whether every noun appears as often as the caption says,
    and no other does. `described`: number of things whose color the caption gives, `described_right`: how many of them
    have it; `patterned` and `patterned_right`: the same for patterns. `twins`: cosine of the identity embeddings of two
    things with the same noun, or None if the caption has no such pair or the picture does not show it.
    """

    things: int
    nouns_right: bool
    described: int
    described_right: int
    patterned: int
    patterned_right: int
    twins: float | None


def assign(mentions: list[Mention], readings: list[Reading]) -> list[list[Reading]]:
    """For each mention the readings of its noun, largest first, at most as many as it counts."""
    return [[r for r in readings if r.noun == m.noun][: m.count] for m in mentions]


def score_picture(mentions: list[Mention], readings: list[Reading]) -> Score:
    """The score of one picture that was asked to show `mentions`."""
    asked = Counter()
    for m in mentions:
        asked[m.noun] += m.count
    described = right = patterned = pattern_right = 0
    twins = None
    for m, found in zip(mentions, assign(mentions, readings), strict=True):
        if m.color is not None:
            described += m.count
            right += sum(r.color == m.color and m.second in (None, r.second) for r in found)
        if m.pattern is not None:
            patterned += m.count
            pattern_right += sum(r.pattern == m.pattern for r in found)
        if m.count > 1 and len(found) > 1:
            twins = float(found[0].embedding @ found[1].embedding)
    nouns_right = asked == Counter(r.noun for r in readings)
    return Score(asked.total(), nouns_right, described, right, patterned, pattern_right, twins)


def summarize(scores: list[Score]) -> dict[str, float]:
    """Shares over many pictures: nouns (with counts), the same among captions of one, two and three things, colors and
    patterns (of things whose color or pattern is given), and mean twin similarity; NaN without data."""
    twins = [s.twins for s in scores if s.twins is not None]
    by_number = {f"nouns_{n}": [s.nouns_right for s in scores if s.things == n] for n in (1, 2, 3)}
    return {
        "nouns": _share(sum(s.nouns_right for s in scores), len(scores)),
        **{name: _share(sum(right), len(right)) for name, right in by_number.items()},
        "colors": _share(sum(s.described_right for s in scores), sum(s.described for s in scores)),
        "patterns": _share(sum(s.patterned_right for s in scores), sum(s.patterned for s in scores)),
        "twins": float(torch.tensor(twins).mean()) if twins else float("nan"),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
