"""Keeps the keys and values of reference passes for further pictures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ...attention.mrsa import KeyLayout
from ..model.sites import Site

RAM, VRAM = "RAM", "VRAM"


@dataclass(eq=False)
class BankGroup:
    """What one configuration has left in the bank: per (noise level, step, role) and site one (2, M, C) tensor.

    The layouts are small and stay on the device, so that a run finds them in place.
    """

    kept_alive: tuple
    layouts: dict[Site, KeyLayout] = field(default_factory=dict)
    entries: dict[tuple, dict[Site, torch.Tensor]] = field(default_factory=dict)
    size: int = 0


class Bank:
    """Keys and values of references across runs, within a limit.

    A group belongs to one configuration of references, schedule, noise, model and layers. When room is needed, groups
    that were used longest ago go; a group never displaces its own entries, since a schedule is read from its
    start again each time and would otherwise displace exactly what it needs next.
    """

    def __init__(self, limit: int, device: str):
        self.limit = limit
        self.device = device
        self.groups: OrderedDict[tuple, BankGroup] = OrderedDict()

    @property
    def size(self) -> int:
        """Bytes held."""
        return sum(group.size for group in self.groups.values())

    def open(self, key: tuple, kept_alive: tuple) -> BankGroup:
        """The group of a configuration, new or known, now the most recently used.

        Args:
            key: says what the entries depend on; objects appear in it by id.
            kept_alive: those objects, so that no other object can get their id.
        """
        group = self.groups.setdefault(key, BankGroup(kept_alive))
        self.groups.move_to_end(key)
        return group

    def put(self, group: BankGroup, entry: tuple, tensors: Mapping[Site, torch.Tensor]) -> None:
        """Keeps the tensors of one reference pass if there is room."""
        needed = sum(t.nbytes for t in tensors.values())
        if needed + group.size > self.limit or entry in group.entries:
            return
        while self.size + needed > self.limit:
            oldest = next(key for key, other in self.groups.items() if other is not group)
            del self.groups[oldest]
        if self.device == RAM:
            tensors = {site: t.to("cpu") for site, t in tensors.items()}
        group.entries[entry] = dict(tensors)
        group.size += needed
