"""Preprocessing of pictures for CLIP's vision tower."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOR = tuple(round(255 * channel) for channel in MEAN)
"""CLIP's mean in 256 levels: a pixel of this color is almost zero after `normalize`."""


def normalize(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (..., 3, H, W) in [0, 1], minus CLIP's mean and divided by its standard deviation."""
    mean, std = (pictures.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return (pictures - mean) / std


def square(image: torch.Tensor, side: int) -> torch.Tensor:
    """The whole picture on a black square, scaled to `side` and rounded to 256 levels.

    FastComposer's published code pads both ends of the shorter edge by half the difference, rounded down, so that a
    picture with an odd difference is squeezed by one pixel.

    Args:
        image: (H, W, 3), values 0..1.
        side: side of the result, in pixels.

    Returns:
        (side, side, 3), values 0..1.
    """
    height, width = image.shape[:2]
    pad = abs(height - width) // 2
    pads = (pad, pad, 0, 0) if height > width else (0, 0, pad, pad)
    padded = F.pad(image.movedim(-1, 0)[None].float(), pads)
    scaled = F.interpolate(padded, (side, side), mode="bilinear", antialias=True)
    return (scaled * 255).round().clamp(0, 255).div(255)[0].movedim(0, -1)
