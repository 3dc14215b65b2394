"""A concept: what a customized diffusion model has learned of one thing, as differences of its cross-attention weights.

Concept Weaver (Kwon et al., arXiv 2404.03913) uses a *bank* of models that were fine-tuned with Custom Diffusion
(Kumari et al., arXiv 2212.04488). Such a model differs from its base in the matrices that compute keys and values from
the text, W_i = W + Delta_i, and in the embedding of a new word. Here a concept is only this difference, and all
concepts share one base model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from .lora import factor
from .words import check_word

PARTS = {"k": "keys", "v": "values", "q": "queries", "out": "outputs"}
"""Parts of a cross-attention that a concept may change, and what they compute."""
ENCODERS = ("l", "g", "h")
"""CLIP's text encoders by the names of ComfyUI's tokens: SD 1.x has l, SD 2.x h, SDXL l and g."""


@dataclass(frozen=True, eq=False)
class Delta:
    """The difference of one linear layer, kept in half precision on the CPU.

    Attributes:
        factors: the difference itself, (out, in), or two factors (out, r) and (r, in) whose product it is; r may be 0.
        bias: (out,), the difference of the layer's bias; None means none.

    Raises:
        ValueError: shapes do not fit together, or numbers are not finite in half precision.
    """

    factors: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None = None

    def __post_init__(self):
        shapes = [tuple(f.shape) for f in self.factors]
        two_dimensional = shapes and all(len(shape) == 2 for shape in shapes)
        if not two_dimensional or len(shapes) > 2 or len(shapes) == 2 and shapes[0][1] != shapes[1][0]:
            raise ValueError(f"expected a matrix or two factors of one, got the shapes {shapes}")
        if self.bias is not None and tuple(self.bias.shape) != shapes[0][:1]:
            raise ValueError(f"expected a bias of {shapes[0][0]} numbers, got the shape {tuple(self.bias.shape)}")
        factors = _balanced(*self.factors) if len(self.factors) == 2 else self.factors
        object.__setattr__(self, "factors", tuple(half(f) for f in factors))
        object.__setattr__(self, "bias", None if self.bias is None else half(self.bias))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.factors[0].shape[0], self.factors[-1].shape[1]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """What the difference adds to the layer's output (..., out), for an input x (..., in), in x's dtype. Factors
        are applied one after the other; their product is never computed."""
        for matrix in reversed(self.factors):
            x = x @ matrix.to(x).mT
        return x if self.bias is None else x + self.bias.to(x)

    def matrix(self) -> torch.Tensor:
        """The difference as one matrix (out, in), float."""
        first, *second = (f.float() for f in self.factors)
        return first @ second[0] if second else first

    def compressed(self, rank: int) -> Delta:
        """The nearest difference of a given rank; itself if its factors have no larger rank."""
        if len(self.factors) == 2 and self.factors[0].shape[1] <= rank:
            return self
        return Delta(factor(self.matrix(), rank), self.bias)


def keys_fingerprint(keys: torch.Tensor) -> str:
    """Tells base models of one architecture apart by the weights (C, text width) that compute the keys of their first
    cross-attention. Taken in half precision, so that it is the same for a model's files of any precision."""
    return hashlib.sha256(keys.detach().cpu().half().contiguous().numpy().tobytes()).hexdigest()[:16]


def half(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in half precision, on the CPU.

    Raises:
        ValueError: its values are not finite in it.
    """
    found = tensor.detach().to("cpu", torch.half)
    if not torch.isfinite(found).all():
        raise ValueError("expected numbers that are finite in half precision, got NaN or infinity")
    return found.contiguous()


def _balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product, from factors with similar norms, because trainers leave one so small that half precision would
    lose it. The factor between them is a power of two, which loses no digits."""
    norms = float(up.float().norm()), float(down.float().norm())
    if not all(0 < norm < math.inf for norm in norms):
        return up, down
    shift = 2.0 ** round(math.log2(norms[1] / norms[0]) / 2)
    return up.float() * shift, down.float() / shift


@dataclass(frozen=True, eq=False)
class Concept:
    """One concept. Compared and hashed by identity.

    Attributes:
        name: its name in reports.
        deltas: by the name of a cross-attention in the model's family, the parts (of PARTS) that are changed there.
        class_word: what kind of thing it is ("dog").
        placeholder: the word that its tokens stand for in a prompt, such as "<new1>"; empty without tokens.
        tokens: by text encoder (of ENCODERS), the input embeddings (n, d) of the placeholder.
        strength: factor of the deltas; 1 is as trained, 0 the base model.
        text_patches: changes of text encoders: under "lora" `Adapter`s by layer, under an encoder's name that encoder's
            whole weights by name.
        others: changes of the diffusion model outside cross-attention, by weight: adapters, or ComfyUI's patches.
        source_format: format of the file it comes from.
        base: fingerprint of the base model that the deltas are differences from; empty if the file names none.

    Raises:
        ValueError: an attribute cannot be used; the message says which and why.
    """

    name: str
    deltas: Mapping[str, Mapping[str, Delta]]
    class_word: str = ""
    placeholder: str = ""
    tokens: Mapping[str, torch.Tensor] = field(default_factory=dict)
    strength: float = 1.0
    text_patches: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    source_format: str = ""
    base: str = ""

    def __post_init__(self):
        if not any(self.deltas.values()):
            raise ValueError("concept: expected differences of cross-attention weights, got none")
        if not math.isfinite(self.strength):
            raise ValueError(f"strength: expected a finite number, got {self.strength}")
        for encoder, token in self.tokens.items():
            if encoder not in ENCODERS or token.ndim != 2 or not len(token):
                raise ValueError(f"token: expected rows for a CLIP encoder, got {tuple(token.shape)} for {encoder}")
            if not torch.isfinite(token).all():
                raise ValueError(f"token: expected finite numbers, got NaN or infinity in the row for {encoder}")
        placeholder = self.placeholder.strip()
        if placeholder and not self.tokens:
            raise ValueError(f"placeholder: expected none for a concept without a token, got {placeholder!r}")
        if self.tokens:
            check_word(placeholder, "placeholder")
        object.__setattr__(self, "placeholder", placeholder)
        object.__setattr__(self, "class_word", self.class_word.strip())
        for name in ("deltas", "tokens", "text_patches", "others"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def text_width(self) -> int | None:
        """Width of the text states that keys and values are computed from; None if the concept changes neither."""
        found = (parts.get("k") or parts.get("v") for parts in self.deltas.values())
        return next((delta.shape[1] for delta in found if delta is not None), None)

    def compressed(self, rank: int, after_each: Callable[[], None] = lambda: None) -> Concept:
        """The concept with each delta replaced by the nearest of a given rank (singular value decomposition); biases
        and tokens stay. `after_each` is called after every matrix.

        Raises:
            ValueError: the rank is below 1.
        """
        if rank < 1:
            raise ValueError(f"rank: expected at least 1, got {rank}")

        def small(delta: Delta) -> Delta:
            delta = delta.compressed(rank)
            after_each()
            return delta

        deltas = {key: {part: small(delta) for part, delta in parts.items()} for key, parts in self.deltas.items()}
        return replace(self, deltas=deltas)
