"""Pictures and sketches at other sizes, and with three channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def in_color(images: torch.Tensor) -> torch.Tensor:
    """Pictures (..., H, W, C) with three channels: one becomes three, and what follows the third is dropped."""
    return images.expand(*images.shape[:-1], 3) if images.shape[-1] == 1 else images[..., :3]


def middle_square(picture: torch.Tensor) -> torch.Tensor:
    """The middle (S, S, ...) of a picture or mask (H, W, ...), where S is its shorter side."""
    edge = min(picture.shape[:2])
    top, left = (picture.shape[0] - edge) // 2, (picture.shape[1] - edge) // 2
    return picture[top : top + edge, left : left + edge]


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


def resized_strokes(sketches: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Sketches (n, 1, H, W) at another size. Sides that become half as long or less keep the brightest of what becomes
    a pixel: a mean makes thin strokes gray, which adapters take for none."""
    pooled = tuple(new if 2 * new <= old else old for new, old in zip(size, sketches.shape[2:], strict=True))
    sketches = F.adaptive_max_pool2d(sketches, pooled)
    return F.interpolate(sketches, size, mode="bilinear", antialias=True).clamp(0, 1)
