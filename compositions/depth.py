"""Depth: near is 1 and far is 0, whatever network measured it."""

from __future__ import annotations

import torch

_LEAST_RANGE = 1e-6
_CUT = 0.01
"""Share of the pixels at both ends that do not decide the range."""


def normalized_depth(depth: torch.Tensor, metric: bool = False) -> torch.Tensor:
    """A depth map (H, W) in [0, 1], 1 where it is near. A constant map becomes 0.

    Args:
        depth: inverse depth in any unit, larger where it is near.
        metric: it is a distance instead, larger where it is far.

    Raises:
        ValueError: it has no finite value, or distances that are not positive.
    """
    depth = depth.float()
    finite = depth[torch.isfinite(depth)]
    if not len(finite):
        raise ValueError("depth: expected finite values, got none")
    if metric:
        if finite.min() <= 0:
            raise ValueError(f"depth: expected distances above 0, got {float(finite.min()):g}")
        depth, finite = 1 / depth, 1 / finite
    ordered = finite.sort().values
    low, high = (float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) for q in (_CUT, 1 - _CUT))
    if high - low < _LEAST_RANGE:
        # A small thing in front of one that is flat is no outlier.
        low, high = float(ordered[0]), float(ordered[-1])
    if high - low < _LEAST_RANGE:
        return torch.zeros_like(depth)
    return ((torch.nan_to_num(depth, low, high, low) - low) / (high - low)).clamp(0, 1)
