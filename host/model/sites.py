"""Sites: where a model can be handled, whatever its family.

A site is a self- or cross-attention layer, or the residual branch of a decoder block. Systems speak of sites alone;
what a family's blocks are called, and how a handler gets into them, only its file under `families` knows.
"""

from __future__ import annotations

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
    """One place of a model that can be handled.

    Attributes:
        kind: SELF, a layer in which the picture attends to itself (and, where attention is joint, to the text beside
            it), CROSS, one in which it attends to the text alone, or RESIDUAL, the residual branch of a decoder block.
        key: what its family calls it, and concepts after it; nothing else takes it apart.
        index: its place among the sites of its kind in order of execution; layer number of the papers.
        block: number of its block, as the papers count the blocks of a decoder.
        in_decoder: whether it is in the model's decoder.
        stage: for decoder sites, the place of its resolution stage among those with attention, counted from the
            end (-1 is the last); None elsewhere, and in a stage without attention.
    """

    kind: str
    key: str
    index: int
    block: int
    in_decoder: bool
    stage: int | None


@dataclass(frozen=True)
class AttentionCall:
    """One call of one attention site. Whoever handles it returns (B, Lq, C).

    Attributes:
        q, k, v: projected, (B, Lq, C) and (B, Lk, C).
        heads: number of heads that C is divided into.
        grid: height and width of the picture's token grid.
        picture: where the picture's tokens are in q, and at a SELF site in k and v; others are text or padding.
        attend: (q, k, v, bias=None) -> (B, Lq, C), the host's attention with these heads; see `host_attention`.
        previous: (q, k, v) -> (B, Lq, C), what another node has put in place of this attention, or None.
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
        """What the site gives without us: the other node's replacement if there is one, else plain attention."""
        return (self.previous or self.attend)(self.q, self.k, self.v)


class ResidualCall(Protocol):
    """One call of one residual block, whose output is skip(x) + branch(x, embedding).

    Attributes:
        x: (B, C, h, w).
    """

    x: torch.Tensor

    def unpatched(self) -> torch.Tensor:
        """What the block gives without us, (B, C', h, w): by another node's patch if there is one."""

    def with_its_branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block gives without us, and the branch within it."""

    def with_branch(self, branch: torch.Tensor) -> torch.Tensor:
        """What the block gives with another branch, which spares it computing its own."""


Handler = Callable[[AttentionCall], torch.Tensor] | Callable[[ResidualCall], torch.Tensor]


class Family(Protocol):
    """What is true of one kind of model only.

    Attributes:
        names: what errors call its models.
        kinds: of the sites that it has.
    """

    names: str
    kinds: frozenset[str]

    def owns(self, module: torch.nn.Module) -> bool:
        """Whether a module is a diffusion model of this family."""

    def sites(self, network: torch.nn.Module) -> tuple[Site, ...]:
        """All sites in order of execution.

        Raises:
            ValueError: the model has layers that treat its batch as frames of a video.
        """

    def install(self, network: torch.nn.Module, options: dict, handlers: Mapping[Site, Handler]) -> dict:
        """A copy of the host's transformer options with the handlers in place, chained with what is there."""


class CrossAttentionFamily(Family, Protocol):
    """A family whose models read text by cross-attention, which concepts change layer by layer.

    Names of layers are those in the diffusion model.
    """

    def text_width(self, model) -> int:
        """Of the text states that a BaseModel reads."""

    def architecture(self, text_width: int) -> str:
        """What errors call its models of a text width."""

    def has_site(self, key: str) -> bool:
        """Whether a concept's layer is called as this family calls its sites."""

    def layer(self, key: str, part: str) -> str:
        """The linear layer that makes a part (of `encoders.concepts.PARTS`) of the cross-attention of a site."""

    def diffusers_names(self, model) -> Mapping[str, str]:
        """The weights of a BaseModel's diffusion model by the names that diffusers has for them."""

    def sees_places(self, network: torch.nn.Module, layer: str) -> bool:
        """Whether there is such a linear or convolution layer, and its input has places of the picture."""

    def around(self, network: torch.nn.Module, layer: str) -> str | None:
        """The module whose input (B, C, h, w) has the token grid of a layer within it; None for a layer outside."""


def sees_whole(x: torch.Tensor, rows: int, grid: tuple[int, int] | None) -> bool:
    """Whether the input or output of a layer, tokens (B, L, C) or a picture (B, C, h, w), holds all `rows` of the batch
    and all places of the token grid: other nodes (HyperTile, token merging) give a layer parts of them."""
    if grid is None or len(x) != rows:
        return False
    return tuple(x.shape[2:]) == grid if x.ndim == 4 else x.shape[1] == grid[0] * grid[1]


def host_attention(q, k, v, bias: torch.Tensor | None = None, *, heads: int, options: dict) -> torch.Tensor:
    """The host's attention kernel.

    A bias goes to a kernel known to add it: flash and sage attention, and overrides by other packs, refuse a mask or
    drop it without a word.
    """
    precision = options.get("attn_precision")
    if bias is None:
        return kernels.optimized_attention(q, k, v, heads, attn_precision=precision, transformer_options=options)
    kernel = kernels.optimized_attention
    if kernel.__name__ not in _KERNELS_THAT_TAKE_A_BIAS:
        kernel = kernels.attention_pytorch
    return kernel(q, k, v, heads, mask=bias, attn_precision=precision)


def choose_self_attention(sites: Sequence[Site], blocks: str) -> tuple[Site, ...]:
    """Self-attention sites by the name of a preset, or by layer numbers such as "10-15" or "3, 7-9".

    Raises:
        ValueError: the text is neither, or names layers that the model does not have.
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
    """Reads "10-15" or "3, 7-9".

    Raises:
        ValueError: it is not such a list; `name` says of which input.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ValueError(f'{name}: expected numbers such as "10-15" or "3, 7-9", got {text!r}')
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers:
        raise ValueError(f"{name}: expected rising ranges, got {text!r}")
    return frozenset(numbers)
