"""A composition: any of eight representations of pictures, on one canvas (Composer, arXiv 2302.09778).

Three are global: the caption, the semantics and the palette. Five are local maps of the canvas: the sketch, the
instances, the depth, the intensity and the region that is drawn anew. One that is not there is absent: it is never a
map of zeros. They may come from different pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F

from ..subjects.pictures import resized_strokes
from .instance_map import InstanceMap
from .palette import Palette
from .region import Region
from .semantics import Semantics, between

CAPTION, SEMANTICS, PALETTE = "caption", "semantics", "palette"
SKETCH, INSTANCES, DEPTH, INTENSITY, MASK = "sketch", "instances", "depth", "intensity", "mask"
GLOBAL = (CAPTION, SEMANTICS, PALETTE)
LOCAL = (SKETCH, INSTANCES, DEPTH, INTENSITY, MASK)
NAMES = (*GLOBAL, *LOCAL)
MAX_STRENGTH = 10.0

FIRST, SECOND, REFUSE = "first", "second", "refuse"
POLICIES = (REFUSE, FIRST, SECOND)
CROP, PAD, STRETCH = "crop", "pad", "stretch"
FITS = (CROP, PAD, STRETCH)
NO_CANVAS = (1, 1)
"""The size of a composition that comes from no picture."""


@dataclass(frozen=True)
class Caption:
    """A caption, or a mixture of several: each text with its share, which sum to 1."""

    texts: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        if len(self.texts) == 1:
            return self.texts[0][0]
        return ", ".join(f"{share:.0%} {text!r}" for text, share in self.texts)


@dataclass(frozen=True, eq=False)
class Part:
    """One representation and how it is used.

    Attributes:
        value: a `Caption`, a `Semantics`, a `Palette`, an `InstanceMap` or a `Region`; of a sketch, depth or intensity
            the map (H, W) in [0, 1].
        strength: how strongly it acts; 1 is as trained.
        start_percent, end_percent: the part of the schedule in which it acts.

    Raises:
        ValueError: a number is out of its range.
    """

    value: Any
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self):
        if not 0 < self.strength <= MAX_STRENGTH:
            raise ValueError(f"strength: expected a number above 0, at most {MAX_STRENGTH:g}, got {self.strength:g}")
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ValueError(
                f"start_percent: expected at most end_percent ({self.end_percent:g}), both from 0 to 1, got "
                f"{self.start_percent:g}"
            )


_KINDS = {CAPTION: Caption, SEMANTICS: Semantics, PALETTE: Palette, INSTANCES: InstanceMap, MASK: Region}


@dataclass(frozen=True, eq=False)
class Composition:
    """See the module.

    Attributes:
        size: (height, width) of the canvas.
        parts: representations by name.
        picture: (H, W, 3), the picture that local representations were taken from; None where there is none.

    Raises:
        ValueError: a name is unknown, or a local representation has another size than the canvas.
    """

    size: tuple[int, int]
    parts: Mapping[str, Part] = field(default_factory=dict)
    picture: torch.Tensor | None = None

    def __post_init__(self):
        for name, part in self.parts.items():
            if name not in NAMES:
                raise ValueError(f"composition: expected representations from {', '.join(NAMES)}, got {name}")
            kind = _KINDS.get(name, torch.Tensor)
            if not isinstance(part.value, kind):
                raise ValueError(f"{name}: expected a {kind.__name__}, got a {type(part.value).__name__}")
            if name in LOCAL and (given := size_of(part.value)) != self.size:
                raise ValueError(
                    f"{name}: expected the canvas's size {_said(self.size)}, got {_said(given)}; connect Align "
                    "Composition"
                )
        ordered = {name: self.parts[name] for name in NAMES if name in self.parts}
        object.__setattr__(self, "size", tuple(self.size))
        object.__setattr__(self, "parts", MappingProxyType(ordered))

    def __contains__(self, name: str) -> bool:
        return name in self.parts

    def __getitem__(self, name: str) -> Any:
        """The value of a representation that is there."""
        return self.parts[name].value

    def get(self, name: str) -> Any:
        """The value of a representation, or None."""
        return self.parts[name].value if name in self.parts else None

    def with_part(self, name: str, value: Any) -> Composition:
        """The same with a representation added or replaced."""
        return replace(self, parts={**self.parts, name: Part(value)})

    def __str__(self) -> str:
        """A line for each representation."""
        return "\n".join(f"{name}: {described(name, part)}" for name, part in self.parts.items()) or "nothing"


def size_of(value: Any) -> tuple[int, int]:
    """The (height, width) of a local representation."""
    if isinstance(value, InstanceMap):
        value = value.labels
    elif isinstance(value, Region):
        value = value.mask
    return tuple(value.shape)


def pick(
    composition: Composition,
    names: Iterable[str],
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
) -> Composition:
    """The composition with these representations alone, so far as they are there, used in a new way. A strength of 0
    leaves them all out.

    Raises:
        ValueError: a number is out of its range.
    """
    if not strength:
        return Composition(composition.size)
    chosen, used = set(names), Part(None, strength, start_percent, end_percent)
    parts = {name: replace(used, value=part.value) for name, part in composition.parts.items() if name in chosen}
    # Without its maps, nothing needs the picture any more.
    return Composition(composition.size, parts, composition.picture if chosen & set(LOCAL) & set(parts) else None)


def merge(first: Composition, second: Composition, policy: str = REFUSE) -> Composition:
    """All representations of two compositions.

    Args:
        policy: whose representation is taken if both have it; REFUSE takes neither.

    Raises:
        ValueError: the canvases differ while both have local representations, or both have one and it is refused.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
    shared = [name for name in first.parts if name in second.parts]
    if shared and policy == REFUSE:
        raise ValueError(
            f"composition2: expected representations that composition1 does not have, got {', '.join(shared)}; pick "
            "some of them, or choose a policy"
        )
    local = [any(name in LOCAL for name in one.parts) for one in (first, second)]
    if all(local) and first.size != second.size:
        raise ValueError(
            f"composition2: expected the canvas of composition1, {_said(first.size)}, got {_said(second.size)}; "
            "connect Align Composition"
        )
    parts = {**first.parts, **second.parts} if policy == SECOND else {**second.parts, **first.parts}
    without = first.size == NO_CANVAS and not local[0]
    holder = second if (local[1] and not local[0]) or without else first
    # Things are cut out of the picture in which they were found.
    shown = next(
        (one for one in (first, second) if INSTANCES in parts and parts[INSTANCES] is one.parts.get(INSTANCES)), holder
    )
    return Composition(holder.size, parts, shown.picture if shown.size == holder.size else None)


