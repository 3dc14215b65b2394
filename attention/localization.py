"""Losses that make cross-attention keep each subject in its place, and noise prediction mind the subjects.

FastComposer (Xiao et al., arXiv 2305.10431), section 4.2 and equation 5, the "balanced L1".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

EPSILON = 1e-5


def antialiased(masks: torch.Tensor, side: int) -> torch.Tensor:
    """Masks (n, subjects, H, W) at the size (side, side), as published."""
    return F.interpolate(masks, (side, side), mode="bilinear", antialias=True)


def mean_of_pictures(present: torch.Tensor) -> torch.Tensor:
    """The published weights (n, subjects): the mean over each picture's subjects, and of these over all pictures, where
    one without subjects counts as 0.

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
    """The weighted sum over subjects of the mean attention to their tokens outside their mask minus the mean inside,
    which is from -1 (all inside) to 1 (all outside); averaged over layers. In full precision, also under autocast.

    Args:
        maps: per layer the attention probabilities (n, pixels, text tokens) of a square grid, averaged over heads.
        tokens: (n, subjects, text tokens), 1 at the tokens of each subject.
        masks: (n, subjects, H, W), 0..1, where each subject is.
        weights: (n, subjects), what each subject counts; 0 where there is none. See `mean_of_pictures`.
        resize: gives the masks at the size of a layer's grid.

    Raises:
        ValueError: no layer has given a map.
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
    """What each pixel counts in a mean over a mask (..., pixels)."""
    return mask / (mask.sum(-1, keepdim=True) + EPSILON)


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
