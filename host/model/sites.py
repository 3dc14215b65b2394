"""Sites: the places in a model that can be handled, independent of the model family.

A site is a self- or cross-attention layer, or the residual branch of a decoder block. Systems use sites only. How a
family names its blocks, and how a handler is installed in them, is defined only in the family's file in `families`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from comfy.ldm.modules import attention as kernels

SELF, CROSS, RESIDUAL = "self", "cross", "residual"

LAST_TWO_STAGES = "last two decoder stages"
STAGE_BEFORE_LAST = "decoder stage before last"
LAST_STAGE = "last decoder stage"
ALL_BLOCKS = "all blocks"
PRESETS = (LAST_TWO_STAGES, STAGE_BEFORE_LAST, LAST_STAGE, ALL_BLOCKS)

_KERNELS_THAT_TAKE_A_BIAS = ("attention_basic", "attention_split", "attention_sub_quad", "attention_xformers")


@dataclass(frozen=True)
class Site:
    """A place in a model that can be handled.

    Attributes:
        kind: SELF, a layer in which the picture attends to itself (and to the text, if attention is joint), CROSS, a
            layer in which it attends to the text only, or RESIDUAL, the residual branch of a decoder block.
        key: the family's name for the site, which concepts use too; only the family parses it.
        index: position among the sites of its kind in order of execution; the layer number of the papers.
        block: number of its block in the encoder, the middle or the decoder; for the decoder, the number of the papers.
        in_decoder: whether the site is in the decoder.
        stage: for decoder sites, position of the resolution stage among those with attention, counted from the end
            (-1 is the last); None elsewhere, and in a stage without attention.
    """

    kind: str
    key: str
    index: int
    block: int
    in_decoder: bool
    stage: int | None


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention site. A handler returns the output, (B, Lq, C).

    Attributes:
        q, k, v: projected queries, keys and values, (B, Lq, C), (B, Lk, C) and (B, Lk, C).
        heads: number of attention heads.
        grid: height and width of the picture's token grid.
        picture: slice of the picture's tokens in q, and at a SELF site also in k and v; the rest is text or padding.
        attend: (q, k, v, bias=None) -> (B, Lq, C), ComfyUI's attention with these heads; see `host_attention`.
        previous: (q, k, v) -> (B, Lq, C), the attention with which another node replaces this one, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    heads: int
    grid: tuple[int, int]
    picture: slice
    attend: Callable[..., torch.Tensor]
    previous: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None

    def unpatched(self) -> torch.Tensor:
        """The site's output without our handler: the other node's replacement if there is one, else plain attention."""
        return (self.previous or self.attend)(self.q, self.k, self.v)


class ResidualCall(Protocol):
    """One call of a residual block, whose output is skip(x) + branch(x, embedding).

    Attributes:
        x: the block's input, (B, C, h, w).
    """

    x: torch.Tensor

    def unpatched(self) -> torch.Tensor:
        """The block's output without our handler, (B, C', h, w), by another node's patch if there is one."""

    def with_its_branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The block's output without our handler, and the residual branch in it, both (B, C', h, w)."""

    def with_branch(self, branch: torch.Tensor) -> torch.Tensor:
        """The block's output with `branch` (B, C', h, w) in place of its own, which is not computed."""


Handler = Callable[[AttentionCall], torch.Tensor] | Callable[[ResidualCall], torch.Tensor]


class Family(Protocol):
    """What is specific to one model family.

    Attributes:
        names: the names of its models, for error messages.
        kinds: the kinds of sites that its models have.
    """

    names: str
    kinds: frozenset[str]

    def owns(self, module: torch.nn.Module) -> bool:
        """Whether `module` is a diffusion model of this family."""

    def sites(self, network: torch.nn.Module) -> tuple[Site, ...]:
        """All sites in order of execution.

        Raises:
            ValueError: the model has video layers, which treat its batch as frames.
        """

    def install(self, network: torch.nn.Module, options: dict, handlers: Mapping[Site, Handler]) -> dict:
        """Returns a copy of ComfyUI's transformer options with the handlers. Each receives the patch at its site."""


