"""Preprocessing of reference pictures for FastComposer's subject encoder, as in its training."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..subjects.masks import bounding_box
from .clip_pixels import square

KEEP, NOISE, BLACK = "keep", "noise", "black"
BACKGROUNDS = (KEEP, NOISE, BLACK)

_NOISE_SEED = 0  # the same noise every time, so that a picture always has the same embedding


def set_background(image: torch.Tensor, mask: torch.Tensor, background: str) -> torch.Tensor:
    """Replaces everything outside a picture's mask; (H, W, 3).

    Args:
        image: (H, W, 3), values 0..1.
        mask: (H, W), 1 on the subject.
        background: KEEP leaves it, NOISE fills it with uniform noise (as in FastComposer's training), BLACK with black.
    """
    if background == KEEP:
        return image
    outside = torch.zeros_like(image)
    if background == NOISE:
        outside = torch.rand(image.shape, generator=torch.Generator().manual_seed(_NOISE_SEED))
    inside = mask[..., None].clamp(0, 1)
    return image * inside + outside.to(image) * (1 - inside)


def prepare_reference(
    image: torch.Tensor, mask: torch.Tensor | None, side: int, background: str = KEEP, crop: bool = False
) -> torch.Tensor:
    """The subject encoder's input for a subject: (side, side, 3).

    Args:
        image: (H, W, 3), values 0..1.
        mask: (H', W') with the same aspect ratio, 1 on the subject; None uses the whole picture as it is.
        side: the encoder's resolution, in pixels.
        background: see `set_background`.
        crop: whether to cut the picture to the mask's bounding box first, as in training.

    Raises:
        ValueError: the mask is empty, and the background or the crop depends on it.
    """
    if mask is not None and (background != KEEP or crop):
        mask = F.interpolate(mask[None, None].float(), image.shape[:2], mode="bilinear")[0, 0]
        x, y, width, height = bounding_box(mask > 0.5)
        image = set_background(image, mask, background)
        if crop:
            image = image[y : y + height, x : x + width]
    return square(image, side)
