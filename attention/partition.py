"""Partition of the picture among concepts (Concept Weaver, arXiv 2404.03913): one weight map per concept and one for
the background, which add up to 1 at every pixel, and so at every token of every layer.

A partition is (N + 1, H, W): N concepts in the order in which their masks were given, and the background last. A
detector's mask ends at the object it saw, but a concept needs room for a shape of its own, so masks are dilated; where
dilated masks meet, the masks as they were decide. With M_i the mask, D_i its dilation and S = {i: D_i = 1} at a pixel:

- one concept in S has the pixel;
- several: those with M_i = 1 claim it, and of several claims the one in front has it; without a claim it is background;
- none: it is background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F

from .instances import SAME
from .instances import overlap as shared_part
from .masks import as_mask, binarize, check_aspect

SMALLER_IN_FRONT, SURER_IN_FRONT, LATER_IN_FRONT = "smaller in front", "higher score in front", "later in front"
OVERLAPS = (SMALLER_IN_FRONT, SURER_IN_FRONT, LATER_IN_FRONT)
THRESHOLD = 0.5

_GOLDEN_RATIO = (1 + 5**0.5) / 2


def assemble(
    masks: Sequence[torch.Tensor],
    dilation: float = 0.03,
    feather: float = 0.0,
    overlap: str = SMALLER_IN_FRONT,
    scores: Sequence[float] | None = None,
) -> torch.Tensor:
    """The partition (N + 1, H, W) of N masks, at the size of the largest.

    Args:
        masks: (H', W') each, 1 on the concept; an empty one leaves its concept without a pixel.
        dilation: how far masks grow, as a share of the picture's shorter side.
        feather: width over which neighbours blend, as a share of the same.
        overlap: one of OVERLAPS, who is in front.
        scores: of the detector, one per mask; wanted for SURER_IN_FRONT alone.

    Raises:
        ValueError: there is no mask, their shapes differ or are none of masks, two show the same thing, or the scores
            are absent or too few.
    """
    stack = _stack(masks)
    for i, j in combinations(range(len(stack)), 2):
        if shared_part(stack[i], stack[j]) > SAME:
            raise ValueError(
                f"mask {j + 1}: a place of its own is wanted, but mask {i + 1} has the same one, which would leave "
                "nothing to one of them; Text to Masks tells things of one kind apart by numbers such as dog#1"
            )
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap: one of {', '.join(OVERLAPS)} is wanted, not {overlap!r}")
    if overlap == SURER_IN_FRONT and (scores is None or len(scores) != len(stack)):
        given = "none" if scores is None else len(scores)
        raise ValueError(f"scores: one per mask is wanted for {overlap!r}, not {given} for {len(stack)} masks")
    side = min(stack.shape[1:])
    return soften(divide(stack, round(dilation * side), overlap, scores), round(feather * side))


def divide(
    masks: torch.Tensor, radius: int, overlap: str = SMALLER_IN_FRONT, scores: Sequence[float] | None = None
) -> torch.Tensor:
    """The partition (N + 1, H, W), of zeros and ones, of boolean masks (N, H, W) dilated by `radius` pixels.

    Args:
        overlap, scores: as in `assemble`; equals in area or score count as LATER_IN_FRONT.
    """
    reach = dilate(masks, radius)
    claims = torch.where(reach.sum(0) == 1, reach, masks)
    depth = _depth(masks, overlap, scores).to(masks.device)
    front = torch.where(claims, depth[:, None, None], -1).argmax(0)
    owner = torch.where(claims.any(0), front, len(masks))
    return F.one_hot(owner, len(masks) + 1).movedim(-1, 0).float()


def dilate(masks: torch.Tensor, radius: int) -> torch.Tensor:
    """Boolean masks (N, H, W) grown by the disk dx^2 + dy^2 <= radius^2; radius 0 returns them.

    Each row learns how far each pixel is from the row's nearest true one, which makes the disk a comparison per row
    offset instead of a window per pixel.
    """
    height, width = masks.shape[1:]
    nowhere = 2 * width + radius
    columns = torch.arange(width, dtype=torch.int32, device=masks.device)
    left = torch.where(masks, columns, -nowhere).cummax(-1).values
    right = torch.where(masks, columns, nowhere).flip(-1).cummin(-1).values.flip(-1)
    distance = torch.minimum(columns - left, right - columns).square()
    grown = masks.clone()
    for offset in range(min(radius, height - 1) + 1):
        near = distance <= radius**2 - offset**2
        grown[:, offset:] |= near[:, : height - offset]
        grown[:, : height - offset] |= near[:, offset:]
    return grown


def soften(partition: torch.Tensor, radius: int) -> torch.Tensor:
    """Blends neighbours of a partition (N + 1, H, W) within `radius` pixels of their border; radius 0 returns it.

    Two moving averages after each other, the same for all maps and over the pixels of the picture alone, so that the
    sum stays 1 up to its edge.
    """
    for half in (radius // 2, radius - radius // 2):
        for kernel, padding in (((1, 2 * half + 1), (0, half)), ((2 * half + 1, 1), (half, 0))):
            if half:
                partition = F.avg_pool2d(partition[None], kernel, 1, padding, count_include_pad=False)[0]
    return _normalized(partition) if radius else partition


def layer_masks(partition: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The partition (N + 1, H, W) at a layer's token grid (h, w), (N + 1, h, w): the mean of the pixels of a cell."""
    return _normalized(F.adaptive_avg_pool2d(partition, grid))


