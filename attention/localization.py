"""Losses that make cross-attention keep each subject in its place, and noise prediction mind the subjects.

FastComposer (Xiao et al., arXiv 2305.10431), section 4.2 and equation 5, the "balanced L1".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

EPSILON = 1e-5


def spill(attention: torch.Tensor, mask: torch.Tensor, normalize: bool = False) -> torch.Tensor:
    """Mean attention outside a mask minus the mean inside it, -1 (all inside) to 1 (all outside).

    Args:
        attention: (..., pixels), how much each pixel attends to a subject's word.
        mask: (..., pixels), 0..1, where the subject is.
        normalize: divide the attention by its largest value first.

    Returns:
        (...).
    """
    if normalize:
        attention = attention / (attention.amax(-1, keepdim=True) + EPSILON)
    outside = 1 - mask
    return (attention * outside).sum(-1) / (outside.sum(-1) + EPSILON) - (attention * mask).sum(-1) / (
        mask.sum(-1) + EPSILON
    )


def localization_loss(
    maps: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    masks: torch.Tensor,
    present: torch.Tensor,
    normalize: bool = False,
) -> torch.Tensor:
    """The balanced L1 of all subjects, averaged over layers, heads and pictures.

    Args:
        maps: per layer the attention probabilities (n, heads, pixels, text tokens) of a square grid.
        tokens: (n, subjects), index of each subject's word.
        masks: (n, subjects, H, W), 0..1; scaled to each layer's grid with antialiasing.
        present: (n, subjects), true where there is a subject; pictures without one count as 0.
        normalize: see `spill`.

    Raises:
        ValueError: no layer has given a map.
    """
    if not maps:
        raise ValueError("localization loss: expected attention maps, got none from any layer")
    present = present.to(maps[0])
    layers = []
    for probabilities in maps:
        side = math.isqrt(probabilities.shape[2])
        scaled = F.interpolate(masks.to(probabilities), (side, side), mode="bilinear", antialias=True).flatten(2)
        at = tokens[:, None, None].expand(-1, *probabilities.shape[1:3], -1)
        attention = probabilities.gather(-1, at).movedim(-1, 1)
        per_subject = spill(attention, scaled[:, :, None], normalize).mean(-1)
        layers.append(((per_subject * present).sum(1) / (present.sum(1) + EPSILON)).mean())
    return torch.stack(layers).mean()


def masked_noise_loss(
    prediction: torch.Tensor, target: torch.Tensor, masks: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Mean square error of a noise prediction, within the subjects alone where `masked` says so.

    As published the mean is over all elements, so a small subject weighs little and a picture without subjects nothing.

    Args:
        prediction, target: (n, C, h, w).
        masks: (n, subjects, H, W), scaled to the latent without antialiasing.
        masked: (n,), true where only the subjects count.
    """
    union = masks.sum(1, keepdim=True).clamp(max=1).to(prediction)
    union = F.interpolate(union, prediction.shape[-2:], mode="bilinear")
    union = torch.where(masked[:, None, None, None], union, torch.ones_like(union))
    return ((prediction - target) * union).square().mean()
