"""CoAdapter in ComfyUI: T2I-Adapters that are used together, as one control of conditionings."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.utils
import torch

from ...encoders.coadapter import CoAdapterFuser
from ...encoders.files import read_state
from ..model.window import Window

_SKETCH = "sketch"
_SIDE = 512
"""Of the pictures of Stable Diffusion 1.5."""


@dataclass(frozen=True, eq=False)
class Condition:
    """One adapter and its hint.

    Attributes:
        kind: of `encoders.coadapter.KINDS`, without the style.
        adapter: ComfyUI's T2IAdapter.
        image: (1, H, W, 3).
        weight: factor of its maps; 0.5 to 1.5 is recommended.

    Raises:
        ValueError: it is no T2I-Adapter for Stable Diffusion 1.5.
    """

    kind: str
    adapter: Any
    image: torch.Tensor
    weight: float = 1.0

    def __post_init__(self):
        if not isinstance(self.adapter, comfy.controlnet.T2IAdapter) or getattr(self.adapter.t2i_model, "xl", True):
            raise ValueError(
                f"control_net: expected a T2I-Adapter for Stable Diffusion 1.5, such as a CoAdapter, got a "
                f"{type(self.adapter).__name__} of another kind"
            )
        if self.kind == _SKETCH:
            # Sketch adapters were trained without gray.
            gray = self.image.mean(-1, keepdim=True)
            object.__setattr__(self, "image", (gray > gray.max() / 2).float().expand_as(self.image))


def load(path: str) -> CoAdapterFuser:
    """Loads the fuser, such as coadapter-fuser-sd15v1.pth.

    Raises:
        ValueError: the file holds something else, or is not whole.
    """
    return CoAdapterFuser.from_state({key: value.float() for key, value in read_state(Path(path)).items()})


def apply(
    fuser: CoAdapterFuser,
    conditions: Sequence[Condition],
    positive: list,
    negative: list,
    style: torch.Tensor | None = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> tuple[list, list]:
    """Both conditionings with all adapters as one control, and the positive one with the style's tokens.

    Args:
        style: (1, k, D), the style adapter's tokens, already weighted.
        start_percent, end_percent: the part of the schedule in which the control acts.

    Raises:
        ValueError: two adapters are of one kind, something does not fit the fuser or its hint, or the part of the
            schedule ends before it starts.
    """
    Window(start_percent, end_percent)
    conditions = [one for one in conditions if one.weight]
    kinds = [one.kind for one in conditions]
    if len(set(kinds)) < len(kinds):
        twice = next(kind for kind in kinds if kinds.count(kind) > 1)
        raise ValueError(f"conditions: expected one of each kind, got two of {twice}")
    for one in conditions:
        _check(one, fuser)
    width = fuser.seq_proj.shape[0]
    if style is not None and style.shape[-1] != width:
        raise ValueError(f"style_model: expected one of width {width}, got {style.shape[-1]}")
    control = FusedAdapters(fuser, conditions, style)
    made: dict[Any, FusedAdapters] = {}
    found = []
    for entries in (positive, negative):
        changed = []
        for states, extras in entries:
            before = extras.get("control")
            if before not in made:
                made[before] = control.copy().set_cond_hint(None, 1.0, (start_percent, end_percent))
                made[before].set_previous_controlnet(before)
            changed.append([states, {**extras, "control": made[before], "control_apply_to_uncond": False}])
        found.append(changed)
    if not conditions:
        found = [positive, negative]
    if style is not None:
        # The tokens depend on the mean of each map alone, hardly on the size of the picture, which is not known yet.
        _, tokens = control.fused((_SIDE, _SIDE))
        found[0] = [[torch.cat([states, tokens.to(states)], 1), extras] for states, extras in found[0]]
    return found[0], found[1]


def _check(one: Condition, fuser: CoAdapterFuser) -> None:
    own, given = [layer.out_features for layer in fuser.spatial_ch_projs], list(one.adapter.t2i_model.channels)
    if given != own:
        raise ValueError(f"conditions: expected maps of {own} channels for the fuser, got {given} of {one.kind}")
    if one.adapter.channels_in not in (1, one.image.shape[-1]):
        wanted, got = one.adapter.channels_in, one.image.shape[-1]
        raise ValueError(f"conditions: expected a hint of {wanted} channels for {one.kind}, got {got}")


class FusedAdapters(comfy.controlnet.ControlBase):
    """The control of several T2I-Adapters, whose maps the fuser has scaled.

    Args:
        fuser: see `encoders.coadapter`.
        conditions: adapters with their hints.
        style: (1, k, D), or None.
    """

    def __init__(self, fuser: CoAdapterFuser, conditions: Sequence[Condition], style: torch.Tensor | None):
        super().__init__()
        self.fuser, self.conditions, self.style = fuser, tuple(conditions), style
        self._kept: tuple[tuple[int, int], dict] | None = None

    @torch.no_grad()
    def fused(self, size: tuple[int, int]) -> tuple[dict | None, torch.Tensor | None]:
        """The control for pictures of a size (height, width), in ComfyUI's layout, and the style's tokens."""
        device = comfy.model_management.get_torch_device()
        maps, layout = {}, None
        for one in self.conditions:
            layout, levels = self._maps(one, size, device)
            maps[one.kind] = [level * one.weight for level in levels]
        style = None if self.style is None else self.style.to(device, torch.float32)
        try:
            levels, tokens = self.fuser.to(device)(maps, style)
        finally:
            self.fuser.cpu()
        if levels is None:
            return None, tokens
        left = list(levels)
        # ComfyUI lists the maps from the coarsest on, with gaps.
        return {"input": [left.pop() if there else None for there in layout]}, tokens

    def _maps(self, one: Condition, size: tuple[int, int], device) -> tuple[list[bool], list[torch.Tensor]]:
        """Where ComfyUI's list has maps, and these from fine to coarse."""
        adapter = one.adapter
        width, height = adapter.scale_image_to(size[1], size[0])
        hint = comfy.utils.common_upscale(one.image.movedim(-1, 1), width, height, adapter.upscale_algorithm, "center")
        if adapter.channels_in == 1 and hint.shape[1] > 1:
            hint = hint.mean(1, keepdim=True)
        model = adapter.t2i_model.to(device, torch.float32)
        try:
            found = model(hint.float().to(device))["input"]
        finally:
            model.cpu()
        levels = [level for level in reversed(found) if level is not None]
        return [level is not None for level in found], levels

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        """See ComfyUI's ControlBase."""
        before = None
        if self.previous_controlnet is not None:
            before = self.previous_controlnet.get_control(x_noisy, t, cond, batched_number, transformer_options)
        if self.timestep_range is not None and (t[0] > self.timestep_range[0] or t[0] < self.timestep_range[1]):
            return before
        size = tuple(side * self.compression_ratio for side in x_noisy.shape[2:4])
        if self._kept is None or self._kept[0] != size:
            control, _ = self.fused(size)
            self._kept = (size, control or {})
        # Copies, because ComfyUI changes them in place.
        rows = len(x_noisy)
        control = {
            key: [None if one is None else one.expand(rows, -1, -1, -1).to(x_noisy.device, copy=True) for one in maps]
            for key, maps in self._kept[1].items()
        }
        return self.control_merge(control, before, x_noisy.dtype)

    def copy(self) -> FusedAdapters:
        """See ComfyUI's ControlBase."""
        other = FusedAdapters(self.fuser, self.conditions, self.style)
        self.copy_to(other)
        return other

    def deepclone_multigpu(self, load_device, autoregister=False) -> FusedAdapters:
        """See ComfyUI's ControlBase. It has networks of its own: a thread of each device moves them there and back."""
        conditions = []
        for one in self.conditions:
            adapter = one.adapter.copy()
            adapter.t2i_model = copy.deepcopy(one.adapter.t2i_model)
            conditions.append(replace(one, adapter=adapter))
        other = FusedAdapters(copy.deepcopy(self.fuser), conditions, self.style)
        self.copy_to(other)
        if autoregister:
            self.multigpu_clones[load_device] = other
        return other

    def cleanup(self) -> None:
        """Forgets the maps when a sampling is over."""
        super().cleanup()
        self._kept = None
