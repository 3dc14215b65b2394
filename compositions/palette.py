"""Palettes: how much of a picture has which color, wherever it is (Composer, arXiv 2302.09778).

A palette is a histogram over a fixed table of colors, smoothed over similar colors in CIELab, as the project rayleigh
builds it. The paper names 11 hues, 5 saturations and 5 lights, which the table's builder can read in two ways: with 156
colors, as the code of the same group has it, and with 180, as DiffBlender's weights were trained. Both are here, and
neither is ever taken for the other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from ..subjects.masks import fit_mask
from .color import hsv_to_srgb, srgb_to_lab

TABLES = {"156 colors": 4, "180 colors": 5}
"""Tables by name, with the number of lights that makes each."""
DEFAULT_TABLE = "156 colors"
SIGMA = 10.0
"""Standard deviation of the smoothing in CIELab."""

_HUES = (0.0, 0.0833, 0.166, 0.25, 0.333, 0.5, 0.56333, 0.666, 0.73, 0.803, 0.916)
_SATURATIONS = 5
_LEAST = 1e-5
"""Smaller shares are left out after smoothing."""
_MOST_SIDE = 241
"""A larger picture is read at every n-th pixel, without averaging, which would make colors that it does not have."""


@cache
def table_colors(table: str) -> torch.Tensor:
    """The colors (K, 3) of a table in sRGB, float64: for each hue from pale to dark, and then grays."""
    lights = TABLES[table]
    values = torch.linspace(1, 0.2, lights + 2, dtype=torch.float64)[1:-1].tolist()
    rows = [(i / (_SATURATIONS + 1), 1.0) for i in range(1, _SATURATIONS + 1)]
    rows += [(1.0, 1.0), *((1.0, v) for v in values), *((0.4, v) for v in values[:-1])]
    hsv = torch.tensor([(hue, s, v) for hue in _HUES for s, v in rows], dtype=torch.float64)
    grays = torch.linspace(1, 0, len(rows), dtype=torch.float64)[:, None].expand(-1, 3)
    return torch.cat([hsv_to_srgb(hsv), grays])


@cache
def _table_lab(table: str) -> torch.Tensor:
    return srgb_to_lab(table_colors(table))


@dataclass(frozen=True, eq=False)
class Palette:
    """Attributes:
        histogram: (K,), float64. A smoothed histogram does not sum to 1.
        table: one of TABLES.
        sigma: of its smoothing; 0 for none.

    Raises:
        ValueError: the table is unknown, or the histogram does not fit it.
    """

    histogram: torch.Tensor
    table: str = DEFAULT_TABLE
    sigma: float = SIGMA

    def __post_init__(self):
        if self.table not in TABLES:
            raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {self.table!r}")
        size = len(table_colors(self.table))
        if tuple(self.histogram.shape) != (size,):
            raise ValueError(f"palette: expected {size} shares for {self.table}, got {tuple(self.histogram.shape)}")
        if not torch.isfinite(self.histogram).all() or (self.histogram < 0).any() or not self.histogram.any():
            raise ValueError("palette: expected finite shares from 0 on, some of them above, got others")

    def mixed(self, other: Palette, share: float) -> Palette:
        """The mixture of two palettes, with `share` of the other.

        Raises:
            ValueError: they have different tables or different smoothing.
        """
        if (self.table, self.sigma) != (other.table, other.sigma):
            raise ValueError(
                f"palette: expected one over the same table and sigma ({self.table}, {self.sigma:g}), got "
                f"{other.table}, {other.sigma:g}"
            )
        return Palette(torch.lerp(self.histogram, other.histogram, share), self.table, self.sigma)

    def distance(self, other: Palette) -> float:
        """The sum of absolute differences, each palette scaled to sum 1: 0 for equal palettes, at most 2.

        Raises:
            ValueError: they have different tables.
        """
        if self.table != other.table:
            raise ValueError(f"palette: expected one over the same table ({self.table}), got {other.table}")
        a, b = (one.histogram / one.histogram.sum() for one in (self, other))
        return float((a - b).abs().sum())

    def main_colors(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` largest shares, scaled to sum 1 (n,), and their colors (n, 3), in descending order."""
        count = min(count, int((self.histogram > 0).sum()))
        shares, index = self.histogram.topk(count)
        return shares / shares.sum(), table_colors(self.table)[index]


