"""Color spaces: sRGB, its hue, saturation and value, and CIELab."""

from __future__ import annotations

import torch

WHITE = (0.95047, 1.0, 1.08883)
"""XYZ of the illuminant D65, for an observer of 2 degrees."""
_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_EDGE, _SLOPE, _OFFSET = 216 / 24389, 841 / 108, 4 / 29


def srgb_to_lab(colors: torch.Tensor) -> torch.Tensor:
    """CIELab (..., 3) of sRGB colors (..., 3) in [0, 1]: L in 0..100, a and b about -128..127."""
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors.clamp(min=0) + 0.055) / 1.055) ** 2.4)
    xyz = linear @ colors.new_tensor(_TO_XYZ).mT / colors.new_tensor(WHITE)
    f = torch.where(xyz > _EDGE, xyz.clamp(min=_EDGE) ** (1 / 3), xyz * _SLOPE + _OFFSET)
    x, y, z = f.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def lab_to_srgb(lab: torch.Tensor) -> torch.Tensor:
    """sRGB (..., 3) of CIELab colors (..., 3); those outside of sRGB are clipped to [0, 1]."""
    lightness, a, b = lab.unbind(-1)
    y = (lightness + 16) / 116
    f = torch.stack([y + a / 500, y, y - b / 200], -1)
    xyz = torch.where(f > _EDGE ** (1 / 3), f**3, (f - _OFFSET) / _SLOPE) * lab.new_tensor(WHITE)
    linear = (xyz @ torch.linalg.inv(torch.tensor(_TO_XYZ, dtype=torch.float64)).mT.to(lab)).clamp(0, 1)
    edge = 0.0031308
    return torch.where(linear <= edge, linear * 12.92, 1.055 * linear.clamp(min=edge) ** (1 / 2.4) - 0.055)


def hsv_to_srgb(hsv: torch.Tensor) -> torch.Tensor:
    """sRGB (..., 3) of hue, saturation and value (..., 3), all in 0..1."""
    hue, saturation, value = (part[..., None] for part in hsv.unbind(-1))
    shifts = hsv.new_tensor([5.0, 3.0, 1.0])
    k = (shifts + hue * 6) % 6
    return value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1)
