"""Trained differences to the weights of linear layers, whole or as factors.

They are in units of the weight that they change, so that one learning rate fits models of any width: at 0.001 a step
moves an entry by a thousandth of its matrix's root mean square.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch


class Differences(torch.nn.Module):
    """Differences to matrices, which are zero at first.

    Args:
        layers: the base weight (C, D) of each layer, by its name.
        rank: rank of the factors; 0 trains whole matrices.
        seed: seed of the factors.
    """

    def __init__(self, layers: Mapping[str, torch.Tensor], rank: int, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scales = {name: typical_size(weight) for name, weight in layers.items()}
        self.up, self.down = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        for name, weight in layers.items():
            rows, columns = weight.shape
            self.up[_key(name)] = torch.nn.Parameter(torch.zeros(rows, rank or columns))
            if rank:
                self.down[_key(name)] = torch.nn.Parameter(torch.randn(rank, columns, generator=generator) / rank**0.5)

    def output(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What a layer's difference adds to its output (..., C) for the input x (..., D)."""
        key, found = _key(name), x.float() * self.scales[name]
        if key in self.down:
            found = found @ self.down[key].mT
        return (found @ self.up[key].mT).to(x.dtype)

    def factors(self, name: str) -> tuple[torch.Tensor, ...]:
        """A layer's difference as it is now: the matrix (C, D), or its factors (C, rank) and (rank, D)."""
        key = _key(name)
        up = self.up[key].detach() * self.scales[name]
        return (up, self.down[key].detach()) if key in self.down else (up,)


def typical_size(weight: torch.Tensor) -> float:
    """The root mean square of a weight; 1 for one that is zero."""
    return float(weight.detach().float().square().mean().sqrt()) or 1.0


def _key(name: str) -> str:
    """A name that torch's containers of parameters accept."""
    return name.replace(".", "_")
