"""LoRAs and related adapters: what they do to a weight, as in the forward passes of their trainers.

LoRA (Hu et al., arXiv 2106.09685), with a core (Tucker) for convolutions and with a magnitude (DoRA, Liu et al., arXiv
2402.09353), LoHa and LoKr (Yeh et al., arXiv 2309.14859), OFT (Qiu et al., arXiv 2306.07280), BOFT (Liu et al., arXiv
2311.06243), GLoRA (Chavan et al., arXiv 2306.07967), (IA)^3 (Liu et al., arXiv 2205.05638), full differences and full
weights. `adapter_names` reads the files.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .adapter_names import Group

_KINDS: dict[str, tuple[str, frozenset[str], frozenset[str]]] = {
    kind: (marks, frozenset(needed.split()), frozenset(more.split()))
    for kind, marks, needed, more in (
        ("LoRA", r"up|down|mid|up_bias|magnitude", "up down", "mid alpha dora_scale magnitude up_bias"),
        ("LoHa", r"hada_.*", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2 alpha dora_scale"),
        ("LoKr", r"lokr_.*", "", "alpha dora_scale"),
        ("OFT", r"oft_blocks|rescale", "oft_blocks", "rescale alpha"),
        ("GLoRA", r"[ab][12]|bm", "a1 a2 b1 b2", "alpha"),
        ("IA3", r"on_input", "weight on_input", ""),
        ("a difference", r"diff", "diff", ""),
        ("a weight", r"set_weight", "set_weight", ""),
        ("a norm", r"w_norm", "w_norm", ""),
        ("a bias", r"diff_b|b_norm", "", ""),
    )
}
_BIASES = ("diff_b", "b_norm")


@dataclass(frozen=True, eq=False)
class Adapter:
    """What the tensors of one layer change.

    Attributes:
        group: the tensors by part.
        scale: factor of the difference; None means alpha over rank, or 1 without alpha.

    Raises:
        ValueError: the tensors are of no known kind, or some that the kind needs are missing, or some cannot be used.
    """

    group: Group
    scale: float | None = None

    def __post_init__(self):
        needed, more = _KINDS[self.kind][1:]
        if self.kind == "LoKr":
            # Each side is whole or factored; a factored second side may have a core.
            needed = {part for side in ("lokr_w1", "lokr_w2") for part in self._lokr_side(side)}
            more |= {"lokr_t2"} if "lokr_w2" not in self.group else set()
        first = next(iter(self.group.values())).name
        for part in needed:
            if part not in self.group:
                raise ValueError(f"file: expected a whole {self.kind}, got {first!r} without its {part}")
        used = needed | more | set(_BIASES)
        used -= {"up_bias"} if "magnitude" in self.group else set()
        if ("hada_t1" in self.group) != ("hada_t2" in self.group):
            used -= {"hada_t1", "hada_t2"}
        if {"dora_scale", "magnitude"} <= set(self.group):
            used -= {"dora_scale"}
        unused = next((part for part in self.group if part not in used), None)
        if unused:
            raise ValueError(
                f"file: expected tensors that can all be used, got {self.group[unused].name!r}, which is none of a "
                f"{self.kind}"
            )

    @property
    def kind(self) -> str:
        """Which of the known kinds of adapter it is; raises ValueError if it is none."""
        for kind, (marks, _, _) in _KINDS.items():
            if any(re.fullmatch(marks, part) for part in self.group):
                return kind
        name = next(iter(self.group.values())).name
        raise ValueError(f"file: expected tensors of an adapter, got {name!r} alone")

    def _lokr_side(self, side: str) -> tuple[str, ...]:
        return (side,) if side in self.group else (f"{side}_a", f"{side}_b")

    def _part(self, part: str) -> torch.Tensor:
        return self.group[part].tensor.detach().to("cpu", torch.float32)

    def _factor(self, rank: int) -> float:
        if self.scale is not None:
            return self.scale
        # Trainers treat an alpha of 0 as "no scaling".
        alpha = float(self._part("alpha")) if "alpha" in self.group else 0.0
        return alpha / rank if alpha else 1.0

    def bias(self) -> torch.Tensor | None:
        """What is added to the layer's bias, (out,), or None."""
        found = [self._part(part) for part in _BIASES if part in self.group]
        if "up_bias" in self.group:
            found.append(self._factor(len(self._part("down"))) * self._part("up_bias"))
        return sum(found[1:], found[0]) if found else None

    @property
    def changes_weight(self) -> bool:
        """Whether it changes the weight, and not the bias alone."""
        return self.kind != "a bias"

    @property
    def reads_weight(self) -> bool:
        """Whether the difference depends on the weight's values, and not on its shape alone."""
        return self.kind not in _OF_SHAPE or bool({"dora_scale", "magnitude"} & set(self.group))

    def weight(self, base: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What is added to a weight (out, in) or kernel (out, in, h, w), in fp32: a difference of the same shape, or
        the factors (out, r) and (r, in h w) of a plain LoRA. Only its shape counts unless `reads_weight`.

        Raises:
            ValueError: the tensors do not fit the weight.
        """
        if self.kind == "LoRA" and not {"mid", "dora_scale", "magnitude"} & set(self.group):
            up, down = self._part("up").flatten(1), self._part("down").flatten(1)
            if (up.shape[0], down.shape[1]) != tuple(base.flatten(1).shape) or up.shape[1] != down.shape[0]:
                raise self._misfit(base)
            return up * self._factor(len(down)), down
        try:
            changed = _CHANGES[self.kind](self, base)
        except RuntimeError as error:
            raise self._misfit(base) from error
        if changed.shape != base.shape:
            raise self._misfit(base)
        if "dora_scale" in self.group or "magnitude" in self.group:
            changed = self._with_magnitude(base, changed)
        return (changed,)

    def _misfit(self, base: torch.Tensor) -> ValueError:
        given = ", ".join(f"{named.name} {tuple(named.tensor.shape)}" for named in self.group.values())
        return ValueError(f"file: expected {self.kind} for a weight of shape {tuple(base.shape)}, got {given}")

    def _with_magnitude(self, base: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        """DoRA, equation 5: gives each row of the changed weight the norm in the file, or each column if LyCORIS stored
        norms of the shape (1, in)."""
        merged = base + changed
        lycoris = "magnitude" not in self.group
        given = self._part("dora_scale" if lycoris else "magnitude")
        by_row = not lycoris or given.ndim < 2 or given.shape[0] == base.shape[0] and given.numel() == base.shape[0]
        axes = [axis for axis in range(base.ndim) if axis != (0 if by_row else 1)]
        norm = torch.linalg.vector_norm(merged, dim=axes, keepdim=True)
        if given.numel() != norm.numel():
            raise self._misfit(base)
        return merged * (given.reshape(norm.shape) / (norm + torch.finfo(torch.float32).eps)) - base

    def _lora(self, base: torch.Tensor) -> torch.Tensor:
        up, down = self._part("up").flatten(1), self._part("down")
        if "mid" in self.group:
            product = torch.einsum("or,rs...,si->oi...", up, self._part("mid"), down.flatten(1))
        else:
            product = (up @ down.flatten(1)).reshape(base.shape)
        return product * self._factor(len(down))

    def _loha(self, base: torch.Tensor) -> torch.Tensor:
        halves = []
        for n in "12":
            a, b = self._part(f"hada_w{n}_a"), self._part(f"hada_w{n}_b")
            halves.append(_core(self._part(f"hada_t{n}"), a, b) if "hada_t1" in self.group else a @ b)
        return (halves[0] * halves[1]).reshape(base.shape) * self._factor(len(self._part("hada_w1_b")))

    def _lokr(self, base: torch.Tensor) -> torch.Tensor:
        rank, sides = None, []
        for side in ("lokr_w1", "lokr_w2"):
            parts = [self._part(part) for part in self._lokr_side(side)]
            if len(parts) == 2:
                rank = len(parts[1])
                core = side == "lokr_w2" and "lokr_t2" in self.group
                parts = [_core(self._part("lokr_t2"), *parts) if core else parts[0] @ parts[1]]
            sides += parts
        first, second = sides
        product = torch.kron(first[(...,) + (None,) * (second.ndim - 2)], second.contiguous()).reshape(base.shape)
        factor = self._factor(rank) if rank else 1.0 if self.scale is None else self.scale
        return product * factor

    def _oft(self, base: torch.Tensor) -> torch.Tensor:
        blocks = self._part("oft_blocks")
        skew = blocks - blocks.mT
        # Alpha bounds the norm of the skew matrices, per row of the weight; 0 means no bound.
        bound = float(self._part("alpha")) * len(base) if "alpha" in self.group else 0.0
        norm = float(skew.norm())
        if 0 < bound < norm:
            skew = skew * (bound / norm)
        eye = torch.eye(skew.shape[-1])
        turn = (eye + skew) @ torch.linalg.inv(eye - skew)
        turned = _butterfly(turn, base) if turn.ndim == 4 else _blockwise(turn, base)
        if "rescale" in self.group:
            turned = turned * self._part("rescale").reshape(-1, *[1] * (base.ndim - 1))
        return turned - base

    def _glora(self, base: torch.Tensor) -> torch.Tensor:
        a1, a2, b1, b2 = (self._part(part).flatten(1) for part in ("a1", "a2", "b1", "b2"))
        if a1.shape[0] != base.shape[1] or b1.shape[0] != base.shape[0]:
            a1, a2, b1, b2 = a2, a1, b2, b1  # LyCORIS once named the factors the other way round
        turned = torch.einsum("oi...,ij->oj...", base, a1 @ a2)
        return (turned + (b1 @ b2).reshape(base.shape)) * self._factor(len(a2))

    def _ia3(self, base: torch.Tensor) -> torch.Tensor:
        axis = 1 if self._part("on_input") else 0
        return base * self._part("weight").reshape([-1 if n == axis else 1 for n in range(base.ndim)])

    def _full(self, base: torch.Tensor) -> torch.Tensor:
        return self._part("w_norm" if "w_norm" in self.group else "diff").reshape(base.shape)

    def _set(self, base: torch.Tensor) -> torch.Tensor:
        return self._part("set_weight").reshape(base.shape) - base


_CHANGES = {
    "LoRA": Adapter._lora,
    "LoHa": Adapter._loha,
    "LoKr": Adapter._lokr,
    "OFT": Adapter._oft,
    "GLoRA": Adapter._glora,
    "IA3": Adapter._ia3,
    "a difference": Adapter._full,
    "a norm": Adapter._full,
    "a weight": Adapter._set,
}
_OF_SHAPE = ("LoRA", "LoHa", "LoKr", "a difference", "a norm")
"""Kinds whose difference does not depend on the values of the weight."""


def _core(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Tucker product of a core (r, r, h, w) with factors (r, out) and (r, in): (out, in, h, w)."""
    return torch.einsum("ij...,jr,ip->pr...", core, b, a)


def _blockwise(turn: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """OFT, equation 4: each of the blocks (k, n, n) rotates n rows of a weight."""
    rows = base.reshape(*turn.shape[:2], *base.shape[1:])
    return torch.einsum("knm,kn...->km...", turn, rows).reshape(base.shape)


def _butterfly(turn: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """BOFT, equation 5: each of the stages (m, k, b, b) rotates rows twice as far apart as the stage before."""
    half = turn.shape[-1] // 2
    for stage, blocks in enumerate(turn):
        stride = 2**stage * half
        shape = (-1, 2, stride, *base.shape[1:])
        mixed = base.reshape(shape).transpose(1, 2)
        turned = torch.einsum("kij,kj...->ki...", blocks, mixed.reshape(*blocks.shape[:2], *base.shape[1:]))
        base = turned.reshape(mixed.shape).transpose(1, 2).reshape(base.shape)
    return base