def align(composition: Composition, size: tuple[int, int], fit: str = CROP) -> Composition:
    """The composition on a canvas of another size (height, width).

    Args:
        fit: CROP fills the canvas and cuts off what is over, PAD shows everything and fills the rest, STRETCH changes
            the aspect ratio.

    Raises:
        ValueError: the fit is unknown, or nothing is left of a representation.
    """
    if fit not in FITS:
        raise ValueError(f"fit: expected one of {', '.join(FITS)}, got {fit!r}")
    if size == composition.size:
        return composition
    parts = {}
    for name, part in composition.parts.items():
        value = _aligned(name, part.value, size, fit) if name in LOCAL else part.value
        if value is None:
            remedy = "choose pad" if fit == CROP else "choose a larger canvas"
            raise ValueError(
                f"fit: expected one that keeps a part of the {name}, got {fit}, which loses it; {remedy}, or leave the "
                f"{name} out with Pick Representations"
            )
        parts[name] = replace(part, value=value)
    picture = None if composition.picture is None else _fitted(composition.picture, size, fit, _smooth)
    return Composition(size, parts, picture)


def interpolate(first: Composition, second: Composition, share: float, local_from: str = FIRST) -> Composition:
    """The composition at `share` of the way from one to another.

    Captions, semantics and palettes that both have are interpolated, as in the paper; one that a single composition has
    is kept. Local representations are those of the first or of the second.

    Args:
        share: 0 is the first, 1 the second.
        local_from: FIRST or SECOND.

    Raises:
        ValueError: representations do not fit one another.
    """
    if local_from not in (FIRST, SECOND):
        raise ValueError(f"local_from: expected {FIRST} or {SECOND}, got {local_from!r}")
    base = second if local_from == SECOND else first
    parts = {name: part for name, part in base.parts.items() if name in LOCAL}
    for name in GLOBAL:
        own, others = first.parts.get(name), second.parts.get(name)
        if own is None or others is None:
            if part := own or others:
                parts[name] = part
            continue
        how = {
            key: (1 - share) * getattr(own, key) + share * getattr(others, key)
            for key in ("strength", "start_percent", "end_percent")
        }
        how["strength"] = min(how["strength"], MAX_STRENGTH)  # sums of floats may be a little more
        parts[name] = Part(_BETWEEN[name](own.value, others.value, share), **how)
    other = first if base is second else second
    return Composition(other.size if base.size == NO_CANVAS else base.size, parts, base.picture)


