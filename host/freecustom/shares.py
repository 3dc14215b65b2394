"""Attention shares: recorded while a picture is sampled, and found by the latent that sampling returned.

A record belongs to the node that made it. Every sampling with its MODEL stores its maps in the record under the
fingerprint of the resulting latent. So a view finds the maps of its own picture, no matter which of several samplers
ran last, or whether ComfyUI took the latent from its cache.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import comfy.model_management
import torch

from ...attention.heatmap import resize
from ..model.sites import Site, parse_numbers

ALL = "all"
PICTURES_KEPT = 16


@dataclass(frozen=True, eq=False)
class ShareRecord:
    """What to record, and the maps of the last pictures.

    Attributes:
        nouns: names of the subjects, in the order of the maps.
        steps: sampling steps to record; None means all.
        sites: the layers to record; empty if there is nothing to record.
        pictures: maps (B, 1 + N, h, w) by the fingerprint of the latent, on the CPU, the picture's own share first;
            None if no references were used in the sampling.
    """

    nouns: tuple[str, ...]
    steps: frozenset[int] | None
    sites: frozenset[Site]
    pictures: OrderedDict[str, torch.Tensor | None] = field(default_factory=OrderedDict)

    @classmethod
    def of(cls, steps: str, blocks: str, sites: Sequence[Site], nouns: Sequence[str]) -> ShareRecord:
        """Creates a record for "all" or numbered steps and self-attention layers.

        Raises:
            ValueError: a list cannot be parsed, or references are used in none of the layers.
        """
        chosen = frozenset(sites)
        if blocks.strip() != ALL:
            numbers = parse_numbers(blocks, "blocks")
            chosen = frozenset(site for site in sites if site.index in numbers)
            if not chosen:
                seen = ", ".join(str(site.index) for site in sites)
                raise ValueError(f"blocks: expected some of those where references are seen ({seen}), got {blocks!r}")
        return cls(tuple(nouns), None if steps.strip() == ALL else parse_numbers(steps, "steps"), chosen)

    def find(self, samples: torch.Tensor) -> torch.Tensor | None:
        """Returns the maps (B, 1 + N, h, w) of a sampled latent; None if there was nothing to record.

        Raises:
            ValueError: the latent is not from a recorded sampling.
        """
        if not self.sites:
            return None
        name = latent_fingerprint(samples)
        if name not in self.pictures:
            raise ValueError(
                "latent: expected the unchanged output of a sampler that uses the recorded MODEL, got another latent; "
                "if it is that, change the seed once so that it samples again"
            )
        return self.pictures[name]

    def keep(self, samples: torch.Tensor, maps: torch.Tensor | None) -> None:
        """Stores the maps of a latent; the oldest are dropped when there are too many."""
        self.pictures[latent_fingerprint(samples)] = maps
        while len(self.pictures) > PICTURES_KEPT:
            self.pictures.popitem(last=False)


class ShareRun:
    """The sums of one sampling, per token grid."""

    def __init__(self, record: ShareRecord, noise: torch.Tensor):
        self.record = record
        self.size = tuple(noise.shape[-2:])
        self.totals: dict[tuple[int, int], torch.Tensor] = {}
        self.counts: dict[tuple[int, int], int] = {}

    def wants(self, site: Site, step: int) -> bool:
        """Whether this site is recorded at this step."""
        return site in self.record.sites and (self.record.steps is None or step in self.record.steps)

    def add(self, shares: torch.Tensor, conditionings: int, grid: tuple[int, int]) -> None:
        """Adds the shares (conditionings * B, h * w, 1 + N) of one call, averaged over the conditionings."""
        maps = shares.unflatten(0, (conditionings, -1)).mean(0).unflatten(1, grid).movedim(-1, 1)
        self.totals[grid] = self.totals[grid] + maps if grid in self.totals else maps
        self.counts[grid] = self.counts.get(grid, 0) + 1

    def finish(self, samples: torch.Tensor) -> None:
        """Stores the mean over all recorded calls in the record, or None if there were none."""
        if not self.totals:
            self.record.keep(samples, None)
            return
        fine = [
            resize(total.flatten(0, 1), self.size).view(*total.shape[:2], *self.size) for total in self.totals.values()
        ]
        self.record.keep(samples, (torch.stack(fine).sum(0) / sum(self.counts.values())).cpu())


def latent_fingerprint(samples: torch.Tensor) -> str:
    """Hash of a latent's content, which stays the same when ComfyUI moves it between nodes."""
    moved = samples.detach().to("cpu", comfy.model_management.intermediate_dtype()).contiguous()
    return hashlib.sha256(moved.view(torch.uint8).numpy().tobytes()).hexdigest()
