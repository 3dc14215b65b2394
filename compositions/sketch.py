"""Sketches: white strokes on black, from a picture of edges, or found without a network.

Composer detects edges with PiDiNet and simplifies them with a second network, whose weights are for research only. Any
edge picture is accepted in their place; `contours` needs no weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

AUTO, WHITE_ON_BLACK, BLACK_ON_WHITE = "auto", "white on black", "black on white"
POLARITIES = (AUTO, WHITE_ON_BLACK, BLACK_ON_WHITE)
_FINE, _COARSE, _LEAST_EDGE = 0.5, 5.0, 32 / 255
_LEAST_SPECK = 0.02
"""Strokes of fewer pixels are removed; share of the picture's shorter side."""


def as_sketch(image: torch.Tensor, polarity: str = AUTO) -> torch.Tensor:
    """A picture of strokes (H, W, C) as a sketch (H, W), white strokes on black.

    Args:
        polarity: what the picture is; AUTO takes the rarer of black and white for the strokes.

    Raises:
        ValueError: the polarity is unknown.
    """
    if polarity not in POLARITIES:
        raise ValueError(f"polarity: expected one of {', '.join(POLARITIES)}, got {polarity!r}")
    gray = torch.nan_to_num(image[..., :3].float()).mean(-1).clamp(0, 1)
    inverted = polarity == BLACK_ON_WHITE or (polarity == AUTO and float(gray.mean()) > 0.5)
    return 1 - gray if inverted else gray


def contours(image: torch.Tensor) -> torch.Tensor:
    """The edges (H, W) of a picture (H, W, 3), 0 or 1: a difference of two Gaussians, on the dark side of edges.

    A flat picture of any brightness has none.
    """
    planes = image[..., :3].float().movedim(-1, 0)[:, None]
    difference = (_blurred(planes, _COARSE) - _blurred(planes, _FINE)).clamp(0, 1).amax(0)[0]
    return (difference > _LEAST_EDGE).float()


def canny(image: torch.Tensor, low: float = 0.4, high: float = 0.8) -> torch.Tensor:
    """Canny's edges (H, W) of a picture (H, W, 3), 0 or 1, by kornia, as ComfyUI's Canny finds them.

    Raises:
        ValueError: kornia is not installed.
    """
    try:
        from kornia.filters import canny as kornia_canny
    except ImportError as error:
        raise ValueError("method: expected contours, got canny, which needs kornia (pip install kornia)") from error
    return kornia_canny(image[..., :3].float().movedim(-1, 0)[None], low, high)[1][0, 0]


def simplified(sketch: torch.Tensor, threshold: float = 0.5, width: int = 1) -> torch.Tensor:
    """A sketch (H, W) of clean strokes, 0 or 1: without specks, with gaps of a pixel closed, thinned to one pixel and
    drawn with strokes of about 2 width - 1 pixels."""
    from scipy import ndimage

    strokes = (sketch > threshold).cpu().numpy()
    strokes = ndimage.binary_closing(strokes, ndimage.generate_binary_structure(2, 2)) | strokes
    labels, count = ndimage.label(strokes, ndimage.generate_binary_structure(2, 2))
    if count:
        sizes = ndimage.sum_labels(strokes, labels, range(count + 1))
        strokes &= sizes[labels] >= _LEAST_SPECK * min(strokes.shape)
    thin = _thinned(torch.from_numpy(strokes))
    side = 2 * width - 1
    return F.max_pool2d(thin.float()[None, None], side, 1, width - 1)[0, 0].to(sketch.device)


def _thinned(strokes: torch.Tensor) -> torch.Tensor:
    """Strokes (H, W), boolean, thinned to lines of one pixel (Zhang and Suen 1984)."""
    kept = strokes.clone()
    while True:
        before = kept
        for second in (False, True):
            padded = F.pad(kept, (1, 1, 1, 1))
            # Clockwise from the pixel above.
            around = [
                padded[1 + dy : padded.shape[0] - 1 + dy, 1 + dx : padded.shape[1] - 1 + dx]
                for dy, dx in ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
            ]
            up, _, right, _, down, _, left, _ = around
            neighbors = torch.stack(around).sum(0)
            rises = torch.stack([~a & b for a, b in zip(around, around[1:] + around[:1], strict=True)]).sum(0)
            if second:
                open_side = ~(up & right & left) & ~(up & down & left)
            else:
                open_side = ~(up & right & down) & ~(right & down & left)
            kept = kept & ~((neighbors >= 2) & (neighbors <= 6) & (rises == 1) & open_side)
        if torch.equal(kept, before):
            return kept


def _blurred(planes: torch.Tensor, sigma: float) -> torch.Tensor:
    """Planes (n, 1, H, W) blurred by a Gaussian, with their border repeated."""
    reach = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=planes.dtype, device=planes.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(planes, (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
