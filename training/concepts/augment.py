"""Varies scale and position of a training picture, so that a concept is tied to neither.

STRONG is Concept Weaver's augmentation (arXiv 2404.03913, section 3.1): a third to the whole of the size, pasted
anywhere. CUSTOM is Custom Diffusion's (arXiv 2212.04488, appendix): also enlarged pictures that are cropped, with words
for the scale in the caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...subjects.pictures import middle_square

STRONG, CUSTOM, NONE = "strong", "custom diffusion", "none"
AUGMENTATIONS = (NONE, CUSTOM, STRONG)

GRAY = 0.5
_FAR, _NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")


@dataclass(frozen=True, eq=False)
class View:
    """One variation of a training picture.

    Attributes:
        image: (side, side, 3) in [0, 1].
        mask: (side, side), 1 where the loss counts.
        prefix: text before the caption.
    """

    image: torch.Tensor
    mask: torch.Tensor
    prefix: str = ""


def augment(image: torch.Tensor, mask: torch.Tensor | None, side: int, kind: str, generator: torch.Generator) -> View:
    """A view (side, side) of a picture (H, W, 3), with its mask (H', W') or None.

    If the picture is pasted onto gray, it alone counts in the loss, minus a small border, so that gray is not learned.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in AUGMENTATIONS:
        raise ValueError(f"augmentation: expected one of {', '.join(AUGMENTATIONS)}, got {kind!r}")
    if kind == NONE:
        return View(_resize(image, side), _mask(mask, side))
    draw = torch.rand(4, generator=generator).tolist()
    smaller = kind == STRONG or draw[0] < 2 / 3
    scale = 1 / 3 + draw[1] * 2 / 3 if smaller else 1.2 + draw[1] * 0.2
    if kind == CUSTOM and 0.6 <= scale <= 1:
        return View(_resize(image, side), _mask(mask, side))
    size = max(1, round(scale * side))
    small, shown = _resize(image, size), _mask(mask, size)
    x, y = (int(d * (abs(side - size) + 1)) for d in draw[2:])
    words = (_NEAR if scale > 1 else _FAR)[int(draw[1] * 1000) % 2] if kind == CUSTOM else ""
    if size >= side:
        return View(small[y : y + side, x : x + side], shown[y : y + side, x : x + side], words)
    canvas, counted = torch.full((side, side, 3), GRAY), torch.zeros(side, side)
    canvas[y : y + size, x : x + size] = small
    border = max(1, side // 64)
    inner = torch.zeros(size, size)
    inner[border : size - border, border : size - border] = 1
    counted[y : y + size, x : x + size] = shown * inner
    return View(canvas, counted, words)


def _resize(image: torch.Tensor, side: int) -> torch.Tensor:
    """The center square of a picture (H, W, 3), resized to (side, side, 3)."""
    square = middle_square(image).movedim(-1, 0)[None].float()
    return F.interpolate(square, (side, side), mode="bicubic", antialias=True)[0].movedim(0, -1).clamp(0, 1)


def _mask(mask: torch.Tensor | None, side: int) -> torch.Tensor:
    if mask is None:
        return torch.ones(side, side)
    square = middle_square(mask)[None, None].float()
    return F.interpolate(square, (side, side), mode="bilinear", antialias=True)[0, 0].clamp(0, 1)