def picture(partition: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
    """A partition (N + 1, H, W) to look at, (H, W, 3): a colour per concept over the dark grey of the background, or
    over the grey of an image (H', W', 3)."""
    concepts, background = partition[:-1, ..., None].cpu(), partition[-1, ..., None].cpu()
    colours = torch.stack([_colour(i) for i in range(len(concepts))])
    coloured = (concepts * colours[:, None, None]).sum(0)
    if image is None:
        return coloured + 0.15 * background
    grey = image.cpu().float()[..., :3].mean(-1)[None, None]
    grey = F.interpolate(grey, partition.shape[1:], mode="bilinear", antialias=True)[0, 0, :, :, None].clamp(0, 1)
    return (0.25 + 0.75 * grey) * coloured + 0.7 * grey * background


def _stack(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Boolean masks (N, H, W) at the size of the largest."""
    if len(masks) == 0:
        raise ValueError("masks: at least one is wanted, but there is none")
    single = [as_mask(mask, f"mask {number}") for number, mask in enumerate(masks, 1)]
    # The host hands out small empty squares for pictures without alpha; they say nothing of the picture's shape.
    largest = max(single, key=lambda mask: (bool(mask.any()), mask.numel()))
    for number, mask in enumerate(single, 1):
        try:
            check_aspect(mask, tuple(largest.shape))
        except ValueError as error:
            (height, width), (h, w) = largest.shape, mask.shape
            raise ValueError(
                f"mask {number}: the shape of the largest mask ({width}x{height}) is wanted, not {w}x{h}"
            ) from error
    sized = [F.interpolate(mask[None, None], largest.shape, mode="nearest")[0, 0] for mask in single]
    return binarize(torch.stack(sized), THRESHOLD)


def _depth(masks: torch.Tensor, overlap: str, scores: Sequence[float] | None) -> torch.Tensor:
    """(N,) long: of two masks the one with the larger number is in front."""
    if overlap == LATER_IN_FRONT:
        return torch.arange(len(masks))
    by_score = overlap == SURER_IN_FRONT
    measure = torch.tensor(scores, dtype=torch.float64) if by_score else -masks.sum((1, 2)).cpu()
    # Twice: the places in a sorted list of the places in the list.
    return measure.argsort(stable=True).argsort()


def _normalized(partition: torch.Tensor) -> torch.Tensor:
    """Takes back what rounding does to the sum."""
    return partition / partition.sum(0, keepdim=True)


def _colour(index: int) -> torch.Tensor:
    """(3,): hues a golden ratio apart stay distinct however many there are."""
    phase = 2 * math.pi * index / _GOLDEN_RATIO
    return torch.tensor([0.5 + 0.45 * math.cos(phase - third * 2 * math.pi / 3) for third in range(3)])