class CrossAttentionFamily(Family, Protocol):
    """A family whose models attend to text by cross-attention. Concepts change its weights, layer by layer.

    Layers are given by their module names in the diffusion model.
    """

    def text_width(self, model) -> int:
        """Width of the text states (the text encoder's output) that a BaseModel uses."""

    def architecture(self, text_width: int) -> str:
        """Name of the models with this text width, for error messages."""

    def has_site(self, key: str) -> bool:
        """Whether `key` has the form of this family's site keys."""

    def layer(self, key: str, part: str) -> str:
        """Name of the linear layer that computes a part (of `encoders.concepts.PARTS`) of a site's cross-attention."""

    def projections(self, network: torch.nn.Module) -> tuple[str, ...]:
        """Names of the linear layers that compute queries, keys and values of all attention, to text or not."""

    def diffusers_names(self, model) -> Mapping[str, str]:
        """Maps diffusers' weight names to the names of the weights in a BaseModel's diffusion model."""

    def sees_places(self, network: torch.nn.Module, layer: str) -> bool:
        """Whether `layer` is a linear or convolution layer of the model whose input has spatial positions."""

    def around(self, network: torch.nn.Module, layer: str) -> str | None:
        """Name of the module that contains `layer` and has an input (B, C, h, w) with its token grid, or None."""


class EncoderFamily(Family, Protocol):
    """A family whose models have a timestep embedding and an encoder of several levels, from fine to coarse."""

    def levels(self, network: torch.nn.Module) -> tuple[tuple[int, int], ...]:
        """Of each level the number of its last block, and the channels of that block's output."""

    def with_additions(self, executor, features, *args, **kwargs) -> torch.Tensor:
        """Calls ComfyUI's executor of a diffusion model's forward pass with `features` (of
        `encoders.composer_adapter.Features`, n rows) added to it.

        Args:
            executor: calls the model, with all further arguments.
            features: see above.
        """


def sees_whole(x: torch.Tensor, rows: int, grid: tuple[int, int] | None) -> bool:
    """Whether the input or output of a layer, tokens (B, L, C) or a feature map (B, C, h, w), holds all `rows` of the
    batch and all positions of the token grid: other nodes (HyperTile, token merging) pass only parts to a layer."""
    if grid is None or len(x) != rows:
        return False
    return tuple(x.shape[2:]) == grid if x.ndim == 4 else x.shape[1] == grid[0] * grid[1]


def host_attention(q, k, v, bias: torch.Tensor | None = None, *, heads: int, options: dict) -> torch.Tensor:
    """Computes attention by ComfyUI's kernel: (B, Lq, C) from q (B, Lq, C), k and v (B, Lk, C).

    A `bias` is added to the logits. It is passed only to kernels that are known to add it: flash and sage attention,
    and overrides by other packs, reject a mask or ignore it silently.
    """
    precision = options.get("attn_precision")
    if bias is None:
        return kernels.optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)
    kernel = kernels.optimized_attention
    if kernel.__name__ not in _KERNELS_THAT_TAKE_A_BIAS:
        kernel = kernels.attention_pytorch
    return kernel(q, k, v, heads, mask=bias, attn_precision=precision)


def choose_self_attention(sites: Sequence[Site], blocks: str) -> tuple[Site, ...]:
    """Selects self-attention sites by the name of a preset, or by layer numbers such as "10-15" or "3, 7-9".

    Raises:
        ValueError: `blocks` is neither, or contains layers that the model does not have.
    """
    own = [site for site in sites if site.kind == SELF]
    by_preset = {
        LAST_TWO_STAGES: lambda site: site.stage is not None and site.stage >= -2,
        STAGE_BEFORE_LAST: lambda site: site.stage == -2,
        LAST_STAGE: lambda site: site.stage == -1,
        ALL_BLOCKS: lambda site: True,
    }
    if blocks in by_preset:
        chosen = tuple(filter(by_preset[blocks], own))
        if not chosen:
            raise ValueError(
                f"blocks: expected {ALL_BLOCKS} or numbers from 0 to {len(own) - 1} for this model, got {blocks}, "
                "which it does not have"
            )
        return chosen
    numbers = parse_numbers(blocks, "blocks")
    if max(numbers) >= len(own):
        raise ValueError(f"blocks: expected numbers from 0 to {len(own) - 1} for this model, got {max(numbers)}")
    return tuple(site for site in own if site.index in numbers)


def parse_numbers(text: str, name: str) -> frozenset[int]:
    """Parses numbers and ranges such as "10-15" or "3, 7-9".

    Raises:
        ValueError: `text` is not such a list; the message names the input `name`.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        if not found:
            raise ValueError(f'{name}: expected numbers such as "10-15" or "3, 7-9", got {text!r}')
        numbers.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    if not numbers:
        raise ValueError(f"{name}: expected rising ranges, got {text!r}")
    return frozenset(numbers)
