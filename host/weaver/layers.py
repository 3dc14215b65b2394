"""What concepts change outside the keys and values of cross-attention, applied in their own part of the picture.

A LoRA changes most layers of a model. Merged into the model, it would change the whole picture and the other concepts.
Instead, every layer whose input has spatial positions adds M_i Delta_i(x), in the positive rows only (FreeFuse, arXiv
2510.23515). Layers without spatial positions (as in the time embedding) and norms are left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ...encoders.concepts import Concept, half
from ..model.families import network_of
from ..model.sites import CROSS, Site, sees_whole
from .weights import DIFFUSION_MODEL, Weights, difference

Sized = Callable[[tuple[int, int]], torch.Tensor]
"""Returns the masks (n, h, w) of the concepts for the token grid of a layer."""


@dataclass(frozen=True, eq=False)
class Change:
    """What one concept changes in one layer.

    Attributes:
        concept: index of the concept.
        strength: factor of the change.
        factors: difference of the weight, as `weights.difference` returns it; empty if there is none.
        bias: difference of the bias, or None.
    """

    concept: int
    strength: float
    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None

    def to(self, device: torch.device, dtype: torch.dtype) -> Change:
        """Moves the factors to the device of the computation. A difference that is not in factors is as large as the
        model's own layer, and is moved only when it is applied."""
        if len(self.factors) < 2:
            return self
        return replace(self, factors=tuple(factor.to(device, dtype) for factor in self.factors))

    def apply(self, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What the change adds to the layer's output for an input `x`; it can be broadcast to the output."""
        out = torch.zeros((), device=x.device, dtype=x.dtype)
        if self.factors:
            first, *rest = (factor.to(x) for factor in reversed(self.factors))
            if isinstance(layer, torch.nn.Conv2d):
                kernel = first.reshape(-1, *layer.weight.shape[1:])
                out = F.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups)
                out = F.conv2d(out, rest[0][:, :, None, None]) if rest else out
            else:
                out = F.linear(x, first.flatten(1))
                out = F.linear(out, rest[0]) if rest else out
        if self.bias is not None:
            bias = self.bias.to(x)
            out = out + (bias[:, None, None] if isinstance(layer, torch.nn.Conv2d) else bias)
        return self.strength * out


def changes_of(concepts: Sequence[Concept], model, sites: Sequence[Site]) -> tuple[dict[str, list[Change]], int]:
    """The concepts' changes by layer of the diffusion model, and the number of patches that cannot be applied.

    Args:
        concepts: in the order of their masks.
        model: ComfyUI's MODEL.
        sites: the cross-attention sites in which concepts are used; queries and outputs of other sites do not change.
    """
    weights = Weights.of(model)
    network = network_of(model.model, CROSS)
    found: dict[str, list[Change]] = {}
    left_out = 0
    for i, concept in enumerate(concepts):
        for name, (factors, bias) in _differences(concept, weights, {site.key for site in sites}):
            if weights.family.sees_places(network, name):
                found.setdefault(name, []).append(Change(i, concept.strength, factors, bias))
            else:
                left_out += 1
    return found, left_out


def _differences(concept: Concept, weights: Weights, seen: set[str]) -> Iterable[tuple[str, tuple]]:
    """(layer, (factors, bias)) for everything that a concept changes except keys and values."""
    for key, parts in concept.deltas.items():
        for part in ("q", "out"):
            if part in parts and key in seen:
                yield weights.family.layer(key, part), (parts[part].factors, parts[part].bias)
    layers: dict[str, dict[str, tuple]] = {}
    for key, patch in concept.others.items():
        layer, _, kind = key.removeprefix(DIFFUSION_MODEL).rpartition(".")
        layers.setdefault(layer, {})[kind] = difference(patch, weights.patches, key)
    for layer, found in layers.items():
        bias = found.get("bias")
        weight = found.get("weight", ())
        if len(weight) == 1:
            # As large as the layer, and there may be one for each layer of the model.
            try:
                weight = (half(weight[0]),)
            except ValueError as error:
                raise ValueError(f"concepts: {error}, in {concept.name} for {layer}") from error
        yield layer, (weight, bias and bias[0])


@dataclass(frozen=True)
class Rows:
    """Rows of the batch that use concepts: all of them, each inside its mask, or a single one everywhere.

    Attributes:
        rows: slice of the batch.
        concept: index of the single concept; None for all.
    """

    rows: slice
    concept: int | None


class MaskedLayer:
    """Layer handler that adds the changes of concepts inside their masks."""

    def __init__(
        self,
        layer: torch.nn.Module,
        changes: Sequence[Change],
        masks: Sized,
        rows: int,
        parts: Sequence[Rows],
        missing: Callable[[Rows], torch.Tensor | None] = lambda _part: None,
    ):
        """`rows`: size of the batch. `missing`: returns what to add to the concepts' input in some rows, or None."""
        self.layer, self.changes, self.masks, self.rows, self.parts = layer, changes, masks, rows, parts
        self.missing = missing

    def __call__(self, x: torch.Tensor, out: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        """Returns the layer's output (B, L, C) or (B, C, h, w) with the changes added."""
        as_picture = isinstance(self.layer, torch.nn.Conv2d)
        grid = tuple(out.shape[-2:]) if as_picture else grid
        check_whole(out, grid, self.rows)
        masks = self.masks(grid).to(out)
        for part in self.parts:
            given, missing = x[part.rows], self.missing(part)
            if missing is not None:
                given = given + missing
            for change in self.changes:
                if part.concept is None:
                    mask = masks[change.concept] if as_picture else masks[change.concept].flatten()[:, None]
                    out[part.rows] += mask * change.apply(self.layer, given)
                elif part.concept == change.concept:
                    out[part.rows] += change.apply(self.layer, given)
        return out


class OwnQueries:
    """Layer handler for the query projection of a cross-attention. It computes what each concept's own weights add to
    the queries, for the attention of that concept, and does not change the queries of the base."""

    def __init__(self, layer: torch.nn.Module, changes: Sequence[Change], rows: int, parts: Sequence[Rows]):
        """`rows`: size of the batch."""
        self.layer, self.changes, self.rows, self.parts = layer, changes, rows, parts
        self._kept: dict[int, dict[int, torch.Tensor]] = {}

    def __call__(self, x: torch.Tensor, out: torch.Tensor, grid: tuple[int, int] | None) -> torch.Tensor:
        """Returns the layer's output unchanged."""
        check_whole(out, grid, self.rows)
        self._kept = {
            part.rows.start: {change.concept: change.apply(self.layer, x[part.rows]) for change in self.changes}
            for part in self.parts
        }
        return out

    def take(self, part: Rows) -> dict[int, torch.Tensor]:
        """Returns what was computed for some rows, by concept (B, L, C), and releases it."""
        return self._kept.pop(part.rows.start, {})


def check_whole(out: torch.Tensor, grid: tuple[int, int] | None, rows: int) -> None:
    """Raises ValueError if a layer's output does not cover all rows and the whole picture."""
    if not sees_whole(out, rows, grid):
        raise ValueError(
            "Multi-Concept Fusion (Concept Weaver): model: expected one whose layers see the whole picture, got "
            f"parts of shape {tuple(out.shape)} from another node; with elsewhere set to left out any do"
        )
