"""Readings of the judge as one mask or one text."""

from __future__ import annotations

import torch

from .judge import Reading
from .world import NOUNS


def union_mask(readings: list[list[Reading]], noun: str, size: tuple[int, int]) -> torch.Tensor:
    """Masks (pictures, H, W) in {0, 1} of all things with the noun `noun`, or of all things for "any"."""
    masks = torch.zeros(len(readings), *size)
    for i, things in enumerate(readings):
        for thing in things:
            if noun in ("any", NOUNS[thing.noun]):
                masks[i][thing.mask.cpu()] = 1.0
    return masks


def describe(readings: list[list[Reading]], reference: list[Reading] | None) -> str:
    """One line per thing, largest first; with a reference picture, also its similarity to the reference's largest.

    Raises ValueError if the reference shows nothing.
    """
    if reference is not None and not reference:
        raise ValueError("reference: expected a picture with a thing of Shapeland, got one in which none is seen")
    lines = []
    for i, things in enumerate(readings):
        for thing in things:
            alike = "" if reference is None else f", {float(thing.embedding @ reference[0].embedding):.2f} alike"
            lines.append(f"picture {i + 1}: {thing.describe()}, {thing.confidence:.0%} sure{alike}")
        if not things:
            lines.append(f"picture {i + 1}: nothing")
    return "\n".join(lines)
