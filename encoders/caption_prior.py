"""A prior: from a caption to image embeddings that pictures of it may have (unCLIP, arXiv 2204.06125, section 2.2).

Composer uses one where a caption stands alone, for more variety. A causal transformer reads the text's tokens, its
sentence, the timestep, the noisy embedding and a last token, at which it predicts the embedding without noise. Modules
have the names of diffusers' PriorTransformer, in which the public priors of Karlo and Kandinsky are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .files import load_exactly

HEADS = "heads"
"""Of the metadata of a file: the number of attention heads, which no shape tells."""
_HEAD_WIDTH = 64
_ADDED = 4
"""Tokens after those of the text: sentence, timestep, noisy embedding, and the one that predicts."""


@dataclass(frozen=True)
class PriorConfig:
    """The architecture of a prior. The defaults are Karlo's.

    Attributes:
        width: of the text states, the sentence and the image embedding.
        inner: of the transformer.
        heads, layers: of the transformer.
        tokens: of a text.
    """

    width: int = 768
    inner: int = 2048
    heads: int = 32
    layers: int = 20
    tokens: int = 77

    @classmethod
    def of_state(cls, state: Mapping[str, torch.Tensor], heads: int | None = None) -> PriorConfig:
        """The architecture that weights have; `heads` None means heads 64 wide.

        Raises:
            ValueError: weights are missing.
        """
        try:
            inner, width = state["proj_in.weight"].shape
            layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("transformer_blocks."))
            tokens = state["positional_embedding"].shape[1] - _ADDED
            return cls(width, inner, heads or max(1, inner // _HEAD_WIDTH), layers, tokens)
        except (KeyError, ValueError) as error:
            raise ValueError(f"file: expected the weights of a prior, got a file without {error}") from error


class CaptionPrior(nn.Module):
    """See the module.

    Args:
        config: the architecture.
        operations: provides Linear and LayerNorm; torch.nn, or ComfyUI's, which cast weights.
        settings: keyword arguments of these layers (device, dtype).
    """

    def __init__(self, config: PriorConfig | None = None, operations: Any = nn, **settings):
        super().__init__()
        self.config = config = config or PriorConfig()
        width, inner = config.width, config.inner
        self.time_embedding = nn.ModuleDict(
            {name: operations.Linear(inner, inner, **settings) for name in ("linear_1", "linear_2")}
        )
        self.proj_in = operations.Linear(width, inner, **settings)
        self.embedding_proj = operations.Linear(width, inner, **settings)
        self.encoder_hidden_states_proj = operations.Linear(width, inner, **settings)
        self.positional_embedding = nn.Parameter(torch.zeros(1, config.tokens + _ADDED, inner, **settings))
        self.prd_embedding = nn.Parameter(torch.zeros(1, 1, inner, **settings))
        self.transformer_blocks = nn.ModuleList(
            _Block(inner, config.heads, operations, settings) for _ in range(config.layers)
        )
        self.norm_out = operations.LayerNorm(inner, **settings)
        self.proj_to_clip_embeddings = operations.Linear(inner, width, **settings)
        self.clip_mean = nn.Parameter(torch.zeros(1, width, **settings), requires_grad=False)
        self.clip_std = nn.Parameter(torch.ones(1, width, **settings), requires_grad=False)

    def forward(
        self,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        sentence: torch.Tensor,
        states: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The embedding (n, D) without noise, scaled by `scaled`.

        Args:
            noisy: (n, D), at the timesteps.
            timestep: (n,), 0..999.
            sentence: (n, D), the text's projected embedding.
            states: (n, tokens, D), the text tower's last hidden states.
            mask: (n, tokens), boolean, of the tokens up to the end token.
        """
        half = self.config.inner // 2
        rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=noisy.device, dtype=torch.float32))
        angles = timestep.float()[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(noisy.dtype)
        time = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](waves)))
        rows = [self.embedding_proj(sentence), time, self.proj_in(noisy)]
        last = self.prd_embedding.to(noisy).expand(len(noisy), -1, -1)
        x = torch.cat([self.encoder_hidden_states_proj(states), *(row[:, None] for row in rows), last], 1)
        x = x + self.positional_embedding.to(x)
        length = x.shape[1]
        seen = F.pad(mask, (0, _ADDED), value=True)[:, None, None]
        # Finite, as in the published weights' training: a row that sees nothing else still has itself.
        bias = torch.where(seen, 0.0, -10000.0) + torch.full((length, length), -10000.0, device=x.device).triu(1)
        for block in self.transformer_blocks:
            x = block(x, bias.to(x))
        return self.proj_to_clip_embeddings(self.norm_out(x)[:, -1])

    def scaled(self, embedding: torch.Tensor) -> torch.Tensor:
        """Image embeddings (n, D) with mean 0 and deviation 1 in each coordinate, as the network has them."""
        return (embedding - self.clip_mean.to(embedding)) / self.clip_std.to(embedding)

    def unscaled(self, embedding: torch.Tensor) -> torch.Tensor:
        """The inverse of `scaled`."""
        return embedding * self.clip_std.to(embedding) + self.clip_mean.to(embedding)

    @classmethod
    def from_state(
        cls, state: Mapping[str, torch.Tensor], heads: int | None = None, operations: Any = nn, **settings
    ) -> CaptionPrior:
        """A prior of the architecture that its weights have.

        Raises:
            ValueError: weights are missing, unknown, or do not fit together.
        """
        return load_exactly(partial(cls, PriorConfig.of_state(state, heads)), state, "a prior", operations, **settings)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, operations, settings: Mapping[str, Any]):
        super().__init__()
        self.norm1, self.norm3 = (operations.LayerNorm(width, **settings) for _ in range(2))
        self.attn1 = _Attention(width, heads, operations, settings)
        self.ff = _FeedForward(width, operations, settings)

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x), bias)
        return x + self.ff(self.norm3(x))


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, operations, settings: Mapping[str, Any]):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (operations.Linear(width, width, **settings) for _ in range(3))
        self.to_out = nn.ModuleList([operations.Linear(width, width, **settings)])

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.to_out[0](found.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    def __init__(self, width: int, operations, settings: Mapping[str, Any]):
        super().__init__()
        # The place between is the dropout's in the published names.
        widened = _Widened(operations.Linear(width, 4 * width, **settings))
        self.net = nn.ModuleList([widened, nn.Identity(), operations.Linear(4 * width, width, **settings)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class _Widened(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.proj(x))


def first_true(rows: torch.Tensor) -> torch.Tensor:
    """Of each boolean row (n, L) the index of its first True."""
    return rows.int().argmax(1)


def text_mask(tokens: torch.Tensor, end: int) -> torch.Tensor:
    """(n, L), True up to the first end token of each row of tokens (n, L), after the start token."""
    last = 1 + first_true(tokens[:, 1:] == end)
    return torch.arange(tokens.shape[1], device=tokens.device) <= last[:, None]


def spaced(steps: int, times: int = 1000) -> Sequence[int]:
    """`steps` timesteps from the noisiest to 0, evenly spaced, as Karlo takes them."""
    if steps == 1:
        return [times - 1]
    return [round(i * (times - 1) / (steps - 1)) for i in reversed(range(steps))]
