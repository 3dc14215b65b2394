"""Greedy matching of two sets by a table of scores."""

from __future__ import annotations

import numpy as np


def greedy_match(scores: np.ndarray, threshold: float) -> list[tuple[int, int]]:
    """Pairs (row, column) of `scores` (rows, columns), the best first: the largest score of all is taken, its row and
    column are removed, and so on while a score of at least `threshold` is left.

    Of equal scores, the one in the first row is taken, and in that row the one in the first column.

    Raises ValueError if `scores` is not a table of finite numbers.
    """
    left = np.array(scores, dtype=np.float64)
    if left.ndim != 2 or not np.isfinite(left).all():
        raise ValueError(f"scores: expected a table of finite numbers, got shape {left.shape}: {left.tolist()}")
    pairs = []
    for _ in range(min(left.shape)):
        row, column = (int(v) for v in np.unravel_index(left.argmax(), left.shape))
        if left[row, column] < threshold:
            break
        pairs.append((row, column))
        left[row], left[:, column] = -np.inf, -np.inf
    return pairs
