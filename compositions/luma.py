"""Recoloring: the lightness of one picture with the colors of another."""

from __future__ import annotations

import torch

from ..subjects.pictures import in_color
from .color import lab_to_srgb, srgb_to_lab
from .intensity import WEIGHTS, intensity

LAB, LUMA = "CIELab", "Rec. 601"
MODES = (LAB, LUMA)


def luma_merge(light: torch.Tensor, color: torch.Tensor, mode: str = LAB, strength: float = 1.0) -> torch.Tensor:
    """A picture (H, W, 3) with the lightness of `light` and the colors of `color`, both (H, W, C) in [0, 1].

    Args:
        mode: LAB takes L of CIELab; LUMA takes the intensity with Rec. 601's weights, for pictures that were drawn from
            that intensity. Colors outside of sRGB are clipped.
        strength: share of the merged picture in the result; 0 is `color`.

    Raises:
        ValueError: the mode is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    light, color = in_color(light), in_color(color)
    if mode == LUMA:
        weights = WEIGHTS[LUMA]
        merged = (color + (intensity(light, weights) - intensity(color, weights))[..., None]).clamp(0, 1)
    else:
        lab = torch.cat([srgb_to_lab(light.double())[..., :1], srgb_to_lab(color.double())[..., 1:]], -1)
        merged = lab_to_srgb(lab).to(color.dtype)
    return torch.lerp(color, merged, strength)
