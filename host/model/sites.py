"""Attention sites: where a model can be patched, found by walking it, and how a handler gets there.

A site is a self- or cross-attention layer, or the residual branch of a decoder block, named by the model's *family*.
Systems speak of sites alone; what a family's blocks are called, and how a handler gets into them, only its adapter here
knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from comfy.ldm.modules import attention as kernels
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample

SELF, CROSS, RESIDUAL = "self", "cross", "residual"

LAST_TWO_STAGES = "last two decoder stages"
STAGE_BEFORE_LAST = "decoder stage before last"
LAST_STAGE = "last decoder stage"
ALL_BLOCKS = "all blocks"
PRESETS = (LAST_TWO_STAGES, STAGE_BEFORE_LAST, LAST_STAGE, ALL_BLOCKS)

_LAYER_PATCHES = "forward_timestep_embed_patch"
_KERNELS_THAT_TAKE_A_BIAS = ("attention_basic", "attention_split", "attention_sub_quad", "attention_xformers")


@dataclass(frozen=True)
class Site:
    """One place of a model that can be handled.

    Attributes:
        kind: SELF or CROSS, an attention layer, or RESIDUAL, the residual branch of a decoder block.
        key: what the host calls its block, such as ("output", 6, 0).
        index: its place among the sites of its kind in order of execution; layer number of the papers.
        stage: for decoder sites, the place of its resolution stage among those with attention, counted from the
            end (-1 is the last); None elsewhere, and in a stage without attention.
    """

    kind: str
    key: tuple[str, int, int]
    index: int
    stage: int | None


@dataclass(frozen=True)
class AttentionCall:
    """One call of one site.

    Attributes:
        q, k, v: projected, (B, Lq, C) and (B, Lk, C).
        options: the host's extra options of this call.
        previous: what another node has put in place of this attention, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict
    previous: Callable | None

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the token grid of a self-attention layer."""
        return tuple(self.options["activations_shape"][-2:])

    def attend(self, q, k, v, bias=None) -> torch.Tensor:
        """The host's attention with this site's heads; see `host_attention`."""
        return host_attention(q, k, v, self.options["n_heads"], bias, self.options)

    def unpatched(self) -> torch.Tensor:
        """What the site gives without us: the other node's replacement if there is one, else plain attention."""
        if self.previous is not None:
            return self.previous(self.q, self.k, self.v, self.options)
        return self.attend(self.q, self.k, self.v)


@dataclass(frozen=True)
class ResidualCall:
    """One call of one residual block, whose output is skip(x) + branch(x, embedding).

    Attributes:
        layer: the host's ResBlock.
        x: (B, C, h, w).
        evaluate: what it gives without us, by another node's patch if there is one.
    """

    layer: ResBlock
    x: torch.Tensor
    evaluate: Callable[[], torch.Tensor]

    def unpatched(self) -> torch.Tensor:
        """What the block gives without us, (B, C', h, w)."""
        return self.evaluate()

    def with_its_branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the block gives without us, and the branch within it."""
        kept: list[torch.Tensor] = []
        hook = self.layer.out_layers[-1].register_forward_hook(lambda _layer, _inputs, output: kept.append(output))
        try:
            return self.evaluate(), kept[-1]
        finally:
            hook.remove()

    def with_branch(self, branch: torch.Tensor) -> torch.Tensor:
        """What the block gives with another branch, which spares it computing its own."""
        return self.layer.skip_connection(self.x) + branch


Handler = Callable[[AttentionCall], torch.Tensor] | Callable[[ResidualCall], torch.Tensor]


LayerHandler = Callable[[torch.Tensor, torch.Tensor, tuple[int, int] | None], torch.Tensor]
"""(input, output, grid) of a layer -> the output it shall have; grid (h, w) is that of the transformer around it."""

_RESTING = ContextVar("conceptloom_layers_rest", default=False)


@contextmanager
def handled_layers(network: torch.nn.Module, handlers: Mapping[str, LayerHandler]) -> Iterator[None]:
    """Layers of a `network_of` a model, by their names in it, are handled while this is open."""
    grids: dict[str | None, tuple[int, int]] = {}

    def note(name: str) -> Callable:
        def before(_transformer, inputs) -> None:
            if not _RESTING.get():
                grids[name] = tuple(inputs[0].shape[-2:])

        return before

    def hook(handler: LayerHandler, around: str | None) -> Callable:
        return lambda _layer, inputs, output: (
            output if _RESTING.get() else handler(inputs[0], output, grids.get(around))
        )

    hooks = []
    if handlers:
        transformers = [n for n, module in network.named_modules() if isinstance(module, SpatialTransformer)]
        around = {n: next((t for t in transformers if n.startswith(f"{t}.")), None) for n in handlers}
        hooks = [network.get_submodule(t).register_forward_pre_hook(note(t)) for t in {*around.values()} - {None}]
        hooks += [network.get_submodule(n).register_forward_hook(hook(h, around[n])) for n, h in handlers.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


@contextmanager
def resting_layers() -> Iterator[None]:
    """No layer is handled while this is open: for passes that are not the sampled picture's."""
    token = _RESTING.set(True)
    try:
        yield
    finally:
        _RESTING.reset(token)


