"""Model families, one file each, and the functions that find the family of a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..sites import CROSS, CrossAttentionFamily, Family
from .unet import UNetFamily

FAMILIES: tuple[Family, ...] = (UNetFamily(),)


def network_of(model, *kinds: str) -> torch.nn.Module:
    """The diffusion model of a BaseModel, unwrapped if another node (such as a compile node) has wrapped it.

    Raises:
        ValueError: the family is not known, or does not have sites of all these `kinds`.
    """
    parts = (part for part in model.diffusion_model.modules() if any(family.owns(part) for family in FAMILIES))
    network = next(parts, None)
    family = None if network is None else family_of(network)
    fit = [one for one in FAMILIES if one.kinds.issuperset(kinds)]
    if family not in fit:
        given = family.names if family else type(model.diffusion_model).__name__
        raise ValueError(f"model: expected one of the families {', '.join(one.names for one in fit)}, got {given}")
    return network


def family_of(network: torch.nn.Module) -> Family:
    """The family of a diffusion model from `network_of`."""
    return next(family for family in FAMILIES if family.owns(network))


def family_of_concept(layers: Iterable[str]) -> CrossAttentionFamily:
    """The family of the models for which a concept with these `layers` (site keys) is made.

    Raises:
        ValueError: the keys are not those of any family.
    """
    layers = list(layers)
    for family in FAMILIES:
        if CROSS in family.kinds and all(map(family.has_site, layers)):
            return family
    raise ValueError(f"concept: expected layers of a known family of models, got {', '.join(layers[:3])}")
