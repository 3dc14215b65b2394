"""Multi-concept fusion in cross-attention (Concept Weaver, arXiv 2404.03913, section 3.4).

One latent is denoised. At every cross-attention layer the same queries attend to each concept's own keys and values,
and the outputs are mixed by masks that add up to 1 at every token:

    h_fuse = (1 + lambda) [sum_i M_i h_i + M_bg h_bg] - lambda h_base

Attention is computed for each query alone, so only the queries inside a concept's mask need its keys and values: all
concepts together cost about one ordinary cross-attention, however many they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.utils.rnn import pad_sequence

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

NEGLIGIBLE = 1e-4
"""Shares of a token below this cost more than they change and go to the background."""


@dataclass(frozen=True, eq=False)
class ConceptGroup:
    """Concepts of one attention call, because their prompts are as long and their regions about as large.

    Attributes:
        concepts: which they are, n numbers in order.
        tokens: (n, m) numbers of the layer's tokens at which each concept is seen; smaller regions are filled up.
        share: (n, m, 1) the concept's part of each of them, 0..1; what fills up has none.
        key, value: (n, Lk, C) that each concept's prompt gives through its own weights.
    """

    concepts: tuple[int, ...]
    tokens: torch.Tensor
    share: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def group_concepts(masks: torch.Tensor, keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[ConceptGroup]:
    """The concepts of a layer in groups; one whose mask is empty is left out.

    Regions are in one group while the larger has less than twice the tokens of the smaller, so filling up costs less
    than the attention itself.

    Args:
        masks: (N, h, w) or (N, tokens), the layer's.
        keys_values: N times key and value, (1, Lk, C) each; Lk may differ between concepts.
    """
    alike: dict[tuple[int, int], list[tuple]] = {}
    for i, (mask, (key, value)) in enumerate(zip(masks.flatten(1), keys_values, strict=True)):
        tokens = torch.nonzero(mask > NEGLIGIBLE).flatten()
        if len(tokens):
            alike.setdefault((key.shape[1], len(tokens).bit_length()), []).append((i, tokens, mask[tokens], key, value))
    found = []
    for group in alike.values():
        concepts, tokens, shares, keys, values = zip(*group, strict=True)
        padded, share = (pad_sequence(list(rows), batch_first=True) for rows in (tokens, shares))
        found.append(ConceptGroup(concepts, padded, share[..., None], torch.cat(keys), torch.cat(values)))
    return found


def fuse(
    query: torch.Tensor,
    base: torch.Tensor,
    groups: Sequence[ConceptGroup],
    attend: Attend,
    suppression: float = 0.0,
    norm_cap: float = 0.0,
    own_queries: Mapping[int, torch.Tensor] = MappingProxyType({}),
) -> torch.Tensor:
    """Cross-attention of all concepts, before the output projection; (B, L, C).

    What is in no group stays the base's, which is the background of a fusion without a background concept: there
    suppression has no effect, for (1 + lambda) h_base - lambda h_base = h_base.

    Args:
        query: (B, L, C).
        base: (B, L, C), the attention of the base weights to the base prompt.
        groups: the concepts, a background concept among them; their shares of a token add up to at most 1.
        attend: (query, key, value) -> attention, with the layer's heads.
        suppression: lambda, how far to move away from what the base model would draw (concept-free suppression).
        norm_cap: the most by which suppression may lengthen a token (L1 norm, as a ratio to the unsuppressed mix);
            0 sets no bound.
        own_queries: by concept, what its own weights add to the queries (B, L, C).
    """
    rows, mixed = len(query), base.clone()
    for group in groups:
        key, value = (x.expand(rows, -1, -1, -1).flatten(0, 1) for x in (group.key, group.value))
        queries = query[:, group.tokens]
        for row, concept in enumerate(group.concepts):
            if concept in own_queries:
                queries[:, row] += own_queries[concept][:, group.tokens[row]]
        output = attend(queries.flatten(0, 1), key, value).unflatten(0, (rows, -1))
        # From the base towards the concept: shares below 1 leave the rest to the base or to the next concept.
        change = group.share * (output - base[:, group.tokens])
        # One after another: where concepts meet, a GPU would add them in another order every time.
        for tokens, part in zip(group.tokens, change.unbind(1), strict=True):
            mixed.index_add_(1, tokens, part)
    if suppression == 0:
        return mixed
    fused = mixed + suppression * (mixed - base)
    if norm_cap > 0:
        length, bound = _length(fused), norm_cap * _length(mixed)
        fused = fused * (bound / length.clamp(min=torch.finfo(length.dtype).tiny)).clamp(max=1).to(fused.dtype)
    return fused


def _length(x: torch.Tensor) -> torch.Tensor:
    """L1 norm of each token (B, L, C), (B, L, 1); in half precision a wide one would be infinite."""
    return x.abs().sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
