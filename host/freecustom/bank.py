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
    """The bank's tensors for one configuration: keys and values (2, M, C) per (noise level, step, role) and site.

    The layouts are small and stay on the device, where the next run uses them.
    """

    kept_alive: tuple
    layouts: dict[Site, KeyLayout] = field(default_factory=dict)
    entries: dict[tuple, dict[Site, torch.Tensor]] = field(default_factory=dict)
    size: int = 0


class Bank:
    """Keys and values of references, kept across runs up to a limit.

    A group belongs to one configuration of references, schedule, noise, model and layers. When room is needed, the
    least recently used groups are dropped. A group never drops its own entries: each run goes through the schedule from
    its start, so the dropped entries would be the ones that are needed next.

    Args:
        limit: maximum size in bytes.
        device: RAM or VRAM.
    """

    def __init__(self, limit: int, device: str):
        self.limit = limit
        self.device = device
        self.groups: OrderedDict[tuple, BankGroup] = OrderedDict()

    @property
    def size(self) -> int:
        """Number of bytes in the bank."""
        return sum(group.size for group in self.groups.values())

    def open(self, key: tuple, kept_alive: tuple) -> BankGroup:
        """Returns the group of a configuration, new or existing, and marks it as the most recently used.

        Args:
            key: everything that the entries depend on; objects are given by id.
            kept_alive: these objects, so that their ids are not reused.
        """
        # A pass that is larger than the bank leaves groups in which nothing is kept.
        for other in [k for k, held in self.groups.items() if k != key and not held.entries]:
            del self.groups[other]
        group = self.groups.setdefault(key, BankGroup(kept_alive))
        self.groups.move_to_end(key)
        return group

    def put(self, group: BankGroup, entry: tuple, tensors: Mapping[Site, torch.Tensor]) -> None:
        """Keeps the tensors of one reference pass if there is room for them."""
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
