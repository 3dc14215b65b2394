"""Readings of the judge as one mask or one text."""

from __future__ import annotations

import torch

from .judge import Reading
from .world import NOUNS

NOT_SEEN = "not seen"


def union_mask(readings: list[list[Reading]], noun: str, size: tuple[int, int]) -> torch.Tensor:
    """Masks (pictures, H, W) in {0, 1} of all things with the noun `noun`, or of all things for "any"."""
    masks = torch.zeros(len(readings), *size)
    for i, things in enumerate(readings):
        for thing in things:
            if noun in ("any", NOUNS[thing.noun]):
                masks[i][thing.mask.cpu()] = 1.0
    return masks


def describe(
    readings: list[list[Reading]], references: list[list[Reading]] = (), plain: list[Reading] | None = None
) -> str:
    """What the judge sees in pictures, one line per thing.

    Args:
        readings: of each picture, largest thing first.
        references: of pictures whose largest thing stands for a subject. Each first gets a line that says how much the
            thing of its noun looks like it: the cosine of their identity embeddings.
        plain: of a picture of the same prompt without the subjects, whose likeness stands beside.

    Raises:
        ValueError: a reference shows nothing.
    """
    if not all(references):
        raise ValueError("references: expected pictures with a thing of Shapeland, got one in which none is seen")
    lines = []
    for i, things in enumerate(readings):
        found = []
        for reference in references:
            own = _likeness(things, reference[0])
            beside = "" if plain is None else f" (plain prompt {_likeness(plain, reference[0])})"
            said = own if own == NOT_SEEN else f"likeness {own} of 1"
            found.append(f"{NOUNS[reference[0].noun]}: {said}{beside}")
        found += [f"seen: {thing.describe()}, {thing.confidence:.0%} sure" for thing in things] or ["nothing is seen"]
        lines += [f"picture {i + 1}: {line}" for line in found] if len(readings) > 1 else found
    return "\n".join(lines)


def _likeness(things: list[Reading], reference: Reading) -> str:
    """The largest cosine of a thing of the reference's noun, or that there is none."""
    cosines = [float(thing.embedding @ reference.embedding) for thing in things if thing.noun == reference.noun]
    return f"{max(cosines):.2f}" if cosines else NOT_SEEN
