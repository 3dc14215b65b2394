"""Multi-concept fusion in cross-attention (Concept Weaver, arXiv 2404.03913, section 3.4).

One latent is denoised. In every cross-attention layer the same queries attend to each concept's own keys and values,
and the outputs h_i are mixed with masks M_i that add up to 1 at every token:

    h_fuse = (1 + lambda) [sum_i M_i h_i + M_bg h_bg] - lambda h_base

Each query attends independently of the others, so only the queries inside a concept's mask need its keys and values:
all concepts together cost about as much as one ordinary cross-attention, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch.nn.utils.rnn import pad_sequence

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

NEGLIGIBLE = 1e-4
"""Shares of a token up to this are not computed: they cost more than they change and stay with the background."""


@dataclass(frozen=True, eq=False)
class ConceptGroup:
    """Concepts computed in one attention call, because their prompts are equally long and their regions similar.

    Attributes:
        concepts: indices of the n concepts, in order.
        tokens: (n, m), indices of the layer's tokens in each concept's region; smaller regions are padded.
        share: (n, m, 1), the concept's share of each of these tokens, 0..1; 0 for padding.
        key, value: (n, Lk, C), computed from each concept's prompt with its own weights.
    """

    concepts: tuple[int, ...]
    tokens: torch.Tensor
    share: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def group_concepts(masks: torch.Tensor, keys_values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[ConceptGroup]:
    """Groups the concepts of a layer; concepts with an empty mask are left out.

    In a group the largest region has less than twice the tokens of the smallest, so padding costs less than the
    attention itself.

    Args:
        masks: (N, h, w) or (N, tokens), at the resolution of the layer.
        keys_values: key and value of each concept, (1, Lk, C) each; Lk may differ between concepts.
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
    """Fused cross-attention of all concepts, before the output projection; (B, L, C).

    Tokens in no group keep the base's output, which is the background of a fusion without a background concept.
    Suppression has no effect there, because (1 + lambda) h_base - lambda h_base = h_base.

    Args:
        query: (B, L, C).
        base: (B, L, C), the attention output of the base weights for the base prompt.
        groups: the concepts, including any background concept; their shares of a token add up to at most 1.
        attend: (query, key, value) -> attention output, with the layer's heads.
        suppression: lambda, how far to move away from what the base model would draw (concept-free suppression).
        norm_cap: largest factor by which suppression may increase a token's L1 norm over that of the unsuppressed mix;
            0 sets no bound.
        own_queries: by concept, what its own weights add to the queries, (B, L, C) each.
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
        # One after another: in a single call a GPU would add overlapping concepts in a different order every time.
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
    """L1 norm of each token of (B, L, C), as (B, L, 1); at least in fp32, because half precision could overflow."""
    return x.abs().sum(-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
