"""Masks: from what a user provides to the tokens of an attention layer.

A mask is (H, W) with 1 on the subject. Nothing here assumes square pictures or a relation between the sizes of mask,
picture and token grid: all of them show the same scene, so positions correspond as fractions of the size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

ASPECT_TOLERANCE = 0.02
"""Largest relative difference in aspect ratio between a mask and its picture."""


def as_mask(mask: torch.Tensor, name: str = "mask") -> torch.Tensor:
    """Converts a mask to (H, W) float.

    Args:
        mask: (H, W), (1, H, W), (H, W, C) or (1, H, W, C); colors are averaged.
        name: name of the mask in error messages.

    Raises:
        ValueError: it holds several masks, has no area, or holds non-finite values.
    """
    shape = tuple(mask.shape)
    if mask.ndim in (3, 4) and mask.shape[-1] in (1, 3, 4) and (mask.ndim == 4 or mask.shape[0] != 1):
        mask = mask[..., :3].mean(dim=-1)
    if mask.ndim == 3 and mask.shape[0] == 1:
        mask = mask[0]
    if mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"{name}: expected one mask (height, width), got {shape}")
    # aminmax returns NaN if any value is NaN; on large masks it is much faster than testing every value.
    if not all(torch.isfinite(bound) for bound in mask.aminmax()):
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    return mask.float()


def same_aspect(a: Sequence[int], b: Sequence[int], tolerance: float = ASPECT_TOLERANCE) -> bool:
    """Whether two sizes (height, width) have the same aspect ratio, up to `tolerance`."""
    return abs(math.log(a[0] / a[1]) - math.log(b[0] / b[1])) <= tolerance


def check_aspect(mask: torch.Tensor, size: Sequence[int], name: str = "mask", latent: bool = False) -> None:
    """Raises ValueError if a mask (H', W') and a picture of `size` (H, W) differ in aspect ratio.

    A mask that is zero everywhere passes, because ComfyUI returns small square ones for pictures without alpha.

    Args:
        mask, size: see above.
        name: name of the mask in error messages.
        latent: whether `size` is a latent's, whose last row and column of cells the picture may cover only in part.
    """
    (mask_h, mask_w), (height, width) = mask.shape, size
    tolerance = max(ASPECT_TOLERANCE, 1 / min(size)) if latent else ASPECT_TOLERANCE
    if not same_aspect((mask_h, mask_w), size, tolerance) and mask.any():
        raise ValueError(
            f"{name}: expected the shape of the {'latent' if latent else 'picture'} ({width}x{height}), got "
            f"{mask_w}x{mask_h}, which would be stretched over other parts of it"
        )


def fit_mask(mask: torch.Tensor, size: Sequence[int], name: str = "mask") -> torch.Tensor:
    """A mask (H', W') at the size (H, W) of its picture.

    Raises:
        ValueError: as in `check_aspect`.
    """
    check_aspect(mask, size, name)
    if tuple(mask.shape) == tuple(size):
        return mask
    return F.interpolate(mask[None, None].float(), tuple(size), mode="bilinear", antialias=True)[0, 0]


def binarize(mask: torch.Tensor | None, threshold: float, size: Sequence[int] = (1, 1)) -> torch.Tensor:
    """Makes a mask (H, W) boolean: true where it is at least `threshold`. None becomes true everywhere on `size`.

    Even with a threshold of 0, pixels that are exactly zero are false.
    """
    if mask is None:
        return torch.ones(size, dtype=torch.bool)
    return mask >= threshold if threshold > 0 else mask > 0


def token_mask(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Samples a boolean mask (H, W) on a layer's token grid (h, w); returns (h*w,), boolean.

    Nearest-neighbor sampling at the top left of each cell, as in FreeCustom's code (arXiv 2405.13870). A subject so
    small that no sample hits it keeps every token it touches, instead of silently disappearing in coarse layers.
    """
    pixels = mask[None, None].float()
    tokens = F.interpolate(pixels, size=grid, mode="nearest")
    if not tokens.any():
        tokens = F.adaptive_max_pool2d(pixels, grid)
    return tokens.flatten() > 0.5


def bounding_box(mask: torch.Tensor) -> tuple[int, int, int, int]:
    """The smallest box (x, y, width, height) that contains all true pixels of a boolean mask (H, W).

    Raises:
        ValueError: no pixel is true.
    """
    ys, xs = torch.nonzero(mask, as_tuple=True)
    if len(ys) == 0:
        raise ValueError("mask: expected at least one pixel, got an empty mask")
    x, y = int(xs.min()), int(ys.min())
    return x, y, int(xs.max()) + 1 - x, int(ys.max()) + 1 - y


def feather(mask: torch.Tensor, radius: float) -> torch.Tensor:
    """Softens the edge of a mask (H, W) inwards with a Gaussian of standard deviation `radius` / 2 pixels.

    Inwards, so that nothing outside the subject becomes visible. Radius 0 returns the mask.
    """
    if radius <= 0:
        return mask
    sigma = radius / 2
    reach = max(1, math.ceil(2 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=mask.dtype, device=mask.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(mask[None, None], (reach,) * 4)
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    blurred = F.conv2d(rows, kernel.view(1, 1, -1, 1))[0, 0]
    # A straight edge blurs to 1/2, so this is 0 at the edge and reaches 1 inside.
    return mask * (2 * blurred - 1).clamp(0, 1)


def spotlight(image: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """A preview of the picture (H, W, 3) in which everything outside its mask (H', W') is darkened."""
    if mask is None:
        return image
    shape = F.interpolate(mask[None, None], size=image.shape[:2], mode="bilinear")[0, 0].clamp(0, 1)
    return image * (0.25 + 0.75 * shape[..., None].to(image))
