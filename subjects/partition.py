"""Partition of the picture among concepts (Concept Weaver, arXiv 2404.03913): one weight map per concept and one for
the background, which add up to 1 at every pixel, and so at every token of every layer.

A partition is (N + 1, H, W): N concepts in the order of their masks, and the background last. A detector's mask ends at
the object it found, but a concept needs room for a shape of its own, so masks are dilated; where dilated masks overlap,
the original masks decide. With M_i the mask, D_i its dilation and S = {i: D_i = 1} at a pixel:

- one concept in S: the pixel belongs to it;
- several: those with M_i = 1 claim the pixel and the frontmost of them gets it; without a claim it is background;
- none: it is background.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations

import torch
import torch.nn.functional as F

from .instances import SAME
from .instances import overlap as shared_part
from .masks import as_mask, binarize, check_aspect, same_aspect

SMALLER_IN_FRONT, SURER_IN_FRONT, LATER_IN_FRONT = "smaller in front", "higher score in front", "later in front"
OVERLAPS = (SMALLER_IN_FRONT, SURER_IN_FRONT, LATER_IN_FRONT)
THRESHOLD = 0.5

_DISK, _FINEST = 24, 2048
"""Masks are dilated in cells of radius // _DISK or shorter side // _FINEST pixels, whichever is more (at least 1)."""
_BLEND, _FINEST_BLEND = 16, 1024
"""The same for blending."""
_SEEN = 512
"""Most pixels of a preview's longer side."""
_COMPARED = 512
"""Masks are compared at a stride that leaves at least this many pixels of the shorter side, if it has that many."""

_GOLDEN_RATIO = (1 + 5**0.5) / 2


@dataclass(frozen=True, eq=False)
class Partition:
    """The weights of concepts, and the nouns that their masks were found by.

    Attributes:
        weights: (N + 1, H, W), the background last; the sum is 1 at every pixel.
        names: the N nouns; empty if unknown.

    Raises:
        ValueError: there are names, but not one per mask.
    """

    weights: torch.Tensor
    names: tuple[str, ...] = ()

    def __post_init__(self):
        if self.names and len(self.names) != len(self):
            raise ValueError(
                f"detections: expected one per mask, got {len(self.names)} for {len(self)} masks; remove the wire "
                "where masks come from elsewhere too"
            )

    def __len__(self) -> int:
        return len(self.weights) - 1


