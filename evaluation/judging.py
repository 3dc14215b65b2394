"""How far the judge itself can be trusted: its readings of held-out pictures compared with the ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..shapeland.judge import Reading
from ..shapeland.world import Picture
from .metrics import Row, interval
from .scenes import held_out
from .studio import Studio

PICTURES = 256
_LEAST_AREA = 40  # visible pixels that a thing needs to count
_LEAST_OVERLAP = 0.5  # intersection over union from which a reading matches a thing


@dataclass(frozen=True)
class Trust:
    """The judge's accuracy as rows, and `chance`, its mean cosine of two unrelated identities."""

    rows: list[Row]
    chance: float


def measure_judge(studio: Studio) -> Trust:
    """Measures the judge on PICTURES held-out pictures.

    `found` is the share of things that a reading matches; noun, color, second and pattern are the shares of these that
    are read correctly; `prompt` is the share of pictures with the right nouns and counts. Values are means per picture.
    """
    pictures = held_out(PICTURES)
    images = torch.stack([torch.from_numpy(p.image) for p in pictures])
    scores: dict[str, list[float]] = {}
    for picture, readings in zip(pictures, studio.read(images), strict=True):
        for name, value in grade(picture, readings).items():
            scores.setdefault(name, []).append(value)
    rows = [
        Row("judge", "truth", 0, name, *interval(values, range(len(values)), 0.0, 1.0))
        for name, values in scores.items()
    ]
    # One thing per picture, because things of one picture may share an identity.
    embeddings = studio.embed(images, torch.stack([torch.from_numpy(p.masks[-1]) for p in pictures]))
    return Trust(rows, mean_off_diagonal(embeddings @ embeddings.T))


def grade(picture: Picture, readings: list[Reading]) -> dict[str, float]:
    """Shares of one picture's things that were found and read correctly; see `measure_judge`."""
    masks = torch.from_numpy(picture.masks) > 0.5
    things = [(thing, mask) for thing, mask in zip(picture.scene.things, masks, strict=True)
              if mask.sum() >= _LEAST_AREA]  # fmt: skip
    pairs = []
    for thing, mask in things:
        overlaps = [float((r.mask.cpu() & mask).sum() / (r.mask.cpu() | mask).sum()) for r in readings]
        if overlaps and max(overlaps) >= _LEAST_OVERLAP:
            pairs.append((thing, readings[overlaps.index(max(overlaps))]))
    shares = {"found": len(pairs) / len(things)}
    if pairs:
        shares["noun"] = sum(r.noun == thing.noun for thing, r in pairs) / len(pairs)
        for name in ("color", "second", "pattern"):
            shares[name] = sum(getattr(r, name) == getattr(thing.identity, name) for thing, r in pairs) / len(pairs)
    shares["prompt"] = float(sorted(r.noun for r in readings) == sorted(thing.noun for thing, _ in things))
    return shares


def mean_off_diagonal(matrix: torch.Tensor) -> float:
    """Mean of a square matrix without its diagonal."""
    n = len(matrix)
    return float((matrix.sum() - matrix.diagonal().sum()) / (n * (n - 1)))
