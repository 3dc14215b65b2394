"""Multi-concept fusion in cross-attention (Concept Weaver, arXiv 2404.03913, section 3.4).

One latent is denoised. At every cross-attention layer each concept i answers the same queries with its own keys and
values, and the answers are put together by masks that add up to 1 at every token:

    h_fuse = (1 + lambda) [sum_i M_i h_i + M_bg h_bg] - lambda h_base

Attention is computed for each query alone, so a concept need only answer where its mask is: all concepts together cost
about one ordinary cross-attention, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

NEGLIGIBLE = 1e-4
"""Shares of a token below this are not worth an attention of their own and go to the background."""


@dataclass(frozen=True, eq=False)
class Region:
    """Where one concept is seen at a layer.

    Attributes:
        tokens: (n,) numbers of the layer's tokens, each at most once.
        share: (n, 1) the concept's part of each of them, 0..1.
    """

    tokens: torch.Tensor
    share: torch.Tensor

    @classmethod
    def of(cls, mask: torch.Tensor) -> Region | None:
        """The region of a layer's mask (h, w) or (tokens,); None where it is empty."""
        flat = mask.flatten()
        tokens = torch.nonzero(flat > NEGLIGIBLE).flatten()
        return cls(tokens, flat[tokens, None]) if len(tokens) else None


@dataclass(frozen=True, eq=False)
class Voice:
    """A concept at a layer: its region, and the keys and values that its prompt gives through its own weights.

    Attributes:
        region: where it is seen.
        key, value: (1, Lk, C); Lk may differ between concepts.
    """

    region: Region
    key: torch.Tensor
    value: torch.Tensor


def fuse(
    query: torch.Tensor,
    base: torch.Tensor,
    voices: Sequence[Voice],
    attend: Attend,
    suppression: float = 0.0,
    norm_cap: float = 0.0,
) -> torch.Tensor:
    """Cross-attention of all concepts, before the output projection; (B, L, C).

    What no voice claims stays the base's, which is the background of a fusion without a background concept: there
    suppression has no effect, for (1 + lambda) h_base - lambda h_base = h_base.

    Args:
        query: (B, L, C).
        base: (B, L, C), the attention of the base weights to the base prompt.
        voices: the concepts, a background concept among them; their shares of a token add up to at most 1.
        attend: (query, key, value) -> attention, with the layer's heads.
        suppression: lambda, how far to move away from what the base model would draw (concept-free suppression).
        norm_cap: the most by which suppression may lengthen a token (L1 norm, as a ratio to the unsuppressed mix);
            0 sets no bound.
    """
    mixed = base.clone()
    for voice in voices:
        tokens, share = voice.region.tokens, voice.region.share
        rows = len(query)
        answer = attend(query[:, tokens], voice.key.expand(rows, -1, -1), voice.value.expand(rows, -1, -1))
        # From the base towards the concept: shares below 1 leave the rest to the base or to the next voice.
        mixed[:, tokens] += share * (answer - base[:, tokens])
    if suppression == 0:
        return mixed
    fused = mixed + suppression * (mixed - base)
    if norm_cap > 0:
        lengths = fused.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(fused.dtype).tiny)
        fused = fused * (norm_cap * mixed.abs().sum(-1, keepdim=True) / lengths).clamp(max=1)
    return fused
