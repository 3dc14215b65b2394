"""Chooses between detected instances: from the candidates for each noun to one mask per noun.

Nouns are written as a list, "dog, cat". A plain noun means the candidate with the best score, "dog#2" the second dog
from the left, "dog#all" all dogs together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

BEST, ALL = "best", "all"
Which = int | Literal["best", "all"]
ERROR, EMPTY, WHOLE = "error", "empty mask", "whole frame"
ABSENT = (ERROR, EMPTY, WHOLE)
SAME = 0.8
"""Overlap (intersection over union) above which two masks show the same instance."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A detection that may match a noun: its mask (H, W), boolean, and the detector's score, 0..1."""

    mask: torch.Tensor
    score: float


@dataclass(frozen=True)
class Wanted:
    """A noun and which of its instances is meant: BEST, ALL, or a number counted from the left, starting at 1."""

    noun: str
    which: Which = BEST

    def __str__(self) -> str:
        return self.noun if self.which == BEST else f"{self.noun}#{self.which}"


@dataclass(frozen=True)
class Detections:
    """What was found for the entries of a list of nouns, in their order.

    Attributes:
        entries: the N entries.
        scores: N scores, 0..1; 0 where nothing was found.
    """

    entries: tuple[Wanted, ...]
    scores: tuple[float, ...]

    def __str__(self) -> str:
        return "\n".join(f"{entry}: {score:.3f}" for entry, score in zip(self.entries, self.scores, strict=True))


def read_nouns(text: str) -> list[Wanted]:
    """Parses a list of nouns, separated by commas or line breaks.

    Raises:
        ValueError: the list is empty, an entry has no noun, or a # is followed by neither a number from 1 nor "all".
    """
    wanted = []
    for entry in filter(None, (part.strip() for part in re.split(r"[,\n]", text))):
        noun, mark, which = (part.strip() for part in entry.partition("#"))
        if not noun or (mark and which != ALL and not re.fullmatch(r"[1-9]\d*", which)):
            raise ValueError(f"nouns: expected a noun, or one with #1, #2 ... or #{ALL}, got {entry!r}")
        wanted.append(Wanted(noun, BEST if not mark else ALL if which == ALL else int(which)))
    if not wanted:
        raise ValueError('nouns: expected a list such as "dog, cat", got an empty text')
    return wanted


def choose(
    found: Sequence[Sequence[Candidate]], wanted: Sequence[Wanted], absent: str, size: tuple[int, int]
) -> tuple[torch.Tensor, Detections]:
    """Chooses one mask per entry.

    Args:
        found: the candidates for each entry; duplicates are removed here.
        wanted: the entries.
        absent: one of ABSENT, what to do where nothing is found: raise an error, or use an empty or a full mask.
        size: (H, W) of the masks.

    Returns:
        Masks (N, H, W), boolean, and their scores: the lowest one for ALL, 0 where nothing was found.

    Raises:
        ValueError: `absent` is unknown, or it is ERROR and nothing was found for an entry, or two entries chose the
            same instance and not both by number.
    """
    if absent not in ABSENT:
        raise ValueError(f"absent: expected one of {', '.join(ABSENT)}, got {absent!r}")
    masks, scores = [], []
    for candidates, want in zip(found, wanted, strict=True):
        things = distinct(candidates)
        chosen = _pick(things, want.which)
        if not chosen and absent == ERROR:
            seen = f"{len(things)} of them" if things else "nothing of the kind"
            raise ValueError(f"image: expected something that looks like {str(want)!r}, got a picture of {seen}")
        stand_in = torch.full(size, absent == WHOLE)
        masks.append(torch.stack([one.mask.cpu() for one in chosen]).any(0) if chosen else stand_in)
        scores.append(min((one.score for one in chosen), default=0.0))
    stack = torch.stack(masks)
    _refuse_shared(stack, wanted, scores)
    return stack, Detections(tuple(wanted), tuple(scores))


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates from best to worst, without empty masks and without duplicates of a better candidate."""
    kept: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda one: -one.score):
        if candidate.mask.any() and all(overlap(candidate.mask, other.mask) <= SAME for other in kept):
            kept.append(candidate)
    return kept


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Intersection over union of two boolean masks (H, W); 0 if both are empty."""
    return int((a & b).count_nonzero()) / max(1, int((a | b).count_nonzero()))


def _pick(things: list[Candidate], which: Which) -> list[Candidate]:
    """The instances that are meant, out of `things`, which are sorted best first; empty if there are too few."""
    if which == ALL:
        return things
    if which == BEST:
        return things[:1]
    from_left = sorted(things, key=lambda one: float(torch.nonzero(one.mask)[:, 1].double().mean()))
    return from_left[which - 1 : which]


def _refuse_shared(masks: torch.Tensor, wanted: Sequence[Wanted], scores: Sequence[float]) -> None:
    """Raises ValueError if two entries chose the same instance, unless both chose it by number."""
    for i in range(len(masks)):
        for j in range(i):
            by_number = isinstance(wanted[i].which, int) and isinstance(wanted[j].which, int)
            if not by_number and scores[i] and scores[j] and overlap(masks[i], masks[j]) > SAME:
                raise ValueError(
                    f"nouns: expected a thing of its own for each, got the same for {str(wanted[j])!r} and "
                    f"{str(wanted[i])!r}; numbers from the left such as {wanted[i].noun}#1 choose others"
                )