def palette_of_picture(
    image: torch.Tensor, mask: torch.Tensor | None = None, table: str = DEFAULT_TABLE, sigma: float = SIGMA
) -> Palette:
    """The palette of a picture, or of a part of it.

    Args:
        image: (H, W, 3) or, with alpha, (H, W, 4), in [0, 1]; pixels with alpha below 0.5 do not count.
        mask: (H', W') in the picture's shape, above 0.5 where pixels count.
        table, sigma: see `Palette`.

    Raises:
        ValueError: no pixel counts, values are not finite, or the mask has another shape.
    """
    if not torch.isfinite(image).all():
        raise ValueError("image: expected finite values, got NaN or infinity")
    step = max(image.shape[0] // _MOST_SIDE + 1, 1), max(image.shape[1] // _MOST_SIDE + 1, 1)
    counted = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
    if image.shape[-1] == 4:
        counted = image[..., 3] >= 0.5
    if mask is not None:
        counted = counted & (fit_mask(mask, counted.shape).to(image.device) > 0.5)
    strided = counted[:: step[0], :: step[1]]
    # A small region may lie between the pixels that are read.
    pixels = image[:: step[0], :: step[1], :3][strided] if strided.any() else image[..., :3][counted]
    if not len(pixels):
        raise ValueError("mask: expected white on some pixels that are not transparent, got none")
    return palette_of_colors(pixels, torch.full((len(pixels),), 1 / len(pixels)), table, sigma)


def palette_of_colors(
    colors: torch.Tensor, shares: torch.Tensor, table: str = DEFAULT_TABLE, sigma: float = SIGMA
) -> Palette:
    """The palette of colors (n, 3) in [0, 1] with their shares (n,), which are scaled to sum 1.

    Raises:
        ValueError: the shares do not fit the colors, or are not positive anywhere.
    """
    if len(shares) != len(colors):
        raise ValueError(f"shares: expected one for each of {len(colors)} colors, got {len(shares)}")
    if (shares < 0).any() or not shares.sum() > 0:
        raise ValueError("shares: expected numbers from 0 on, some of them above, got others")
    known = _table_lab(table) if table in TABLES else None
    if known is None:
        raise ValueError(f"table: expected one of {', '.join(TABLES)}, got {table!r}")
    # One row per distinct color; squared distances of many pixels to many entries would be large.
    distinct, inverse = _distinct(colors.detach().cpu().double())
    lab = srgb_to_lab(distinct)
    nearest = torch.cat([torch.cdist(part, known).argmin(1) for part in lab.split(1 << 16)])[inverse]
    weights = shares.detach().cpu().double() / shares.double().sum().cpu()
    strict = torch.zeros(len(known), dtype=torch.float64).index_add_(0, nearest, weights)
    return Palette(smooth(strict, table, sigma), table, sigma)


def _distinct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct rows of (n, c), and the number of each row's own: `torch.unique` of rows, which compares them one by
    one and takes ten times as long."""
    key = torch.zeros(len(rows), dtype=torch.int64)
    for column in rows.unbind(1):
        values, index = torch.unique(column, return_inverse=True)
        key = key * len(values) + index
    numbers, inverse = torch.unique(key, return_inverse=True)
    distinct = rows.new_empty(len(numbers), rows.shape[1])
    distinct[inverse] = rows
    return distinct, inverse


def smooth(histogram: torch.Tensor, table: str, sigma: float) -> torch.Tensor:
    """A histogram (K,) averaged over similar colors, by a Gaussian in CIELab whose rows sum to 1."""
    if sigma <= 0:
        return histogram
    lab = _table_lab(table)
    weights = torch.exp(-torch.cdist(lab, lab).square() / (2 * sigma**2))
    smoothed = (weights / weights.sum(1, keepdim=True)) @ histogram
    return torch.where(smoothed < _LEAST, torch.zeros_like(smoothed), smoothed)


def read_colors(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads colors as people write them: "#ff0000, #00ff80 3" are one part red and three parts of a green.

    Returns:
        The colors (n, 3) in [0, 1], and their shares (n,).

    Raises:
        ValueError: an entry is no color, or there is none.
    """
    colors, shares = [], []
    for entry in filter(None, (part.strip() for part in re.split(r"[,;\n]", text))):
        found = re.fullmatch(r"#?([0-9a-fA-F]{6}|[0-9a-fA-F]{3})(?:\s*[:* ]\s*(\d+(?:\.\d+)?))?", entry)
        if not found or (found[2] and float(found[2]) <= 0):
            raise ValueError(f"colors: expected entries such as #ff8000 or #ff8000 3, got {entry!r}")
        digits = found[1] if len(found[1]) == 6 else "".join(digit * 2 for digit in found[1])
        colors.append([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
        shares.append(float(found[2] or 1))
    if not colors:
        raise ValueError("colors: expected at least one such as #ff8000, got none")
    return torch.tensor(colors, dtype=torch.float64), torch.tensor(shares, dtype=torch.float64)


def areas(shares: Sequence[float], pixels: int) -> list[int]:
    """Whole numbers of pixels with the given shares of all, by largest remainder: they sum to `pixels`."""
    exact = [share * pixels for share in shares]
    found = [math.floor(area) for area in exact]
    left = sorted(range(len(exact)), key=lambda i: found[i] - exact[i])[: pixels - sum(found)]
    for i in left:
        found[i] += 1
    return found


STRIP, TILES = "strips", "tiles"
LAYOUTS = (STRIP, TILES)
_TILES = 64


def palette_picture(
    palette: Palette, width: int, height: int, layout: str = STRIP, count: int = 16, seed: int = 0
) -> torch.Tensor:
    """A picture (height, width, 3) of a palette's `count` main colors, each with its share of the area.

    Args:
        layout: STRIP for strips from left to right, TILES for random tiles (of a Voronoi diagram), so that the picture
            says nothing about where colors are.
        seed: of the tiles.

    Raises:
        ValueError: the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
    shares, colors = palette.main_colors(count)
    pixels = torch.repeat_interleave(colors, torch.tensor(areas(shares.tolist(), width * height)), 0).float()
    if layout == STRIP:
        return pixels.view(width, height, 3).movedim(0, 1).contiguous()
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(_TILES, 2, generator=generator)
    grid = torch.cartesian_prod((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width)
    tile = torch.cat([torch.cdist(part, points).argmin(1) for part in grid.split(1 << 16)])
    order = tile.argsort(stable=True)
    picture = torch.empty_like(pixels)
    picture[order] = pixels
    return picture.view(height, width, 3)
