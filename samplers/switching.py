"""When delayed subject conditioning switches from the plain text to the subjects.

FastComposer (Xiao et al., arXiv 2305.10431), section 4.3: the first steps see the text alone and fix the layout; the
remaining steps, a share alpha of all, see the subjects.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NEAREST = "nearest step"
PUBLISHED_PNDM = "published, PNDM"
PUBLISHED = "published, other samplers"
COUNTINGS = (NEAREST, PUBLISHED_PNDM, PUBLISHED)

_WAY = 0.9  # from the last noise level of the text to the first of the subjects


def first_subject_step(alpha: float, steps: int, counting: str = NEAREST) -> int:
    """The first step, counted from 0, that sees the subjects; `steps` means never.

    The published code compares each scheduler index i with S = (1 - alpha) * steps in floating point and keeps the text
    while i <= S. Its default scheduler, PNDM, calls the model twice at its second timestep, so there the same
    comparison gives an earlier step.

    Args:
        alpha: share of the steps that see the subjects, 0..1.
        steps: number of sampling steps.
        counting: NEAREST rounds (1 - alpha) * steps; PUBLISHED_PNDM and PUBLISHED reproduce the published code.
    """
    boundary = (1 - alpha) * steps
    if counting == PUBLISHED:
        return min(steps, math.floor(boundary) + 1)
    if counting == PUBLISHED_PNDM:
        return max(1, math.floor(boundary))
    return math.floor(boundary + 0.5)


def boundary_sigma(sigmas: Sequence[float], step: int) -> float:
    """A noise level that separates all evaluations of the steps before `step` from those at and after it.

    It is nine tenths of the way down on a logarithmic scale: samplers that look ahead within a step (DPM-2 exactly
    halfway) stay above it, and rounding of the next level does not reach it.

    Args:
        sigmas: the falling schedule, with one more level than there are steps.
        step: from 1 to the number of steps minus 1.
    """
    return sigmas[step - 1] ** (1 - _WAY) * sigmas[step] ** _WAY