def assemble(
    masks: Sequence[torch.Tensor],
    dilation: float = 0.03,
    feather: float = 0.0,
    overlap: str = SMALLER_IN_FRONT,
    scores: Sequence[float] | None = None,
) -> torch.Tensor:
    """The partition (N + 1, H, W) of N masks, at the size of the largest.

    Args:
        masks: (H', W') each, 1 on the concept; a concept with an empty mask gets no pixel, but not all may be empty.
        dilation: how far masks are dilated, as a share of the picture's shorter side.
        feather: width over which neighbors blend, as a share of the same side.
        overlap: one of OVERLAPS, which concept is in front.
        scores: the detector's score of each mask; only needed for SURER_IN_FRONT.

    Raises:
        ValueError: there is no mask, all are empty, one is not a mask or has another aspect ratio, two show the same
            object, `overlap` is unknown, or the scores it needs are missing or not one per mask.
    """
    stack = _stack(masks)
    if not stack.any():
        raise ValueError(
            f"masks: expected white in at least one, got {len(stack)} black all over, so that no concept would "
            "be drawn; paint the place of a concept, or let Text to Masks stop where a thing is absent"
        )
    every = max(1, min(stack.shape[1:]) // _COMPARED)
    sparse = stack[:, ::every, ::every].contiguous()
    for i, j in combinations(range(len(stack)), 2):
        if shared_part(sparse[i], sparse[j]) > SAME:
            raise ValueError(
                f"mask {j + 1}: expected a place of its own, got that of mask {i + 1}, which would leave nothing to "
                "one of them; Text to Masks tells things of one kind apart by numbers such as dog#1"
            )
    if overlap not in OVERLAPS:
        raise ValueError(f"overlap: expected one of {', '.join(OVERLAPS)}, got {overlap!r}")
    side = min(stack.shape[1:])
    return soften(divide(stack, round(dilation * side), overlap, scores), round(feather * side))


def divide(
    masks: torch.Tensor, radius: int, overlap: str = SMALLER_IN_FRONT, scores: Sequence[float] | None = None
) -> torch.Tensor:
    """The partition (N + 1, H, W), of zeros and ones, of boolean masks (N, H, W) dilated by `radius` pixels.

    Args:
        overlap, scores: as in `assemble`; of masks with equal area or score, the later one is in front.

    Raises:
        ValueError: the scores that `overlap` needs are missing or not one per mask.
    """
    if overlap == SURER_IN_FRONT and (scores is None or len(scores) != len(masks)):
        given = "none" if scores is None else len(scores)
        raise ValueError(f"detections: expected one per mask for {overlap!r}, got {given} for {len(masks)} masks")
    reach = dilate(masks, radius)
    reached, contested, taken = torch.zeros((3, *masks.shape[1:]), dtype=torch.bool, device=masks.device)
    for grown in reach:
        contested |= reached & grown
        reached |= grown
    free = reached & ~contested
    partition = torch.empty((len(masks) + 1, *masks.shape[1:]), device=masks.device)
    for i in _front_to_back(masks, overlap, scores or ()):
        claimed = (masks[i] | (reach[i] & free)) & ~taken
        partition[i] = claimed
        taken |= claimed
    partition[-1] = ~taken
    return partition


def dilate(masks: torch.Tensor, radius: int) -> torch.Tensor:
    """Boolean masks (N, H, W) dilated by the disk dx^2 + dy^2 <= radius^2; radius 0 returns them.

    For each pixel, the distance to the nearest true pixel of its row gives the number of rows above and below that a
    disk around that true pixel covers in this column. The result is true where such a span reaches, which a running
    maximum down the columns and a running minimum up the columns find.

    For large radii and large pictures, masks are dilated in cells of several pixels. The error is at most one and a
    half cells, less than a cell of a latent, and the time stays proportional to the number of pixels.
    """
    cell = max(1, radius // _DISK, min(masks.shape[1:]) // _FINEST)
    if radius and cell > 1:
        coarse = dilate(_any_in_cells(masks, cell), max(1, round(radius / cell)))
        height, width = masks.shape[1:]
        wide = coarse.repeat_interleave(cell, 2)[:, :, None, :width]
        return masks | wide.expand(-1, -1, cell, -1).flatten(1, 2)[:, :height]
    if not radius:
        return masks
    height, width = masks.shape[1:]
    columns = torch.arange(width, dtype=torch.float32, device=masks.device)
    left = torch.where(masks, columns, -torch.inf).cummax(-1).values
    right = torch.where(masks, columns, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    squares = radius**2 - torch.minimum(columns - left, right - columns).square()
    span = torch.where(squares >= 0, squares.clamp(min=0).sqrt().floor(), -torch.inf)
    rows = torch.arange(height, dtype=torch.float32, device=masks.device)[:, None]
    from_above = (rows + span).cummax(1).values >= rows
    return from_above | ((rows - span).flip(1).cummin(1).values.flip(1) <= rows)


def soften(partition: torch.Tensor, radius: int) -> torch.Tensor:
    """Blends neighbors of a partition (N + 1, H, W) within `radius` pixels of their border; radius 0 returns it.

    Applies two moving averages in turn, the same to all maps and only over pixels of the picture, so that the sum stays
    1 up to its edge. For large radii and large pictures, they are computed on the means of cells of several pixels, and
    the result is interpolated.
    """
    if not radius:
        return partition
    height, width = partition.shape[1:]
    cell = max(1, radius // _BLEND, min(height, width) // _FINEST_BLEND)
    # The last cells may hold fewer pixels.
    maps = F.avg_pool2d(partition[None], cell, ceil_mode=True) if cell > 1 else partition[None]
    reach = round(radius / cell)
    for half in (reach // 2, reach - reach // 2):
        for kernel, padding in (((1, 2 * half + 1), (0, half)), ((2 * half + 1, 1), (half, 0))):
            if half:
                maps = F.avg_pool2d(maps, kernel, 1, padding, count_include_pad=False)
    maps = _normalized(maps[0])
    if cell > 1:
        maps = F.interpolate(maps[None], scale_factor=cell, mode="bilinear")[0, :, :height, :width]
    return maps


def layer_masks(partition: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A partition (N + 1, H, W) averaged over the cells of a layer's token grid (h, w): (N + 1, h, w)."""
    return _normalized(F.adaptive_avg_pool2d(partition, grid))


def picture(partition: torch.Tensor, image: torch.Tensor | None = None) -> torch.Tensor:
    """A preview (h, w, 3) of a partition (N + 1, H, W): one color per concept over a dark gray background, or over an
    image (H', W', 3) in grayscale. Large partitions are reduced.

    Raises:
        ValueError: image and partition differ in aspect ratio.
    """
    size = tuple(partition.shape[1:])
    if image is not None and not same_aspect(tuple(image.shape[:2]), size):
        given, expected = (f"{width}x{height}" for height, width in (image.shape[:2], size))
        raise ValueError(f"image: expected the shape of the masks ({expected}), got {given}")
    small = _to_look_at(partition).cpu()
    colors = torch.stack([_color(i) for i in range(len(small) - 1)])
    colored, background = torch.einsum("nhw,nc->hwc", small[:-1], colors), small[-1, ..., None]
    if image is None:
        return colored + 0.15 * background
    gray = _to_look_at(image.movedim(-1, 0)[:3]).cpu().float().mean(0)[None, None]
    gray = F.interpolate(gray, small.shape[1:], mode="bilinear", antialias=True)[0, 0, :, :, None].clamp(0, 1)
    return (0.25 + 0.75 * gray) * colored + 0.7 * gray * background


def _stack(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Boolean masks (N, H, W) at the size of the largest."""
    if len(masks) == 0:
        raise ValueError("masks: expected at least one, got none")
    single = [as_mask(mask, f"mask {number}") for number, mask in enumerate(masks, 1)]
    # ComfyUI returns small empty squares for pictures without alpha; they say nothing about the picture's shape.
    largest = single[0]
    if any(mask.shape != largest.shape for mask in single):
        largest = max(single, key=lambda mask: (bool(mask.any()), mask.numel()))
    for number, mask in enumerate(single, 1):
        try:
            check_aspect(mask, tuple(largest.shape))
        except ValueError as error:
            (height, width), (h, w) = largest.shape, mask.shape
            raise ValueError(
                f"mask {number}: expected the shape of the largest mask ({width}x{height}), got {w}x{h}"
            ) from error
    return torch.stack([_resize(binarize(mask, THRESHOLD), tuple(largest.shape)) for mask in single])


def _resize(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resizes a boolean mask (H', W') to `size` (H, W)."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return F.interpolate(mask[None, None].to(torch.uint8), tuple(size), mode="nearest")[0, 0].bool()


def _to_look_at(planes: torch.Tensor) -> torch.Tensor:
    """Reduces planes (C, H, W) to the size of a preview."""
    cell = math.ceil(max(planes.shape[1:]) / _SEEN)
    return F.avg_pool2d(planes[None].float(), cell, ceil_mode=True)[0] if cell > 1 else planes


def _front_to_back(masks: torch.Tensor, overlap: str, scores: Sequence[float]) -> list[int]:
    """The indices of the masks, from front to back; of equal ones the later is in front."""
    measure: Sequence[float] = range(len(masks))
    if overlap == SURER_IN_FRONT:
        measure = scores
    elif overlap == SMALLER_IN_FRONT:
        measure = [-int(mask.count_nonzero()) for mask in masks]
    return sorted(range(len(masks)), key=lambda i: (measure[i], i), reverse=True)


def _any_in_cells(masks: torch.Tensor, cell: int) -> torch.Tensor:
    """Boolean masks (N, ceil(H / cell), ceil(W / cell)): true where any pixel of a cell is true."""
    height, width = masks.shape[1:]
    padded = F.pad(masks, (0, -width % cell, 0, -height % cell))
    rows = reduce(torch.logical_or, (padded[:, i::cell] for i in range(cell)))
    return reduce(torch.logical_or, (rows[:, :, i::cell] for i in range(cell)))


def _normalized(partition: torch.Tensor) -> torch.Tensor:
    """Restores the sum of 1 after rounding errors."""
    return partition / partition.sum(0, keepdim=True)


def _color(index: int) -> torch.Tensor:
    """(3,): hues a golden ratio apart stay distinct however many there are."""
    phase = 2 * math.pi * index / _GOLDEN_RATIO
    return torch.tensor([0.5 + 0.45 * math.cos(phase - third * 2 * math.pi / 3) for third in range(3)])
