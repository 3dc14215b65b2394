"""Heat maps, which show a share between 0 and 1 at each point of a picture as a color on the picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..subjects.masks import ASPECT_TOLERANCE, same_aspect

# From dark blue through violet and orange to pale yellow: brightness rises all the way, so it also reads in gray.
_SCALE = ((0.05, 0.03, 0.30), (0.45, 0.05, 0.55), (0.80, 0.25, 0.40), (0.97, 0.58, 0.20), (0.98, 0.95, 0.65))


def colors(values: torch.Tensor) -> torch.Tensor:
    """Maps values (...) in 0..1 to RGB colors (..., 3) in 0..1."""
    scale = torch.tensor(_SCALE, device=values.device)
    place = values.clamp(0, 1) * (len(_SCALE) - 1)
    below = place.floor().long().clamp(max=len(_SCALE) - 2)
    return torch.lerp(scale[below], scale[below + 1], (place - below)[..., None])


def stretch(maps: torch.Tensor) -> torch.Tensor:
    """Stretches each map (..., h, w) to the full range 0..1; a constant map becomes 0."""
    low = maps.amin(dim=(-2, -1), keepdim=True)
    span = maps.amax(dim=(-2, -1), keepdim=True) - low
    return (maps - low) / span.clamp(min=1e-6)


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes maps (B, h, w) to (B, H, W), bilinearly."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


def overlay(pictures: torch.Tensor, maps: torch.Tensor, opacity: float) -> torch.Tensor:
    """Blends maps (B, H, W), as colors, over grayscale pictures (B, H, W, 3).

    Opacity 0 returns the pictures in color, 1 the maps alone. The result is float, whatever the dtype of the pictures.
    """
    pictures, maps = pictures.float(), maps.float()
    gray = pictures.mean(dim=-1, keepdim=True).expand_as(pictures)
    return torch.lerp(gray if opacity > 0 else pictures, colors(maps), opacity)


def share_pictures(
    shares: torch.Tensor, pictures: torch.Tensor, opacity: float, stretched: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Heat maps of all subjects on all pictures.

    Args:
        shares: (B, 1 + N, h, w), the picture's own share first, as in `mrsa.subject_shares`.
        pictures: (B, H, W, 3), values 0..1.
        opacity: see `overlay`.
        stretched: whether each map is stretched to the full range.

    Returns:
        Overlays (B * N, H, W, 3) and plain shares (B * N, H, W).

    Raises:
        ValueError: `pictures` and `shares` differ in number or in aspect ratio.
    """
    if len(pictures) != len(shares):
        raise ValueError(f"image: expected the {len(shares)} pictures of the latent, got {len(pictures)}")
    (height, width), (h, w) = pictures.shape[1:3], shares.shape[2:]
    if not same_aspect((height, width), (h, w), max(ASPECT_TOLERANCE, 1 / min(h, w))):
        raise ValueError(f"image: expected the picture of the latent, in the shape {w}x{h}, got {width}x{height}")
    n_subjects = shares.shape[1] - 1
    maps = resize(shares[:, 1:].flatten(0, 1), (height, width))
    repeated = pictures[..., :3].repeat_interleave(n_subjects, dim=0)
    return overlay(repeated, stretch(maps) if stretched else maps, opacity), maps
