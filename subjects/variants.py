"""Variants of a subject's only picture: the subject moved, turned and made smaller, and the hole that it leaves.

ProFusion (Zhou et al., arXiv 2305.13579) fine-tunes on such variants after an inpainting model has filled the holes, so
that the subject is learned and its background is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .pictures import middle_square

_TRIES = 100
"""How often a variant is drawn anew at most."""


@dataclass(frozen=True)
class Motion:
    """How far a subject moves. The defaults are the published ones.

    Attributes:
        degrees: largest angle, to both sides.
        translate: largest shift as a share of the side, in both directions.
        smallest, largest: scale.
        flip: mirrors half of the variants.

    Raises:
        ValueError: a value is out of its range.
    """

    degrees: float = 10.0
    translate: float = 0.2
    smallest: float = 0.6
    largest: float = 1.0
    flip: bool = True

    def __post_init__(self):
        if not 0 < self.smallest <= self.largest:
            raise ValueError(
                f"smallest: expected a scale from 0 to largest ({self.largest:g}), without 0, got {self.smallest:g}"
            )


class Variants(NamedTuple):
    """Attributes:
    images: (n, side, side, 3), the subject on black, but for the picture itself.
    holes: (n, side, side), 1 where there is nothing yet.
    masks: (n, side, side), 1 on the subject.
    """

    images: torch.Tensor
    holes: torch.Tensor
    masks: torch.Tensor


def make_variants(
    image: torch.Tensor,
    mask: torch.Tensor,
    count: int,
    side: int,
    seed: int,
    motion: Motion | None = None,
    with_photo: bool = True,
) -> Variants:
    """Random variants of the middle square of a picture; each depends on the seed and its own number alone.

    Args:
        image: (H, W, 3), values 0..1.
        mask: (H, W), 1 on the subject.
        count: number of variants.
        side: of the variants, in pixels.
        with_photo: the square itself, with nothing cut out, is one more and comes first, as published.

    Raises:
        ValueError: the mask is of another size, or empty in the middle square.
    """
    if mask.shape != image.shape[:2]:
        raise ValueError(f"mask: expected the picture's size {_size(image)}, got {_size(mask)}")
    motion = motion or Motion()
    both = middle_square(torch.cat([image.float(), mask.float()[..., None]], -1))
    both = F.interpolate(both.movedim(-1, 0)[None], (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    if not (both[:, 3] > 0.5).any():
        raise ValueError("mask: expected white on the subject in the middle square of the picture, got none there")
    center = 2 * ((both[0, 3] > 0.5).nonzero().float().mean(0).flip(0).cpu() + 0.5) / side - 1
    moves = torch.stack([_move(motion, seed, number, center) for number in range(count)]).to(both)
    grid = F.affine_grid(moves, [count, 4, side, side], align_corners=False)
    # Colors are weighted by the mask, so that what is outside of it does not bleed in at the edges.
    seen = torch.cat([both[:, :3] * both[:, 3:], both[:, 3:]], 1).expand(count, -1, -1, -1)
    moved = F.grid_sample(seen, grid, mode="bilinear", align_corners=False)
    masks = moved[:, 3].clamp(0, 1)
    shown = masks > 0.5
    colors = moved[:, :3] / moved[:, 3:].clamp(min=1e-3)
    images = torch.where(shown[:, None], colors, torch.zeros_like(colors)).movedim(1, -1).clamp(0, 1)
    if with_photo:
        images = torch.cat([both[:, :3].movedim(1, -1), images])
        holes = torch.cat([torch.zeros_like(both[:, 3]), (~shown).float()])
        return Variants(images, holes, torch.cat([(both[:, 3] > 0.5).float(), shown.float()]))
    return Variants(images, (~shown).float(), shown.float())


def _move(motion: Motion, seed: int, number: int, center: torch.Tensor) -> torch.Tensor:
    """The affine map (2, 3) from places of a variant to places of the picture, both from -1 to 1. It is drawn anew
    while it moves the center (x, y) of the subject out of the variant."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    for _ in range(_TRIES):
        move = _random_move(motion, generator)
        if (torch.linalg.solve(move[:, :2], center - move[:, 2]).abs() < 1).all():
            break
    return move


def _random_move(motion: Motion, generator: torch.Generator) -> torch.Tensor:
    angle, x, y, scale, mirrored = torch.rand(5, generator=generator).tolist()
    angle = math.radians(motion.degrees) * (2 * angle - 1)
    x, y = (2 * motion.translate * (2 * shift - 1) for shift in (x, y))
    scale = motion.smallest + (motion.largest - motion.smallest) * scale
    turn = torch.tensor([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]) / scale
    if motion.flip and mirrored < 0.5:
        turn[0] = -turn[0]
    return torch.cat([turn, -turn @ torch.tensor([[x], [y]])], 1)


def _size(picture: torch.Tensor) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"
