"""How well a picture obeys the representations that it was composed of: pure functions of pictures and readings.

All are 1 for a picture that obeys fully, and smaller otherwise, so that one column can be read beside another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..compositions.composition import (
    CAPTION,
    DEPTH,
    INSTANCES,
    INTENSITY,
    MASK,
    PALETTE,
    SEMANTICS,
    SKETCH,
)
from ..compositions.instance_map import InstanceMap
from ..compositions.intensity import intensity as intensity_of
from ..compositions.palette import Palette, palette_of_picture
from ..compositions.region import Region
from ..compositions.semantics import Semantics
from ..compositions.sketch import contours
from ..shapeland.judge import Reading
from ..shapeland.score import score_picture
from ..shapeland.world import NOUNS, Mention

TOLERANCE = 2
"""Pixels by which strokes may be apart."""
METRICS = (CAPTION, SEMANTICS, PALETTE, SKETCH, INSTANCES, DEPTH, INTENSITY, MASK)
VARIETY = "variety"
RANGES = {name: (0.0, 1.0) for name in METRICS} | {SEMANTICS: (-1.0, 1.0), INTENSITY: (-1.0, 1.0), VARIETY: (0.0, 2.0)}


def variety(looks: Sequence[Semantics]) -> float:
    """How unlike each other pictures of one prompt are: 1 minus the mean cosine of the embeddings of any two."""
    embeddings = F.normalize(torch.stack([look.embedding for look in looks]), dim=-1)
    count = len(embeddings)
    return 1 - float(((embeddings @ embeddings.T).sum() - count) / (count * (count - 1))) if count > 1 else 0.0


def palette(picture: torch.Tensor, target: Palette) -> float:
    """1 minus half the sum of absolute differences of the two palettes; 0 where they share nothing."""
    return 1 - palette_of_picture(picture, None, target.table, target.sigma).distance(target) / 2


def sketch(picture: torch.Tensor, target: torch.Tensor) -> float:
    """F1 of the contours of a picture (H, W, 3) against a sketch (H, W), with a tolerance."""
    found, wanted = contours(picture) > 0.5, target > 0.5
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    precision = float(_near(wanted)[found].float().mean())
    recall = float(_near(found)[wanted].float().mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _near(strokes: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(strokes.float()[None, None], 2 * TOLERANCE + 1, 1, TOLERANCE)[0, 0] > 0


def instances(readings: Sequence[Reading], target: InstanceMap) -> float:
    """Mean over the map's things of the best overlap (intersection over union) with a thing of the same noun."""
    overlaps = []
    for number, name in enumerate(target.names):
        wanted = target.mask(number) > 0
        same = [reading.mask.cpu() for reading in readings if NOUNS[reading.noun] == name]
        overlaps.append(max((_overlap(mask, wanted) for mask in same), default=0.0))
    return sum(overlaps) / len(overlaps) if overlaps else 1.0


def depth(readings: Sequence[Reading], target: torch.Tensor) -> float:
    """Overlap of all things of a picture with what is near in a depth map (H, W), whose background is 0."""
    covered = torch.zeros_like(target, dtype=torch.bool)
    for reading in readings:
        covered |= reading.mask.cpu()
    return _overlap(covered, target > 0.1)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    union = float((a | b).sum())
    return float((a & b).sum()) / union if union else 1.0


def intensity(picture: torch.Tensor, target: torch.Tensor) -> float:
    """Correlation between the intensity of a picture (H, W, 3) and a target (H, W)."""
    a, b = (one - one.mean() for one in (intensity_of(picture), target))
    scale = float(a.norm() * b.norm())
    return float((a * b).sum()) / scale if scale else 0.0


def semantics(found: Semantics, target: Semantics) -> float:
    """Cosine of the two image embeddings."""
    return float(found.embedding @ target.embedding)


def mask(picture: torch.Tensor, target: Region) -> float:
    """1 minus the mean absolute difference of what a picture was to keep."""
    kept = target.mask == 0
    return 1 - float((picture - target.image)[kept].abs().mean())


def caption(readings: Sequence[Reading], mentions: Sequence[Mention]) -> float:
    """1 if every noun appears as often as asked for and no other does, else 0."""
    return float(score_picture(list(mentions), list(readings)).nouns_right)
