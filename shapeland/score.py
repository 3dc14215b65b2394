"""Scores of pictures by what the judge reads in them: what was asked for, what is there, and whose identity it has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from .judge import Reading
from .world import Mention


@dataclass(frozen=True)
class Score:
    """How a picture meets its caption.

    `nouns_right`: every noun stands there as often as named and nothing else does. `described` of the named things had
    a colour said of them, `described_right` of these have it. `twins`: cosine of the identity embeddings of two equal
    nouns, or None where the caption has no such pair or the picture does not show it.
    """

    nouns_right: bool
    described: int
    described_right: int
    twins: float | None


def assign(mentions: list[Mention], readings: list[Reading]) -> list[list[Reading]]:
    """For each mention the readings of its noun, at most as many as it names, largest first."""
    return [[r for r in readings if r.noun == m.noun][: m.count] for m in mentions]


def score_picture(mentions: list[Mention], readings: list[Reading]) -> Score:
    """The score of one picture that was asked to show `mentions`."""
    asked = Counter()
    for m in mentions:
        asked[m.noun] += m.count
    described = right = 0
    twins = None
    for m, found in zip(mentions, assign(mentions, readings), strict=True):
        if m.color is not None:
            described += m.count
            right += sum(r.color == m.color and m.second in (None, r.second) for r in found)
        if m.count > 1 and len(found) > 1:
            twins = float(found[0].embedding @ found[1].embedding)
    return Score(asked == Counter(r.noun for r in readings), described, right, twins)


def summarise(scores: list[Score]) -> dict[str, float]:
    """Shares over many pictures: nouns (with counts), colors (of described things) and mean twin similarity."""
    twins = [s.twins for s in scores if s.twins is not None]
    described = sum(s.described for s in scores)
    return {
        "nouns": sum(s.nouns_right for s in scores) / max(1, len(scores)),
        "colors": sum(s.described_right for s in scores) / max(1, described),
        "twins": float(torch.tensor(twins).mean()) if twins else float("nan"),
    }
