"""The cross-attention that FastComposer's localization loss looks at (arXiv 2305.10431, section 4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class MiddleAttention:
    """A UNet's cross-attention in its middle five blocks, opened so that a forward pass gives its probabilities.

    These are the middle block and the two blocks with cross-attention nearest to it on both sides: the published ones
    of Stable Diffusion 1.5 (down_blocks.1, down_blocks.2, mid_block, up_blocks.1, up_blocks.2), all of SDXL's. All
    other attention keeps its fused kernel, which forms no probabilities.

    Attributes:
        names: of the modules, in the order in which a forward pass meets them.
    """

    def __init__(self, unet: torch.nn.Module):
        down, up = (
            [f"{side}.{i}." for i, block in enumerate(getattr(unet, side)) if hasattr(block, "attentions")]
            for side in ("down_blocks", "up_blocks")
        )
        # Registration puts the middle block last.
        blocks = (*down[-2:], "mid_block.", *up[:2])
        found = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
        self.names = [name for block in blocks for name in found if name.startswith(block)]
        self._maps: list[torch.Tensor] | None = None
        for name in self.names:
            unet.get_submodule(name).set_processor(self._attend)

    @contextmanager
    def collecting(self) -> Iterator[list[torch.Tensor]]:
        """A list that receives (n, heads, pixels, tokens) of each module, in fp32, from forward passes within.

        What gradient checkpointing computes again in the backward pass comes after it, and is not collected twice.
        """
        self._maps = []
        try:
            yield self._maps
        finally:
            self._maps = None

    def _attend(self, attn, hidden_states, encoder_hidden_states=None, **_):
        """A diffusers attention processor."""
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        probabilities = (query @ key.transpose(-1, -2) * attn.scale).float().softmax(-1)
        if self._maps is not None:
            self._maps.append(probabilities)
        return attn.to_out[0]((probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2))
