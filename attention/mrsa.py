"""Multi-reference self-attention (FreeCustom, arXiv 2405.13870): a picture attends to its references.

In a self-attention layer the queries of the target, the picture being generated, attend to the target's own keys and to
those keys of each reference that are inside its subject's mask. With s = q k^T / sqrt(d), and weight w_i and token mask
m_i of subject i:

- `official` (the published code): softmax over [s_own, s_i + w_i where m_i = 1]; keys outside the mask are left out.
- `paper` (section 3.3): softmax over [s_own, w_i m_i s_i]; a key outside the mask has the logit 0 and keeps its share.
- `paper_drop`: the paper's product inside the mask; keys outside the mask are left out.

All three are computed as ordinary attention over fewer keys. Keys that are left out are not gathered, the product with
w is applied to the key, and the keys outside the mask in `paper`, which all have the logit 0, become one zero key whose
bias is the logarithm of their number and whose value is their mean.

Attention itself is passed in as `attend(q, k, v, bias)`, with q (B, Lq, C), k and v (B, Lk, C), and bias (1, 1, 1, Lk),
which is added to the logits of all heads and queries, or None. It splits C into heads itself and returns (B, Lq, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FORMULAS = ("official", "paper", "paper_drop")

MAX_BALANCE_BOOST = 3.0
"""Upper bound of what balancing adds to a small subject's log-odds, so that a speck does not take over the picture."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@dataclass(frozen=True)
class KeyLayout:
    """What the M reference keys of a layer are; the same at every step, whatever the content of the keys.

    Attributes:
        bias: (M,) float, added to the keys' logits.
        owner: (M,) long, the subject that each key belongs to.
        tokens: (M,) float, the number of tokens of the reference that each key comes from.
    """

    bias: torch.Tensor
    owner: torch.Tensor
    tokens: torch.Tensor

    @staticmethod
    def join(layouts: Sequence[KeyLayout]) -> KeyLayout:
        """Concatenates the layouts of several sets of keys."""
        return KeyLayout(*(torch.cat([getattr(x, name) for x in layouts]) for name in ("bias", "owner", "tokens")))

    def __len__(self) -> int:
        return len(self.owner)


