"""Intensity: a picture in gray. Composer draws the weights of red, green and blue from a set that is not published; the
set here is the project's own."""

from __future__ import annotations

import torch

from ..subjects.pictures import in_color

WEIGHTS = {
    "Rec. 601": (0.299, 0.587, 0.114),
    "Rec. 709": (0.2126, 0.7152, 0.0722),
    "mean": (1 / 3, 1 / 3, 1 / 3),
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "red and green": (0.5, 0.5, 0.0),
    "green and blue": (0.0, 0.5, 0.5),
    "red and blue": (0.5, 0.0, 0.5),
}
"""Weights by name; each sums to 1. Training draws one of them for each picture."""
DEFAULT_WEIGHTS = "Rec. 601"


def intensity(image: torch.Tensor, weights: tuple[float, float, float] = WEIGHTS[DEFAULT_WEIGHTS]) -> torch.Tensor:
    """The intensity (..., H, W) of pictures (..., H, W, 3): their gamma-encoded values, weighted.

    Raises:
        ValueError: the weights are negative or sum to 0.
    """
    total = sum(weights)
    if min(weights) < 0 or total <= 0:
        raise ValueError(f"weights: expected numbers from 0 on, some of them above, got {weights}")
    return in_color(image) @ image.new_tensor([weight / total for weight in weights])
