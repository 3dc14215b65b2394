"""Pictures at other sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def fit(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes a picture (H, W, 3) to (h, w, 3) with antialiasing."""
    planes = image.movedim(-1, 0)[None].float()
    if tuple(planes.shape[-2:]) != size:
        planes = F.interpolate(planes, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    return planes[0].movedim(0, -1)


def cover(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Crops the center of a picture (H, W, 3) to the aspect ratio of `size`, and resizes it to (h, w, 3)."""
    height, width = image.shape[:2]
    scale = min(height / size[0], width / size[1])
    h, w = round(size[0] * scale), round(size[1] * scale)
    top, left = (height - h) // 2, (width - w) // 2
    return fit(image[top : top + h, left : left + w], size)