def host_attention(q, k, v, heads: int, bias: torch.Tensor | None, options: dict) -> torch.Tensor:
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


class UNetFamily:
    """Stable Diffusion's UNet with transformer blocks, of any width and depth."""

    names = "SD 1.x, SD 2.x, SDXL and Shapeland"

    def owns(self, diffusion_model) -> bool:
        """Whether the model is one of this family."""
        return isinstance(diffusion_model, UNetModel)

    def sites(self, diffusion_model) -> tuple[Site, ...]:
        """All sites in order of execution.

        Raises:
            ValueError: the model has layers that treat its batch as frames of a video.
        """
        found = []
        for path, position, stage, container in self._blocks(diffusion_model):
            depth = 0
            if path == "output" and len(_branches(container)) == 1:
                found.append((RESIDUAL, (path, position, 0), stage))
            for module in container.modules():
                if isinstance(module, SpatialVideoTransformer) or "Temporal" in type(module).__name__:
                    raise ValueError("model: expected a picture model, got one with video layers")
                if isinstance(module, BasicTransformerBlock):
                    kind_of_first = CROSS if module.disable_self_attn else SELF
                    found.append((kind_of_first, (path, position, depth), stage))
                    if module.attn2 is not None:
                        found.append((CROSS, (path, position, depth), stage))
                    depth += 1
        with_attention = sorted({stage for kind, _, stage in found if stage is not None and kind != RESIDUAL})
        stages = {stage: i - len(with_attention) for i, stage in enumerate(with_attention)}
        counts = {SELF: 0, CROSS: 0, RESIDUAL: 0}
        sites = []
        for kind, key, stage in found:
            sites.append(Site(kind, key, counts[kind], stages.get(stage)))
            counts[kind] += 1
        return tuple(sites)

    def _blocks(self, unet) -> Iterable[tuple[str, int, int | None, torch.nn.Module]]:
        """(path, id, decoder stage, module) of all blocks in order of execution; a resolution change ends a stage."""
        for position, block in enumerate(unet.input_blocks):
            yield "input", position, None, block
        if unet.middle_block is not None:
            yield "middle", 0, None, unet.middle_block
        stage = 0
        for position, block in enumerate(unet.output_blocks):
            yield "output", position, stage, block
            stage += any(isinstance(part, (Upsample, Downsample)) for part in block)

    def install(self, options: dict, handlers: Mapping[Site, Handler]) -> dict:
        """A copy of the transformer options with the handlers in place, chained with what is there."""
        options = options.copy()
        replace = options["patches_replace"] = options.get("patches_replace", {}).copy()
        for slot, kind in (("attn1", SELF), ("attn2", CROSS)):
            wanted = {site: handler for site, handler in handlers.items() if site.kind == kind}
            if not wanted:
                continue
            patches = replace[slot] = replace.get(slot, {}).copy()
            for site, handler in wanted.items():
                previous = patches.get(site.key) or patches.get(site.key[:2])
                patches[site.key] = _as_host_patch(handler, previous)
        branches = {site.key[:2]: handler for site, handler in handlers.items() if site.kind == RESIDUAL}
        if branches:
            patches = options["patches"] = options.get("patches", {}).copy()
            others = patches.get(_LAYER_PATCHES, [])
            patches[_LAYER_PATCHES] = [(ResBlock, _as_layer_patch(branches, others)), *others]
        return options


def _as_host_patch(handler: Handler, previous: Callable | None) -> Callable:
    def patch(q, k, v, extra_options, **_):
        return handler(AttentionCall(q, k, v, extra_options, previous))

    return patch


def _branches(block: torch.nn.Module) -> list[ResBlock]:
    """The residual blocks of a block that keep its resolution."""
    return [module for module in block.modules() if isinstance(module, ResBlock) and not module.updown]


def _as_layer_patch(handlers: Mapping[tuple, Handler], others: Sequence[tuple[type, Callable]]) -> Callable:
    def patch(layer, x, embedding, context, options, *rest):
        # The host stops at the first patch that fits a layer, so the others' must be asked here.
        other = next((patch for kind, patch in others if isinstance(layer, kind)), None)

        def evaluate():
            return layer(x, embedding) if other is None else other(layer, x, embedding, context, options, *rest)

        handler = handlers.get(tuple(options["block"]))
        return evaluate() if handler is None else handler(ResidualCall(layer, x, evaluate))

    return patch


FAMILIES = (UNetFamily(),)


def network_of(model) -> torch.nn.Module:
    """The diffusion model of a BaseModel; where another node has wrapped it, as compile nodes do, what is inside.

    Raises:
        ValueError: no family supports it.
    """
    found = (part for part in model.diffusion_model.modules() if any(family.owns(part) for family in FAMILIES))
    network = next(found, None)
    if network is None:
        supported = ", ".join(family.names for family in FAMILIES)
        given = type(model.diffusion_model).__name__
        raise ValueError(f"model: expected one of the families {supported}, got {given}")
    return network


def family_of(network: torch.nn.Module) -> UNetFamily:
    """The adapter of the family that owns the `network_of` a model."""
    return next(family for family in FAMILIES if family.owns(network))


def choose_sites(sites: Sequence[Site], blocks: str) -> tuple[Site, ...]:
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
        return tuple(filter(by_preset[blocks], own))
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
