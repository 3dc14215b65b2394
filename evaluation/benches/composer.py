"""The Composer adapter: what representations cost beside the UNet, and what taking a picture apart costs."""

from __future__ import annotations

import time
from functools import cache, partial

import torch

from ...compositions.composition import (
    DEPTH,
    INSTANCES,
    INTENSITY,
    MASK,
    PALETTE,
    SEMANTICS,
    SKETCH,
    Composition,
    Part,
)
from ...compositions.instance_map import instance_map
from ...compositions.intensity import intensity
from ...compositions.palette import DEFAULT_TABLE, palette_of_picture, table_colors
from ...compositions.region import Region
from ...compositions.semantics import Semantics
from ...compositions.sketch import contours
from ...encoders.composer_adapter import ComposerAdapter, ComposerAdapterConfig, table_hash
from ...host.composer.adapter import LoadedAdapter, encode, prepared, wrap
from ...host.model.families import family_of
from ..rigs import Rig
from . import Session

VARIANTS: dict[str, tuple[str, ...]] = {
    "default": (SEMANTICS, PALETTE, SKETCH, INSTANCES, DEPTH, INTENSITY, MASK),
    "tokens": (SEMANTICS, PALETTE),
    "maps": (SKETCH, INSTANCES, DEPTH, INTENSITY, MASK),
}
"""Representations of each variant."""
PIXELS = 8  # per cell of the latent, along one side
MEGAPIXEL = 1000


def sessions(rig: Rig) -> list[Session]:
    """One session: representations are no subjects, so their number is 0."""
    # Loaded once, as by its node: loading it onto the GPU is not part of sampling.
    loaded = cache(partial(_adapter, rig))

    def begin():
        adapter, model = loaded(), prepared(rig.model)

        def composed(names: tuple[str, ...]):
            positive = encode(adapter, rig.clip, _composition(rig, names), rig.positive)
            return lambda: rig.sample(model, 1, positive)

        return {variant: composed(names) for variant, names in VARIANTS.items()}

    return [Session(0, begin, dict.fromkeys(VARIANTS, 1.05))]


def facts(rig: Rig) -> list[str]:
    """The size of the adapter, and the time to take a large picture apart."""
    weights = sum(p.numel() for p in _adapter(rig).module.parameters())
    unet = sum(p.numel() for p in rig.model.model.diffusion_model.parameters())
    picture = torch.rand(MEGAPIXEL, MEGAPIXEL, 3)
    takes = {
        "palette": lambda: palette_of_picture(picture),
        "sketch": lambda: contours(picture),
        "intensity": lambda: intensity(picture),
    }
    seconds = {}
    for name, take in takes.items():
        begin = time.perf_counter()
        take()
        seconds[name] = time.perf_counter() - begin
    said = ", ".join(f"the {name} {took:.2f} s" for name, took in seconds.items())
    return [
        f"The adapter has {weights / 1e6:.1f} million weights, the UNet {unet / 1e6:.1f} million.",
        f"Taken from a picture of one megapixel on the CPU: {said}.",
    ]


def _adapter(rig: Rig) -> LoadedAdapter:
    """An adapter for the rig's model, with random weights."""
    network = rig.model.model.diffusion_model
    family = family_of(network)
    levels = tuple(channels for _, channels in family.levels(network))
    config = ComposerAdapterConfig(
        levels=levels,
        context_width=family.text_width(rig.model.model),
        sentence_width=0,
        table=table_hash(table_colors(DEFAULT_TABLE)),
        body=tuple(channels // 4 for channels in levels),
    )
    torch.manual_seed(0)
    return wrap(ComposerAdapter(config).eval().requires_grad_(False))


def _composition(rig: Rig, names: tuple[str, ...]) -> Composition:
    """Random representations of a picture of the rig's size."""
    side = rig.plan.side * PIXELS
    image, mask = torch.rand(side, side, 3), torch.zeros(side, side)
    mask[: side // 2, : side // 2] = 1
    values = {
        SEMANTICS: Semantics(torch.randn(ComposerAdapterConfig.semantics_width)),
        PALETTE: palette_of_picture(image),
        SKETCH: (torch.rand(side, side) > 0.9).float(),
        INSTANCES: instance_map(mask[None], ["thing"]),
        DEPTH: torch.rand(side, side),
        INTENSITY: image.mean(-1),
        MASK: Region(image, mask),
    }
    return Composition((side, side), {name: Part(values[name]) for name in names})
