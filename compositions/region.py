"""Masking: the part of a picture that stays, and the mask of what is to be drawn anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

HOLE = 0.5
"""Gray level of a hole, which is 0 where pictures are in [-1, 1]."""


@dataclass(frozen=True, eq=False)
class Region:
    """Attributes:
        image: (H, W, 3), in [0, 1].
        mask: (H, W), 1 where it is to be drawn anew and 0 elsewhere.

    Raises:
        ValueError: the sizes differ, or the mask covers nothing or everything.
    """

    image: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self):
        if self.mask.shape != self.image.shape[:2]:
            size, given = (" x ".join(map(str, (one.shape[1], one.shape[0]))) for one in (self.image, self.mask))
            raise ValueError(f"mask: expected the picture's size {size}, got {given}")
        drawn = self.mask > 0.5
        if drawn.all() or not drawn.any():
            what = "everything: leave the mask out" if drawn.all() else "nothing: paint what is to be drawn anew"
            raise ValueError(f"mask: expected white on a part of the picture, got one that covers {what}")
        object.__setattr__(self, "mask", drawn.float())

    @property
    def shown(self) -> torch.Tensor:
        """The picture (H, W, 3) with a gray hole."""
        return torch.where(self.mask[..., None] > 0, torch.full_like(self.image, HOLE), self.image)


def grown(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    """A binary mask (H, W) that reaches further by `pixels` (or less far, if negative) in all directions."""
    binary = (mask > 0.5).float()[None, None]
    if not pixels:
        return binary[0, 0]
    # What is outside of the picture never counts: a mask that shrinks does not leave the border.
    grown_ = _spread(binary if pixels > 0 else 1 - binary, abs(pixels))[0, 0]
    return grown_ if pixels > 0 else 1 - grown_


def _spread(planes: torch.Tensor, reach: int) -> torch.Tensor:
    """The largest value within a square of 2 reach + 1 around each place of (1, 1, H, W), along one axis at a time."""
    side = 2 * reach + 1
    return F.max_pool2d(F.max_pool2d(planes, (side, 1), 1, (reach, 0)), (1, side), 1, (0, reach))