def _between_captions(first: Caption, second: Caption, share: float) -> Caption:
    shares: dict[str, float] = {}
    for caption, weight in ((first, 1 - share), (second, share)):
        for text, part in caption.texts:
            shares[text] = shares.get(text, 0.0) + weight * part
    return Caption(tuple((text, part) for text, part in shares.items() if part))


_BETWEEN = {CAPTION: _between_captions, SEMANTICS: between, PALETTE: Palette.mixed}


def _aligned(name: str, value: Any, size: tuple[int, int], fit: str) -> Any:
    """A local representation on another canvas, or None if nothing of it is left."""
    if isinstance(value, InstanceMap):
        labels = _fitted(value.labels[..., None].float(), size, fit, _hard, fill=0.0)[..., 0].round().int()
        return InstanceMap(labels, value.names) if labels.any() or not value.labels.any() else None
    if isinstance(value, Region):
        # What a canvas has more than the picture is to be drawn.
        mask = _fitted(value.mask[..., None], size, fit, _hard, fill=1.0)[..., 0]
        return Region(_fitted(value.image, size, fit, _smooth), mask) if 0 < float(mask.mean()) < 1 else None
    if name != SKETCH:
        return _fitted(value[..., None], size, fit, _smooth)[..., 0]
    strokes = _fitted(value[..., None], size, fit, resized_strokes, fill=0.0)[..., 0]
    return strokes if strokes.any() else None


_hard = partial(F.interpolate, mode="nearest-exact")
_smooth = partial(F.interpolate, mode="bilinear", antialias=True)


def _fitted(planes: torch.Tensor, size: tuple[int, int], fit: str, resize: Callable, fill: float | None = None):
    """Planes (H, W, C) on a canvas (h, w), resized by `resize`; padded with `fill`, or with their border if it is
    None."""
    height, width = planes.shape[:2]
    scales = size[0] / height, size[1] / width
    scale = {CROP: (max(scales),) * 2, PAD: (min(scales),) * 2, STRETCH: scales}[fit]
    inner = tuple(max(1, round(length * s)) for length, s in zip((height, width), scale, strict=True))
    x = planes.movedim(-1, 0)[None].float()
    x = resize(x, inner)
    for dim, (now, wanted) in enumerate(zip(inner, size, strict=True), 2):
        if now > wanted:
            x = x.narrow(dim, (now - wanted) // 2, wanted)
        elif now < wanted:
            before = (wanted - now) // 2
            pads = [0, 0, before, wanted - now - before] if dim == 2 else [before, wanted - now - before, 0, 0]
            x = F.pad(x, pads, mode="replicate") if fill is None else F.pad(x, pads, value=fill)
    return x[0].movedim(0, -1).clamp(min=0)


def described(name: str, part: Part) -> str:
    """What a representation holds and how it is used, in a few words."""
    value, how = part.value, []
    if isinstance(value, Caption):
        how.append(str(value) or "(empty)")
    elif isinstance(value, Semantics):
        how.append(f"{len(value.embedding)} numbers" + ("" if value.tokens is None else " and tokens"))
    elif isinstance(value, Palette):
        how.append(f"{int((value.histogram > 0).sum())} of {value.table}")
    elif isinstance(value, InstanceMap):
        how.append(", ".join(name or "?" for name in value.names) or "none")
    elif name == MASK:
        how.append(f"{float(value.mask.mean()):.0%} drawn anew")
    else:
        how.append(_said(tuple(value.shape)))
    if part.strength != 1:
        how.append(f"strength {part.strength:g}")
    if (part.start_percent, part.end_percent) != (0, 1):
        how.append(f"from {part.start_percent:g} to {part.end_percent:g}")
    return "; ".join(how)


def _said(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"
