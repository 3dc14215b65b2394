"""PromptNet: from a picture, and the latents that are being sampled, to the embedding of a word for the picture.

ProFusion (Zhou et al., arXiv 2305.13579), section 3.1. The network is the encoder half of Stable Diffusion's UNet. Its
input is the sum of two latents, the picture's and the noisy one; its cross-attention reads the tokens of CLIP's vision
tower; and a projection of each level is gathered into one vector S* for each region of the picture, which takes the
place of a word's embedding in front of the text encoder. Modules have the names of the published weights.

Published weights also hold heads for residuals to the UNet's skip connections. Nothing reads them: they are left out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from .files import load_exactly, whole_file

UNUSED = ("residual_projections", "mid_residual_projection")
"""How the names of tensors begin that nothing reads."""
PREFIX = "promptnet."
HEADS = "heads"
"""Of the metadata of a file: the number of attention heads of each level, which no shape tells."""

_HEAD_WIDTH = 64
_GROUPS = 32


@dataclass(frozen=True)
class PromptNetConfig:
    """The architecture of a PromptNet. The defaults are the published one, for Stable Diffusion 2.

    Attributes:
        channels: of each level, from fine to coarse. All levels but the last halve the size at their end.
        heads: of each level's attention.
        attention: whether each level has attention; the middle has it always.
        layers: ResBlocks of each level.
        transformer_layers: transformer blocks of each attention.
        latent_channels: of the latents.
        vision_width: of the vision tower's tokens.
        context_width: of the tokens in cross-attention, and of S*.
        region: side of a region in cells of the coarsest level. A region makes one vector.
        region_channels: of each level's projection.
        linear_projection: whether attention begins and ends with a linear layer (Stable Diffusion 2) or with a
            convolution of one cell (Stable Diffusion 1.5).
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (5, 10, 20, 20)
    attention: tuple[bool, ...] = (True, True, True, False)
    layers: int = 2
    transformer_layers: int = 1
    latent_channels: int = 4
    vision_width: int = 1280
    context_width: int = 1024
    region: int = 8
    region_channels: int = 128
    linear_projection: bool = True

    @property
    def factor(self) -> int:
        """Cells of the latents per cell of the coarsest level, along one side."""
        return 2 ** (len(self.channels) - 1)

    @property
    def region_side(self) -> int:
        """Side of the latents of one region."""
        return self.factor * self.region

    @classmethod
    def of_state(cls, state: Mapping[str, torch.Tensor], heads: Sequence[int] | None = None) -> PromptNetConfig:
        """The architecture that weights have.

        Args:
            state: weights by name.
            heads: of each level; None means heads 64 channels wide.

        Raises:
            ValueError: weights are missing.
        """
        if "region_prompt_output.weight" not in state:
            raise ValueError("file: expected the weights of a PromptNet, got a file without region_prompt_output")
        try:
            levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("down_blocks."))
            channels = tuple(len(state[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(levels))
            attention = tuple(f"down_blocks.{i}.attentions.0.proj_in.weight" in state for i in range(levels))
            key = "mid_block.attentions.0."
            return cls(
                channels=channels,
                heads=tuple(heads or (max(1, width // _HEAD_WIDTH) for width in channels)),
                attention=attention,
                layers=_count(state, r"down_blocks\.0\.resnets\.(\d+)\."),
                transformer_layers=_count(state, re.escape(key) + r"transformer_blocks\.(\d+)\."),
                latent_channels=state["conv_in.weight"].shape[1],
                vision_width=state["vision_embedding.weight"].shape[1],
                context_width=len(state["region_prompt_output.weight"]),
                region=state["region_prompt_output.weight"].shape[2],
                region_channels=len(state["mid_prompt_projection.weight"]),
                linear_projection=state[f"{key}proj_in.weight"].ndim == 2,
            )
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"file: expected the weights of a PromptNet, got a file without {error}") from error


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    return 1 + max(int(found[1]) for found in (re.match(pattern, key) for key in state) if found)


class PromptNet(nn.Module):
    """See the module.

    Args:
        config: the architecture.
        operations: provides Linear, Conv2d, GroupNorm and LayerNorm; torch.nn, or ComfyUI's, which cast weights.
        settings: keyword arguments of these layers (device, dtype).
    """

    def __init__(self, config: PromptNetConfig | None = None, operations: Any = nn, **settings):
        super().__init__()
        self.config = config = config or PromptNetConfig()
        make = _Maker(config, operations, settings)
        first, time = config.channels[0], 4 * config.channels[0]
        self.conv_in = make.conv(config.latent_channels, first, 3)
        self.promptnet_cond_embedding = _Conditioning(config.latent_channels, first, make)
        self.time_embedding = _TimeEmbedding(first, time, make)
        self.vision_embedding = make.linear(config.vision_width, config.context_width)
        widths = (first, *config.channels)
        self.down_blocks = nn.ModuleList(
            _Level(widths[i], width, i, make, last=i == len(config.channels) - 1)
            for i, width in enumerate(config.channels)
        )
        self.mid_block = _Middle(config.channels[-1], make)
        # Each projection brings its level to the size of the coarsest one.
        self.first_prompt_projection = make.patches(first, config.factor)
        self.down_prompt_projections = nn.ModuleList(
            make.patches(width, max(1, config.factor // 2 ** (i + 1))) for i, width in enumerate(config.channels)
        )
        self.mid_prompt_projection = make.patches(config.channels[-1], 1)
        gathered = config.region_channels * (len(config.channels) + 2)
        self.region_prompt_output = make.conv(gathered, config.context_width, config.region, stride=config.region)

    def forward(
        self, reference: torch.Tensor, noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """The vectors S* (B, n, D) of pictures, n = floor(h / s) floor(w / s) regions of side s, row by row.

        Args:
            reference: (B, C, h, w), the picture's latents.
            noisy: (B, C, h, w), latents at the timestep, scaled as the UNet takes them.
            timestep: (B,), 0..999.
            tokens: (B, t, V), the last hidden states of CLIP's vision tower, before its final normalization.

        Raises:
            ValueError: the latents differ in size or hold no whole region.
        """
        side = self.config.region_side
        if reference.shape[-2:] != noisy.shape[-2:]:
            raise ValueError(f"reference: expected latents of {_size(noisy)} cells, got {_size(reference)}")
        if min(noisy.shape[-2:]) < side:
            raise ValueError(f"latent: expected at least {side} x {side} cells, got {_size(noisy)}")
        emb = self.time_embedding(timestep, noisy.dtype)
        context = self.vision_embedding(tokens)
        h = self.conv_in(reference) + self.promptnet_cond_embedding(noisy)
        gathered = [self.first_prompt_projection(h)]
        for level, projection in zip(self.down_blocks, self.down_prompt_projections, strict=True):
            h = level(h, emb, context)
            gathered.append(projection(h))
        gathered.append(self.mid_prompt_projection(self.mid_block(h, emb, context)))
        rows, columns = (min(part.shape[i] for part in gathered) for i in (-2, -1))
        found = self.region_prompt_output(torch.cat([part[..., :rows, :columns] for part in gathered], 1))
        return found.flatten(2).mT

    @classmethod
    def from_state(
        cls, state: Mapping[str, torch.Tensor], heads: Sequence[int] | None = None, operations: Any = nn, **settings
    ) -> PromptNet:
        """A PromptNet of the architecture that its weights have; residual heads are left out.

        Args:
            state: weights by name, with or without PREFIX.
            heads, operations, settings: see the config and the class.

        Raises:
            ValueError: weights are missing, unknown, or do not fit together.
        """
        state = {key.removeprefix(PREFIX): value for key, value in state.items()}
        state = {key: value for key, value in state.items() if not key.startswith(UNUSED)}
        return load_exactly(
            partial(cls, PromptNetConfig.of_state(state, heads)), state, "a PromptNet", operations, **settings
        )


def save(net: PromptNet, file: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Writes a PromptNet in fp16 as safetensors, with its own weights or others of its architecture."""
    state = net.state_dict() if state is None else state
    with whole_file(file) as part:
        save_file(
            {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()},
            part,
            {HEADS: ",".join(map(str, net.config.heads))},
        )


def heads_of(metadata: Mapping[str, str]) -> tuple[int, ...] | None:
    """The heads that a file's metadata say; None if they do not."""
    said = metadata.get(HEADS)
    return tuple(int(number) for number in said.split(",")) if said else None


def initial_state(net: PromptNet, unet: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with which training begins: those of a UNet in diffusers' names where both have the same layer, as
    published, and the network's own random ones elsewhere."""
    own = net.state_dict()
    return {key: unet[key] if key in unet and unet[key].shape == value.shape else value for key, value in own.items()}


@dataclass(frozen=True)
class _Maker:
    """Makes the layers of one network."""

    config: PromptNetConfig
    operations: ModuleType | Any
    settings: Mapping[str, Any]

    def linear(self, width_in: int, width_out: int, bias: bool = True):
        return self.operations.Linear(width_in, width_out, bias=bias, **self.settings)

    def conv(self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int | None = None):
        if padding is None:
            padding = kernel // 2 if stride == 1 else 0
        return self.operations.Conv2d(channels_in, channels_out, kernel, stride, padding, **self.settings)

    def patches(self, channels_in: int, side: int):
        return self.operations.Conv2d(channels_in, self.config.region_channels, side, side, **self.settings)

    def group_norm(self, channels: int, eps: float):
        return self.operations.GroupNorm(_GROUPS, channels, eps=eps, **self.settings)

    def layer_norm(self, width: int):
        return self.operations.LayerNorm(width, **self.settings)


class _TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, cosines first, and two linear layers."""

    def __init__(self, width: int, out: int, make: _Maker):
        super().__init__()
        self.width = width
        self.linear_1, self.linear_2 = make.linear(width, out), make.linear(out, out)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        half = self.width // 2
        rates = torch.exp(-math.log(10_000) / half * torch.arange(half, device=timestep.device, dtype=torch.float32))
        angles = timestep.float()[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class _Conditioning(nn.Module):
    """The noisy latents at the width of the first level."""

    def __init__(self, channels_in: int, channels: int, make: _Maker):
        super().__init__()
        self.conv_in, self.conv_out = make.conv(channels_in, channels, 3), make.conv(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_out(F.silu(self.conv_in(x)))


class _ResBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, time: int, make: _Maker):
        super().__init__()
        self.norm1, self.conv1 = make.group_norm(channels_in, 1e-5), make.conv(channels_in, channels, 3)
        self.time_emb_proj = make.linear(time, channels)
        self.norm2, self.conv2 = make.group_norm(channels, 1e-5), make.conv(channels, channels, 3)
        self.conv_shortcut = make.conv(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(emb))[:, :, None, None]
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int, make: _Maker):
        super().__init__()
        self.heads = heads
        self.to_q = make.linear(width, width, bias=False)
        self.to_k, self.to_v = make.linear(context, width, bias=False), make.linear(context, width, bias=False)
        self.to_out = nn.ModuleList([make.linear(width, width)])

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _GEGLU(nn.Module):
    def __init__(self, width: int, inner: int, make: _Maker):
        super().__init__()
        self.proj = make.linear(width, 2 * inner)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class _FeedForward(nn.Module):
    def __init__(self, width: int, make: _Maker):
        super().__init__()
        # The place between is the dropout's in the published names.
        self.net = nn.ModuleList([_GEGLU(width, 4 * width, make), nn.Identity(), make.linear(4 * width, width)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, make: _Maker):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (make.layer_norm(width) for _ in range(3))
        self.attn1 = _Attention(width, width, heads, make)
        self.attn2 = _Attention(width, make.config.context_width, heads, make)
        self.ff = _FeedForward(width, make)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class _Transformer(nn.Module):
    def __init__(self, width: int, heads: int, make: _Maker):
        super().__init__()
        self.norm = make.group_norm(width, 1e-6)
        self.linear = make.config.linear_projection
        self.proj_in, self.proj_out = (
            make.linear(width, width) if self.linear else make.conv(width, width, 1) for _ in "io"
        )
        self.transformer_blocks = nn.ModuleList(
            _TransformerBlock(width, heads, make) for _ in range(make.config.transformer_layers)
        )

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        size, h = x.shape[-2:], self.norm(x)
        h = self.proj_in(h.flatten(2).mT) if self.linear else self.proj_in(h).flatten(2).mT
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear:
            return x + self.proj_out(h).mT.unflatten(-1, size)
        return x + self.proj_out(h.mT.unflatten(-1, size))


class _Downsample(nn.Module):
    def __init__(self, channels: int, make: _Maker):
        super().__init__()
        self.conv = make.conv(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class _Level(nn.Module):
    """ResBlocks, each with attention where the level has it, and half the size unless it is the last."""

    def __init__(self, channels_in: int, channels: int, index: int, make: _Maker, last: bool):
        super().__init__()
        config, time = make.config, 4 * make.config.channels[0]
        widths = (channels_in, *[channels] * (config.layers - 1))
        self.resnets = nn.ModuleList(_ResBlock(width, channels, time, make) for width in widths)
        self.attentions = nn.ModuleList(
            _Transformer(channels, config.heads[index], make) for _ in range(config.layers * config.attention[index])
        )
        self.downsamplers = nn.ModuleList([] if last else [_Downsample(channels, make)])

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, emb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for down in self.downsamplers:
            x = down(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int, make: _Maker):
        super().__init__()
        time = 4 * make.config.channels[0]
        self.resnets = nn.ModuleList(_ResBlock(channels, channels, time, make) for _ in range(2))
        self.attentions = nn.ModuleList([_Transformer(channels, make.config.heads[-1], make)])

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = self.attentions[0](self.resnets[0](x, emb), context)
        return self.resnets[1](x, emb)


def _size(latents: torch.Tensor) -> str:
    return " x ".join(map(str, latents.shape[-2:]))
