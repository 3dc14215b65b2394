"""Compositions as the Composer adapter takes them."""

from __future__ import annotations

import torch

from ..encoders.composer_adapter import (
    PALETTE,
    SEMANTICS,
    SENTENCE,
    ComposerAdapterConfig,
    Conditions,
    table_hash,
)
from .composition import INSTANCES, LOCAL, MASK, Composition
from .instance_map import coded
from .palette import Palette, table_colors


def local_map(name: str, value) -> torch.Tensor:
    """The map (1, c, H, W) of a local representation: sketch, depth and intensity as they are, instances in the colors
    of their own coding, and of a mask the picture in [-1, 1] with a hole of 0, and 1 where it is kept."""
    if name == INSTANCES:
        return coded(value).movedim(-1, 0)[None]
    if name == MASK:
        kept = 1 - value.mask
        picture = (2 * value.image - 1).movedim(-1, 0) * kept
        return torch.cat([picture, kept[None]])[None]
    return value[None, None].float()


def scaled_palette(palette: Palette) -> torch.Tensor:
    """A palette (K,) with unit variance per entry."""
    shares = palette.histogram.float()
    return shares / shares.norm() * len(shares) ** 0.5


def conditions_of(composition: Composition, sentence: torch.Tensor | None = None) -> Conditions:
    """The conditions (n = 1) of a composition.

    Args:
        composition: its caption only says how strongly the sentence acts.
        sentence: (1, D), the caption's pooled embedding; None for none.
    """
    found: dict[str, torch.Tensor] = {}
    if sentence is not None and SENTENCE in composition:
        found[SENTENCE] = sentence.float()
    if SEMANTICS in composition:
        found[SEMANTICS] = composition[SEMANTICS].scaled[None]
    if PALETTE in composition:
        found[PALETTE] = scaled_palette(composition[PALETTE])[None]
    maps = {name: local_map(name, composition[name]) for name in LOCAL if name in composition}
    strengths = {name: torch.tensor([composition.parts[name].strength]) for name in (*found, *maps)}
    return Conditions(found, maps, strengths)


def check_fits(composition: Composition, config: ComposerAdapterConfig) -> None:
    """Checks that an adapter understands a composition.

    Raises:
        ValueError: the semantics are of another vision tower, or the palette is over another table.
    """
    semantics, palette = composition.get(SEMANTICS), composition.get(PALETTE)
    if semantics is not None and len(semantics.embedding) != config.semantics_width:
        raise ValueError(
            f"composition: expected semantics of width {config.semantics_width} for this adapter, got "
            f"{len(semantics.embedding)}; use the vision tower that it was trained with"
        )
    seen = 0 if semantics is None or semantics.tokens is None else len(semantics.tokens)
    if seen and config.vision_tokens not in (0, seen):
        raise ValueError(
            f"composition: expected semantics of a vision tower of {config.vision_tokens} tokens for this adapter, got "
            f"one of {seen}"
        )
    if palette is not None and palette.sigma != config.sigma:
        raise ValueError(
            f"composition: expected a palette of sigma {config.sigma:g} for this adapter, got {palette.sigma:g}"
        )
    if palette is not None and (
        len(palette.histogram) != config.colors or config.table not in ("", table_hash(table_colors(palette.table)))
    ):
        raise ValueError(
            f"composition: expected a palette of {config.colors} colors for this adapter, got one of {palette.table}"
        )
