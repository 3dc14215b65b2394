"""Cross-attention of a diffusers UNet that gives its probabilities to a loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def middle_blocks(unet: torch.nn.Module) -> tuple[str, ...]:
    """A UNet's middle five blocks with cross-attention, in the order of a forward pass: the middle block and the two
    nearest on each side.

    FastComposer (arXiv 2305.10431, section 4.2) uses these. They are down_blocks.1, down_blocks.2, mid_block,
    up_blocks.1 and up_blocks.2 of Stable Diffusion 1.5, and all of SDXL's.
    """
    down, up = (
        [f"{side}.{i}" for i, block in enumerate(getattr(unet, side)) if hasattr(block, "attentions")]
        for side in ("down_blocks", "up_blocks")
    )
    return (*down[-2:], "mid_block", *up[:2])


class OpenAttention:
    """Records the cross-attention probabilities of some blocks of a UNet during forward passes.

    All other attention keeps its fused kernel, which computes no probabilities.

    Args:
        unet: a diffusers `UNet2DConditionModel`; the blocks' attention processors are replaced.
        blocks: names such as "up_blocks.2", in the order of a forward pass.

    Attributes:
        names: names of the modules, in that order.
    """

    def __init__(self, unet: torch.nn.Module, blocks: Sequence[str]):
        found = [name for name, _ in unet.named_modules() if name.endswith(".attn2")]
        self.names = [name for block in blocks for name in found if name.startswith(f"{block}.")]
        self._processor = _Processor()
        for name in self.names:
            unet.get_submodule(name).set_processor(self._processor)

    @contextmanager
    def collecting(self) -> Iterator[list[torch.Tensor]]:
        """A list that receives the probabilities (n, pixels, tokens) of each module, in fp32 and averaged over heads,
        during forward passes inside the context.

        Gradient checkpointing computes them again in the backward pass, after the context, and they are collected once.
        """
        self._processor.maps = []
        try:
            yield self._processor.maps
        finally:
            self._processor.maps = None


class _Processor:
    """A diffusers attention processor. It is a class, because a method as processor breaks the compiler's graph."""

    def __init__(self):
        self.maps: list[torch.Tensor] | None = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, encoder_hidden_states),
                (attn.to_v, encoder_hidden_states),
            )
        )
        # The query is scaled, because scaling the products would add a pass over them, which are larger.
        probabilities = (query * attn.scale @ key.transpose(-1, -2)).float().softmax(-1)
        if self.maps is not None:
            self.maps.append(probabilities.mean(1))
        return attn.to_out[0]((probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2))
