"""Losses that keep each subject's cross-attention in its place and weight noise prediction by the subjects.

FastComposer (Xiao et al., arXiv 2305.10431), section 4.2 and equation 5, the "balanced L1".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

EPSILON = 1e-5


def antialiased(masks: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes masks (n, subjects, H, W) to (n, subjects, side, side), as published."""
    return F.interpolate(masks, (side, side), mode="bilinear", antialias=True)


def mean_of_pictures(present: torch.Tensor) -> torch.Tensor:
    """The published weights (n, subjects): the mean over each picture's subjects, then over all pictures, where a
    picture without subjects counts as 0.

    Args:
        present: (n, subjects), 1 where there is a subject.
    """
    return present / (present.sum(1, keepdim=True) + EPSILON) / len(present)


def localization_loss(
    maps: Sequence[torch.Tensor],
    tokens: torch.Tensor,
    masks: torch.Tensor,
    weights: torch.Tensor,
    resize: Callable[[torch.Tensor, int], torch.Tensor] = antialiased,
) -> torch.Tensor:
    """Mean attention to each subject's tokens outside its mask minus the mean inside, from -1 (all inside) to 1 (all
    outside); summed over subjects with `weights` and averaged over layers.

    Computed in the dtype of the maps, even under autocast.

    Args:
        maps: per layer, attention probabilities (n, pixels, text tokens) on a square grid, averaged over heads.
        tokens: (n, subjects, text tokens), 1 at the tokens of each subject.
        masks: (n, subjects, H, W), 0..1, where each subject is.
        weights: (n, subjects), weight of each subject, 0 where there is none; see `mean_of_pictures`.
        resize: (masks, side) -> masks at the size of a layer's grid.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: `maps` is empty.
    """
    if not maps:
        raise ValueError("localization loss: expected attention maps, got none from any layer")
    tokens, masks, weights = (tensor.to(maps[0]) for tensor in (tokens, masks, weights))
    balances: dict[int, torch.Tensor] = {}
    total = torch.zeros((), dtype=maps[0].dtype, device=maps[0].device)
    with torch.autocast(maps[0].device.type, enabled=False):
        for probabilities in maps:
            side = math.isqrt(probabilities.shape[1])
            if side not in balances:
                inside = resize(masks, side).flatten(2)
                balances[side] = _mean_over(1 - inside) - _mean_over(inside)
            attention = torch.einsum("npt,nkt->nkp", probabilities, tokens)
            total = total + ((attention * balances[side]).sum(2) * weights).sum()
    return total / len(maps)


def _mean_over(mask: torch.Tensor) -> torch.Tensor:
    """Weight of each pixel in the mean over a mask (..., pixels)."""
    return mask / (mask.sum(-1, keepdim=True) + EPSILON)


def masked_noise_loss(
    prediction: torch.Tensor, target: torch.Tensor, masks: torch.Tensor, masked: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of a noise prediction, limited to the subjects where `masked` is true.

    As published, the mean is over all elements, so small subjects weigh little and a masked picture without subjects
    weighs nothing.

    Args:
        prediction, target: (n, C, h, w).
        masks: (n, subjects, H, W), resized to the latent without antialiasing.
        masked: (n,) boolean, true where only the subjects count.
    """
    union = masks.sum(1, keepdim=True).clamp(max=1).to(prediction)
    union = F.interpolate(union, prediction.shape[-2:], mode="bilinear")
    union = torch.where(masked[:, None, None, None], union, torch.ones_like(union))
    return ((prediction - target) * union).square().mean()
