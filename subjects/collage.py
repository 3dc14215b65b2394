"""Collage: pastes masked subjects onto a context picture, to make references that show them in use.

FreeCustom (arXiv 2405.13870, section 3.4) finds that references with context interaction, such as a hat being worn,
give far better results than isolated subjects, and that simple pasting is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .masks import binarize, bounding_box, check_aspect, feather
from .subject import Subject, describe


class Box(NamedTuple):
    """A rectangle in pixels of the context picture; it may extend beyond the picture's edges."""

    x: float
    y: float
    width: float
    height: float


def place(
    context: torch.Tensor, subjects: Sequence[Subject], placement, prompt: str = "", threshold: float = 0.5, **style
) -> tuple[torch.Tensor, torch.Tensor, tuple[Subject, ...]]:
    """Pastes subjects and makes the collage their new reference picture.

    Args:
        context: (H, W, 3), values 0..1.
        subjects: from back to front.
        placement: masks (N, h, w), boxes in pixels as {x, y, width, height}, or None for side by side.
        prompt: describes the collage; if empty, the nouns are joined.
        threshold: mask value from which a pixel belongs to a subject or placement.
        style: scale, flip and feather_radius of `paste`.

    Returns:
        The collage (H, W, 3), the visible part of each subject (N, H, W), and the subjects with it as reference.

    Raises:
        ValueError: there is no subject, the number of placements is wrong, a placement mask differs from the context in
            aspect ratio, or no part of a subject is visible.
    """
    if not subjects:
        raise ValueError("subjects: expected at least one, got none")
    height, width = context.shape[:2]
    if placement is None:
        boxes = row_of_boxes(len(subjects), height, width)
    elif torch.is_tensor(placement):
        masks = placement.reshape(-1, *placement.shape[-2:])
        for number, mask in enumerate(masks, 1):
            check_aspect(mask, (height, width), f"placement: mask {number}")
        boxes = [_box_of(mask, threshold, height, width) for mask in masks]
    else:
        boxes = [Box(*(float(box[side]) for side in Box._fields)) for box in flat_boxes(placement)]
    cutouts = [(subject.image, subject.mask) for subject in subjects]
    picture, masks = paste(context, cutouts, boxes, threshold=threshold, **style)
    for subject, mask in zip(subjects, masks, strict=True):
        if not mask.any():
            raise ValueError(
                f'placement: expected a place where "{subject.noun}" is seen, got one outside the context or behind '
                "other subjects"
            )
    prompt = prompt.strip() or " and ".join(describe(subject.noun) for subject in subjects)
    placed = (
        replace(subject, image=picture, mask=mask, prompt=prompt) for subject, mask in zip(subjects, masks, strict=True)
    )
    return picture, masks, tuple(placed)


def _box_of(mask: torch.Tensor, threshold: float, height: int, width: int) -> Box:
    """The bounding box of a mask, in pixels of a picture of size (height, width)."""
    down, across = height / mask.shape[0], width / mask.shape[1]
    x, y, w, h = bounding_box(binarize(mask, threshold))
    return Box(x * across, y * down, w * across, h * down)


def flat_boxes(boxes) -> list[dict]:
    """Flattens a box, a list of boxes, or lists of boxes per picture, as ComfyUI passes them, into one list."""
    if isinstance(boxes, dict):
        return [boxes]
    return [box for entry in boxes for box in flat_boxes(entry)]


def row_of_boxes(count: int, height: int, width: int) -> list[Box]:
    """Equal boxes side by side, for subjects without a placement."""
    step = width / count
    return [Box(i * step, 0, step, height) for i in range(count)]


def paste(
    context: torch.Tensor,
    subjects: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    boxes: Sequence[Box],
    scale: float = 1.0,
    flip: bool = False,
    feather_radius: float = 0.0,
    threshold: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pastes each subject, cut out along its mask and fitted into its box, in order from back to front.

    Args:
        context: (H, W, 3), values 0..1.
        subjects: pictures (h, w, 3), each with its mask (h', w') or None for the whole picture.
        boxes: one per subject; the subject keeps its proportions and is centered in its box.
        scale: size relative to the largest that fits into the box.
        flip: mirrors the subjects left to right.
        feather_radius: width of the soft edge in pixels of the context.
        threshold: mask value from which a pixel belongs to the subject.

    Returns:
        The picture (H, W, 3), float, and the masks (N, H, W) of the visible part of each subject.

    Raises:
        ValueError: the numbers of subjects and boxes differ, or a mask or box is empty.
    """
    if len(subjects) != len(boxes):
        raise ValueError(f"boxes: expected one per subject, got {len(boxes)} for {len(subjects)} subjects")
    # Antialiased resizing does not support half precision.
    picture = context.float().clone()
    seen = torch.zeros(len(subjects), *context.shape[:2], device=context.device)
    for index, ((image, mask), box) in enumerate(zip(subjects, boxes, strict=True)):
        if box.width <= 0 or box.height <= 0:
            raise ValueError(f"boxes: expected a positive size, got {box.width}x{box.height} for box {index + 1}")
        cutout, alpha = _cut_out(image.to(picture), mask, threshold)
        fit = scale * min(box.width / cutout.shape[1], box.height / cutout.shape[0])
        size = max(1, round(cutout.shape[0] * fit)), max(1, round(cutout.shape[1] * fit))
        cutout = _resize(cutout.movedim(-1, 0), size).movedim(0, -1).clamp(0, 1)
        alpha = _resize(alpha[None].to(picture), size)[0].clamp(0, 1)
        if flip:
            cutout, alpha = cutout.flip(1), alpha.flip(1)
        alpha = feather(alpha, feather_radius)
        top = round(box.y + (box.height - size[0]) / 2)
        left = round(box.x + (box.width - size[1]) / 2)
        rows, columns = _overlap(top, size[0], context.shape[0]), _overlap(left, size[1], context.shape[1])
        inner = alpha[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        colors = cutout[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        picture[rows, columns] = torch.lerp(picture[rows, columns], colors, inner[..., None])
        seen[:, rows, columns] *= 1 - inner
        seen[index, rows, columns] = inner
    return picture, seen


def _cut_out(image: torch.Tensor, mask: torch.Tensor | None, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The picture and its boolean mask, both cropped to the subject."""
    size = tuple(image.shape[:2])
    shape = binarize(mask, threshold, size)
    if tuple(shape.shape) != size:
        shape = F.interpolate(shape[None, None].float(), size=size, mode="nearest")[0, 0] > 0.5
    x, y, width, height = bounding_box(shape)
    return image[y : y + height, x : x + width], shape[y : y + height, x : x + width]


def _resize(planes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resizes planes (C, H, W) with antialiasing."""
    return F.interpolate(planes[None], size=size, mode="bilinear", antialias=True)[0]


def _overlap(start: int, length: int, limit: int) -> slice:
    """The part of [start, start + length) inside [0, limit); empty if there is none."""
    begin = min(max(start, 0), limit)
    return slice(begin, max(begin, min(start + length, limit)))
