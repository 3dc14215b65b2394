"""Instances: which thing is where, and the color codes in which models take such a map."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F

from .color import hsv_to_srgb

OWN, ADE20K, GRAYS = "composition", "ADE20K", "grays"
CODINGS = (OWN, ADE20K, GRAYS)
_GOLDEN, _SATURATION, _VALUES, _NEXT_HUE = 0.61803, 0.75, (1.0, 0.8, 0.6), 0.05
_SYNONYMS = {
    "person": ("man", "men", "woman", "women", "boy", "girl", "child", "children", "people"),
    "animal": ("dog", "cat", "horse", "cow", "sheep", "bird", "bear", "elephant", "zebra", "giraffe", "fish"),
    "bicycle": ("bike",),
    "minibike": ("motorcycle", "motorbike"),
    "airplane": ("plane",),
    "sofa": ("couch",),
    "glass": ("cup", "mug"),
    "windowpane": ("window",),
    "television receiver": ("tv", "television"),
    "refrigerator": ("fridge",),
    "earth": ("ground",),
}
"""Everyday nouns for some of ADE20K's classes."""


@dataclass(frozen=True, eq=False)
class InstanceMap:
    """Which thing is at each pixel.

    Attributes:
        labels: (H, W), int32: 0 for the background, 1 for the first thing and so on.
        names: the noun of each thing; empty where it is not known.

    Raises:
        ValueError: labels name things that are not there.
    """

    labels: torch.Tensor
    names: tuple[str, ...]

    def __post_init__(self):
        if self.labels.ndim != 2 or int(self.labels.max()) > len(self.names) or int(self.labels.min()) < 0:
            raise ValueError(
                f"instances: expected labels (height, width) from 0 to {len(self.names)}, got "
                f"{tuple(self.labels.shape)} up to {int(self.labels.max())}"
            )
        object.__setattr__(self, "labels", self.labels.to(torch.int32))

    def mask(self, number: int) -> torch.Tensor:
        """The mask (H, W) of thing `number`, from 0."""
        return (self.labels == number + 1).float()


def instance_map(masks: torch.Tensor, names: Sequence[str]) -> InstanceMap:
    """The map of masks (n, H, W); where they overlap, the smaller thing is in front.

    Raises:
        ValueError: there is a name too many or too few, or a mask is empty.
    """
    if len(names) != len(masks):
        raise ValueError(f"names: expected one for each of {len(masks)} masks, got {len(names)}")
    binary = masks > 0.5
    sizes = binary.flatten(1).sum(1)
    if (sizes == 0).any():
        empty = int((sizes == 0).nonzero()[0, 0])
        raise ValueError(f"masks: expected white on each thing, got an empty mask for {names[empty] or empty + 1}")
    labels = torch.zeros(masks.shape[1:], dtype=torch.int32)
    for number in sizes.argsort(descending=True, stable=True).tolist():
        labels[binary[number].cpu()] = number + 1
    return InstanceMap(labels, tuple(names))


def coded(instances: InstanceMap, coding: str = OWN) -> torch.Tensor:
    """A picture (H, W, 3) of a map.

    Args:
        coding: OWN: a hue for each noun, darker for its second and third thing and a little further for the next three,
            with black lines between things of one noun. ADE20K: the colors in which ControlNets for segments were
            trained; nouns without a class of its 150 are gray, and the background is black. GRAYS: from black to white
            in the order of the things.

    Raises:
        ValueError: the coding is unknown.
    """
    if coding not in CODINGS:
        raise ValueError(f"coding: expected one of {', '.join(CODINGS)}, got {coding!r}")
    names = instances.names
    if coding == GRAYS:
        levels = torch.linspace(0, 1, len(names) + 1)
        return levels[instances.labels.long()][..., None].expand(-1, -1, 3).contiguous()
    colors = [(0.0, 0.0, 0.0), *(_ade_color(name) for name in names)]
    if coding == OWN:
        kinds = list(map(_kind, names))
        earlier = [kinds[:i].count(kind) for i, kind in enumerate(kinds)]
        hsv = torch.tensor(
            [
                [
                    (class_number(name) * _GOLDEN + nth // len(_VALUES) * _NEXT_HUE) % 1,
                    _SATURATION,
                    _VALUES[nth % len(_VALUES)],
                ]
                for name, nth in zip(names, earlier, strict=True)
            ]
        ).view(-1, 3)
        colors = [(0.0, 0.0, 0.0), *map(tuple, hsv_to_srgb(hsv).tolist())]
    picture = torch.tensor(colors)[instances.labels.long()]
    if coding == OWN:
        picture[_seams(instances)] = 0
    return picture


def class_number(name: str) -> int:
    """The number of a noun, the same on every machine."""
    return zlib.crc32(_kind(name).encode())


def _kind(name: str) -> str:
    return name.strip().lower()


@cache
def _ade_table() -> dict[str, tuple[float, float, float]]:
    """The colors of ADE20K's 150 classes by name."""
    table = json.loads((Path(__file__).parent / "ade20k.json").read_text(encoding="utf-8"))
    return {name: _rgb(digits) for name, digits in table.items()}


def _rgb(digits: str) -> tuple[float, float, float]:
    red, green, blue = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    return red, green, blue


def ade_class(name: str) -> str | None:
    """The class of ADE20K for a noun, singular or plural; None if it has none."""
    name, table = name.strip().lower(), _ade_table()
    meant = {word: kind for kind, words in _SYNONYMS.items() for word in words}
    forms = (name, name.removesuffix("s"), name.removesuffix("es"))
    return next((found for form in forms if (found := meant.get(form, form)) in table), None)


def _ade_color(name: str) -> tuple[float, float, float]:
    found = ade_class(name)
    return _ade_table()[found] if found else (0.5, 0.5, 0.5)


def _seams(instances: InstanceMap) -> torch.Tensor:
    """Pixels (H, W), boolean, whose neighbor to the right or below is another thing of the same noun."""
    kinds = {kind: i + 1 for i, kind in enumerate(dict.fromkeys(map(_kind, instances.names)))}
    kind_of = torch.tensor([0, *(kinds[_kind(name)] for name in instances.names)])
    labels = instances.labels.long()
    seams = torch.zeros_like(labels, dtype=torch.bool)
    for dim in (0, 1):
        length = labels.shape[dim]
        here, there = labels.narrow(dim, 0, length - 1), labels.narrow(dim, 1, length - 1)
        seam = (here != there) & (kind_of[here] == kind_of[there]) & (here > 0)
        seams |= F.pad(seam, (0, 1) if dim else (0, 0, 0, 1))
    return seams