@dataclass(frozen=True)
class KeyPlan:
    """How to select the keys of a layer from a batch of R references with L tokens each.

    Attributes:
        gather: (G,) long, indices into the flattened (R * L) tokens.
        scale: (G,) float or None, factor of each gathered key.
        pool: (P, R * L) float or None; each row averages the tokens outside one subject's mask for its zero key.
        layout: layout of the G + P keys.
    """

    gather: torch.Tensor
    scale: torch.Tensor | None
    pool: torch.Tensor | None
    layout: KeyLayout

    def collect(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Selects keys and values, each (G + P, C), from the references' k and v, each (R, L, C)."""
        keys = k.flatten(0, 1).index_select(0, self.gather)
        flat_values = v.flatten(0, 1)
        values = flat_values.index_select(0, self.gather)
        if self.scale is not None:
            keys = keys * self.scale.to(keys.dtype)[:, None]
        if self.pool is not None:
            means = (self.pool @ flat_values.float()).to(values.dtype)
            keys = torch.cat([keys, keys.new_zeros(means.shape)])
            values = torch.cat([values, means])
        return keys, values


def plan_keys(
    token_masks: torch.Tensor,
    rows: Sequence[int],
    n_rows: int,
    weights: Sequence[float],
    biases: Sequence[float],
    owners: Sequence[int],
    formula: str,
    device: torch.device | str = "cpu",
) -> KeyPlan:
    """Plans which keys of a batch of references the target attends to in one layer.

    Args:
        token_masks: (S, L) boolean, the tokens of each of S subjects.
        rows: for each subject, the row of the batch that shows it; several subjects may share a row.
        n_rows: R, the number of rows in the batch.
        weights: w_i of each subject, positive.
        biases: additional log-odds of each subject (balance); zeros for the published behavior.
        owners: index of each subject among all subjects of the picture.
        formula: one of FORMULAS.
        device: device of the plan's tensors.

    Raises:
        ValueError: the formula is unknown.
    """
    if formula not in FORMULAS:
        raise ValueError(f"formula: expected one of {', '.join(FORMULAS)}, got {formula!r}")
    n_tokens = token_masks.shape[1]
    gather, scale, bias, owner, pools = [], [], [], [], []
    sink_bias, sink_owner = [], []
    for mask, row, weight, extra, index in zip(token_masks, rows, weights, biases, owners, strict=True):
        kept = torch.nonzero(mask.cpu()).flatten()
        gather.append(kept + row * n_tokens)
        scale.append(torch.full(kept.shape, float(weight)))
        bias.append(torch.full(kept.shape, float(extra) + (weight if formula == "official" else 0.0)))
        owner.append(torch.full(kept.shape, index, dtype=torch.long))
        n_masked = n_tokens - len(kept)
        if formula == "paper" and n_masked:
            pool = torch.zeros(n_rows, n_tokens)
            pool[row] = (~mask.cpu()).float() / n_masked
            pools.append(pool.flatten())
            sink_bias.append(math.log(n_masked) + float(extra))
            sink_owner.append(index)
    layout = KeyLayout(
        bias=torch.cat([*bias, torch.tensor(sink_bias)]).to(device),
        owner=torch.cat([*owner, torch.tensor(sink_owner, dtype=torch.long)]).to(device),
        tokens=torch.full((sum(map(len, gather)) + len(pools),), float(n_tokens), device=device),
    )
    return KeyPlan(
        gather=torch.cat(gather).to(device),
        scale=None if formula == "official" else torch.cat(scale).to(device),
        pool=torch.stack(pools).to(device) if pools else None,
        layout=layout,
    )


def bias_row(layout: KeyLayout, n_own: int, own_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """The bias of all keys of a layer, (1, 1, 1, n_own + M): the target's own keys first, with bias 0.

    A reference with more tokens than the target would weigh more for its size alone. Adding ln(own / reference tokens)
    compensates for that, so that a weight means the same at every resolution; for equal sizes it is exactly 0.

    Args:
        layout: layout of the M reference keys.
        n_own: number of the target's own keys.
        own_tokens: number of tokens of the target's picture.
        dtype: dtype of the queries.
    """
    references = layout.bias + torch.log(own_tokens / layout.tokens)
    return torch.cat([references.new_zeros(n_own), references]).to(dtype).view(1, 1, 1, -1)


@dataclass(frozen=True)
class QueryGroup:
    """Queries that see the same subjects.

    Attributes:
        queries: (n,) long, their indices.
        keys: indices of all keys they see, (m,) long, or a slice if these are contiguous.
        plain: whether they see the target's own keys alone.
    """

    queries: torch.Tensor
    keys: torch.Tensor | slice
    plain: bool


def query_groups(visible: torch.Tensor, owner: torch.Tensor, n_own: int) -> list[QueryGroup]:
    """Groups the queries by the subjects they may see, so that regions need no (Lq, Lk) bias.

    Args:
        visible: (N, Lq) boolean, the queries that see each subject: those of the picture where it may appear, never
            those of the text in joint attention.
        owner: (M,) long, the subject of each reference key.
        n_own: number of the target's own keys, which every query sees.
    """
    sets, member = torch.unique(visible.cpu().T, dim=0, return_inverse=True)
    groups = []
    for index, subjects in enumerate(sets):
        queries = torch.nonzero(member == index).flatten().to(owner.device)
        seen = torch.nonzero(subjects[owner.cpu()]).flatten() + n_own
        if len(seen) in (0, len(owner)):
            keys = slice(0, n_own + len(seen))
        else:
            keys = torch.cat([torch.arange(n_own), seen]).to(owner.device)
        groups.append(QueryGroup(queries, keys, plain=len(seen) == 0))
    return groups


def multi_reference_attention(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    groups: Sequence[QueryGroup] | None = None,
) -> torch.Tensor:
    """Attention of the target over its own keys and the references'; (B, Lq, C).

    Args:
        attend: see the module docstring.
        q, k, v: the target's, (B, Lq, C) and (B, Lk, C).
        keys, values: the references', (M, C), shared by the whole batch.
        bias: (1, 1, 1, Lk + M) from `bias_row`.
        groups: the queries by the keys they see; with None all queries see all keys.
    """
    k = torch.cat([k, keys.expand(len(k), -1, -1)], dim=1)
    v = torch.cat([v, values.expand(len(v), -1, -1)], dim=1)
    return _attend_in_groups(attend, q, k, v, bias, groups)


def subject_shares(
    attend: Attend,
    q: torch.Tensor,
    k: torch.Tensor,
    keys: torch.Tensor,
    bias: torch.Tensor,
    owner: torch.Tensor,
    n_subjects: int,
    heads: int,
    groups: Sequence[QueryGroup] | None = None,
) -> torch.Tensor:
    """How much of each query's attention goes to the picture itself and to each subject.

    Averaged over heads; (B, Lq, 1 + n_subjects), the picture first. The shares of a query sum to 1. This is the same
    attention with one-hot values that mark the owner of each key, so any attention kernel can compute it and the (Lq,
    Lk) matrix is never formed.

    Args:
        attend: see the module docstring.
        q, k: the target's, (B, Lq, C) and (B, Lk, C).
        keys, bias, groups: as in `multi_reference_attention`.
        owner: (M,) long, the subject of each reference key.
        n_subjects: number of subjects.
        heads: number of attention heads.
    """
    batch, n_own, channels = k.shape
    width = channels // heads
    whose = torch.cat([owner.new_zeros(n_own), owner + 1])
    k = torch.cat([k, keys.expand(batch, -1, -1)], dim=1)
    shares = []
    for first in range(0, 1 + n_subjects, width):
        marks = (whose[:, None] == torch.arange(first, first + width, device=whose.device)).to(q.dtype)
        out = _attend_in_groups(attend, q, k, marks.repeat(1, heads).expand(batch, -1, -1), bias, groups)
        shares.append(out.unflatten(-1, (heads, width)).float().mean(dim=-2))
    return torch.cat(shares, dim=-1)[..., : 1 + n_subjects]


def _attend_in_groups(attend, q, k, v, bias, groups):
    if groups is None:
        return attend(q, k, v, bias)
    out = torch.empty_like(q)
    for group in groups:
        seen = group.keys
        seen_bias = None if group.plain else bias[..., seen]
        out[:, group.queries] = attend(q[:, group.queries], k[:, seen], v[:, seen], seen_bias)
    return out


def keep_style(plain: torch.Tensor, mixed: torch.Tensor, style_fidelity: float) -> torch.Tensor:
    """Output of the unconditional branch, as in the published code: (1 - sf) * multi-reference + sf * plain."""
    return (1.0 - style_fidelity) * mixed + style_fidelity * plain


def balance_biases(coverages: Sequence[float], strength: float) -> list[float]:
    """Log-odds that raise subjects covering little of their reference and lower those covering much of it.

    strength * ln(mean coverage / coverage), at most MAX_BALANCE_BOOST. Without it a subject's odds grow with its number
    of keys: a necklace next to a dog has 1/43 of the dog's odds.

    Args:
        coverages: share of each reference that its subject covers, positive.
        strength: 0 (off, as published) to 1 (size does not matter).
    """
    mean = sum(coverages) / len(coverages)
    return [min(MAX_BALANCE_BOOST, strength * math.log(mean / c)) for c in coverages]


def crowding(coverages: Sequence[float], weights: Sequence[float]) -> float:
    """Attention odds of all references against the picture itself if all logits are equal: the sum of c_i e^w_i.

    The picture keeps the share 1 / (1 + crowding).
    """
    return sum(c * math.exp(w) for c, w in zip(coverages, weights, strict=True))
