"""The judge: reads noun, colors, pattern, identity and mask of each thing in a picture.

It is trained on the world's ground truth alone, never on generated pictures, and works in two steps. `Segmenter`
predicts for each pixel which noun it belongs to and where that thing's center is; pixels that vote for the same center
are one thing. `Reader` then looks at each thing alone, with its surroundings blanked out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .world import COLORS, NOUNS, PATTERNS, SIZE

CROP = 40
IDENTITY_NUMBERS = 14
EMBEDDING = 32
_GRID = 3.0
_SAME_CENTER = 6.5
_SMALLEST = 24


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


class Segmenter(nn.Module):
    """Predicts nouns and centers: (n, 3, 64, 64) in [0, 1] -> logits (n, 1 + nouns, 64, 64), offsets (n, 2, 64, 64).

    Offsets are in pixels, (x, y), from the pixel to its thing's center.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.stem = _conv(3, width, 2)
        self.down1 = nn.Sequential(_conv(width, 2 * width, 2), _conv(2 * width, 2 * width))
        self.down2 = nn.Sequential(
            _conv(2 * width, 3 * width, 2), _conv(3 * width, 3 * width), _conv(3 * width, 3 * width)
        )
        self.up1 = _conv(5 * width, 2 * width)
        self.up2 = _conv(3 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, 4 * (1 + len(NOUNS) + 2), 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a = self.stem(2 * x - 1)
        b = self.down1(a)
        c = F.interpolate(self.down2(b), scale_factor=2)
        c = F.interpolate(self.up1(torch.cat((b, c), 1)), scale_factor=2)
        out = F.pixel_shuffle(self.head(self.up2(torch.cat((a, c), 1))), 2)
        return out[:, :-2], out[:, -2:] * 10


class Reader(nn.Module):
    """Describes one thing on a blank background: (n, 4, CROP, CROP), masked RGB in [0, 1] and mask -> logits and
    numbers by name: noun, color, second, pattern, identity (the world's vector) and embedding (unit length)."""

    SIZES = {
        "noun": len(NOUNS), "color": len(COLORS), "second": len(COLORS), "pattern": len(PATTERNS),
        "identity": IDENTITY_NUMBERS, "embedding": EMBEDDING,
    }  # fmt: skip

    def __init__(self, width: int = 32):
        super().__init__()
        self.body = nn.Sequential(
            _conv(4, width), _conv(width, 2 * width, 2), _conv(2 * width, 2 * width), _conv(2 * width, 3 * width, 2),
            _conv(3 * width, 3 * width), _conv(3 * width, 4 * width, 2), _conv(4 * width, 4 * width),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(8 * width, 256), nn.SiLU(), nn.Linear(256, sum(self.SIZES.values())))

    def forward(self, crops: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(crops)
        # Mean and maximum: how much of a color there is, and whether a mark is there at all.
        pooled = torch.cat((features.mean((2, 3)), features.amax((2, 3))), 1)
        parts = dict(zip(self.SIZES, self.head(pooled).split(list(self.SIZES.values()), 1), strict=True))
        parts["embedding"] = F.normalize(parts["embedding"], dim=1)
        return parts


@dataclass(frozen=True)
class Reading:
    """What the judge reads from one thing: indices into the world's lists, the probability of the noun, the identity
    vector (14,), the embedding (32,) and the mask (H, W), boolean."""

    noun: int
    confidence: float
    color: int
    second: int
    pattern: int
    identity: torch.Tensor
    embedding: torch.Tensor
    mask: torch.Tensor

    def describe(self) -> str:
        """The reading in words, as in a caption of the world."""
        return f"{COLORS[self.color]} and {COLORS[self.second]} {PATTERNS[self.pattern]} {NOUNS[self.noun]}"


def crop_thing(pictures: torch.Tensor, masks: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Cuts windows (n, 4, CROP, CROP) around `centers` (n, 2; x, y), rounded to integers, out of `pictures` (n, 3, H,
    W), with everything outside `masks` (n, H, W) blanked; the fourth channel is the mask."""
    half = CROP // 2
    stack = torch.cat((pictures * masks[:, None], masks[:, None].to(pictures.dtype)), 1)
    stack = F.pad(stack, (half,) * 4)
    columns = centers.round().long()[:, :1] + torch.arange(CROP, device=stack.device)
    rows = centers.round().long()[:, 1:] + torch.arange(CROP, device=stack.device)
    index = torch.arange(len(stack), device=stack.device)[:, None, None]
    return stack[index, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def group_votes(foreground: torch.Tensor, offsets: torch.Tensor) -> list[torch.Tensor]:
    """Masks (H, W) of the things whose pixels vote for the same center. The fullest cell of a coarse grid of votes
    gives a center, its voters are removed, and so on until too few are left for a thing. `foreground` (H, W) bool,
    `offsets` (2, H, W)."""
    ys, xs = foreground.nonzero(as_tuple=True)
    votes = torch.stack((xs + offsets[0, ys, xs], ys + offsets[1, ys, xs]), 1)
    masks = []
    while len(votes) >= _SMALLEST:
        cells = (votes / _GRID).round()
        _, inverse, counts = cells.unique(dim=0, return_inverse=True, return_counts=True)
        center = votes[inverse == counts.argmax()].mean(0)
        near = (votes - center).norm(dim=1) < _SAME_CENTER
        if not near.any():
            break
        if near.sum() >= _SMALLEST:
            mask = torch.zeros_like(foreground)
            mask[ys[near], xs[near]] = True
            masks.append(mask)
        ys, xs, votes = ys[~near], xs[~near], votes[~near]
    return masks


class Judge(nn.Module):
    """The segmenter and the reader; `read` combines them."""

    def __init__(self):
        super().__init__()
        self.segmenter, self.reader = Segmenter(), Reader()

    @torch.no_grad()
    def read(self, pictures: torch.Tensor) -> list[list[Reading]]:
        """Readings of the things in each of `pictures` (n, 3, H, W) in [0, 1], largest first.

        Pictures of another size are resized to the world's 64x64 for reading; masks have the pictures' own size.
        """
        size = pictures.shape[-2:]
        small = pictures
        if size != (SIZE, SIZE):
            small = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        logits, offsets = self.segmenter(small)
        labels = logits.argmax(1)
        found = [(i, m) for i in range(len(small)) for m in group_votes(labels[i] > 0, offsets[i])]
        readings: list[list[Reading]] = [[] for _ in range(len(small))]
        if not found:
            return readings
        picture = torch.tensor([i for i, _ in found], device=small.device)
        masks = torch.stack([m for _, m in found])
        parts = self.reader(crop_thing(small[picture], masks, centers_of(masks)))
        # Segmenter and reader both predict the noun: the sum of the two log-probabilities decides.
        area = masks.sum((1, 2)).clamp(min=1)
        seen = (logits[picture, 1:].log_softmax(1) * masks[:, None]).sum((2, 3)) / area[:, None]
        noun = (seen + parts["noun"].log_softmax(1)).softmax(1)
        confidence, best = noun.max(1)
        full = F.interpolate(masks[:, None].float(), size, mode="nearest")[:, 0] > 0.5
        for j in area.argsort(descending=True).tolist():
            readings[found[j][0]].append(
                Reading(
                    noun=int(best[j]),
                    confidence=float(confidence[j]),
                    color=int(parts["color"][j].argmax()),
                    second=int(parts["second"][j].argmax()),
                    pattern=int(parts["pattern"][j].argmax()),
                    identity=parts["identity"][j],
                    embedding=parts["embedding"][j],
                    mask=full[j],
                )
            )
        return readings


def centers_of(masks: torch.Tensor) -> torch.Tensor:
    """Centroids (n, 2; x, y) of bool masks (n, H, W)."""
    weight = masks.float()
    area = weight.sum((1, 2)).clamp(min=1)
    ys = torch.arange(masks.shape[1], device=masks.device, dtype=torch.float32)
    xs = torch.arange(masks.shape[2], device=masks.device, dtype=torch.float32)
    return torch.stack(((weight.sum(1) * xs).sum(1) / area, (weight.sum(2) * ys).sum(1) / area), 1)
