"""Stable Diffusion's UNet with transformer blocks, of any width and depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any
from weakref import WeakKeyDictionary

import comfy.utils
import torch
from comfy.ldm.modules.attention import (
    BasicTransformerBlock,
    CrossAttention,
    SpatialTransformer,
    SpatialVideoTransformer,
)
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, ResBlock, UNetModel, Upsample

from ..sites import CROSS, RESIDUAL, SELF, AttentionCall, Handler, Site, host_attention

_ARCHITECTURES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL"}
_CONTAINERS = {"input": "input_blocks.{}.1", "middle": "middle_block.1", "output": "output_blocks.{}.1"}
_KEY = re.compile(rf"({'|'.join(_CONTAINERS)})\.(\d+)\.(\d+)")
_PARTS = {"k": "to_k", "v": "to_v", "q": "to_q", "out": "to_out.0"}
_OUTSIDE_THE_PICTURE = ("time_embed", "label_emb", "emb_layers")

_LAYER_PATCHES = "forward_timestep_embed_patch"


def _once_per_network(look):
    """A method of the family that looks at a network once: each look takes milliseconds, and every call asks.

    While torch.compile traces, it looks anew; a weak dictionary cannot be traced, and the compiled call does not ask.
    """
    seen: WeakKeyDictionary[torch.nn.Module, Any] = WeakKeyDictionary()

    @wraps(look)
    def remembered(self, network: torch.nn.Module):
        if torch.compiler.is_compiling():
            return look(self, network)
        if network not in seen:
            seen[network] = look(self, network)
        return seen[network]

    return remembered


@dataclass(frozen=True)
class ResBlockCall:
    """One call of ComfyUI's ResBlock; see `sites.ResidualCall`.

    Attributes:
        layer: the block.
        x: (B, C, h, w).
        unpatched: computes the block's output without our handler, by another node's patch if there is one.
    """

    layer: ResBlock
    x: torch.Tensor
    unpatched: Callable[[], torch.Tensor]

    def with_its_branch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """See `sites.ResidualCall`."""
        kept: list[torch.Tensor] = []
        hook = self.layer.out_layers[-1].register_forward_hook(lambda _layer, _inputs, output: kept.append(output))
        try:
            return self.unpatched(), kept[-1]
        finally:
            hook.remove()

    def with_branch(self, branch: torch.Tensor) -> torch.Tensor:
        """See `sites.ResidualCall`."""
        return self.layer.skip_connection(self.x) + branch


class UNetFamily:
    """See `sites.CrossAttentionFamily`. A site's key, such as "output.6.0", is the part of the UNet, the number of the
    block in it, and the number of the transformer block in that block."""

    names = "SD 1.x, SD 2.x, SDXL and Shapeland"
    kinds = frozenset({SELF, CROSS, RESIDUAL})

    def owns(self, module: torch.nn.Module) -> bool:
        """See `sites.Family`."""
        return isinstance(module, UNetModel)

    def sites(self, network: torch.nn.Module) -> tuple[Site, ...]:
        """See `sites.Family`."""
        found = []
        for path, number, stage, container in _blocks(network):
            depth = 0
            if path == "output" and len(_branches(container)) == 1:
                found.append((RESIDUAL, path, number, 0, stage))
            for module in container.modules():
                if isinstance(module, SpatialVideoTransformer) or "Temporal" in type(module).__name__:
                    raise ValueError("model: expected a picture model, got one with video layers")
                if isinstance(module, BasicTransformerBlock):
                    kind_of_first = CROSS if module.disable_self_attn else SELF
                    found.append((kind_of_first, path, number, depth, stage))
                    if module.attn2 is not None:
                        found.append((CROSS, path, number, depth, stage))
                    depth += 1
        with_attention = sorted({stage for kind, *_, stage in found if stage is not None and kind != RESIDUAL})
        stages = {stage: i - len(with_attention) for i, stage in enumerate(with_attention)}
        counts = {SELF: 0, CROSS: 0, RESIDUAL: 0}
        sites = []
        for kind, path, number, depth, stage in found:
            key = f"{path}.{number}.{depth}"
            sites.append(Site(kind, key, counts[kind], number, path == "output", stages.get(stage)))
            counts[kind] += 1
        return tuple(sites)

    def install(self, _network: torch.nn.Module, options: dict, handlers: Mapping[Site, Handler]) -> dict:
        """See `sites.Family`."""
        options = options.copy()
        replace = options["patches_replace"] = options.get("patches_replace", {}).copy()
        for slot, kind in (("attn1", SELF), ("attn2", CROSS)):
            wanted = {_place(site.key): handler for site, handler in handlers.items() if site.kind == kind}
            if not wanted:
                continue
            patches = replace[slot] = replace.get(slot, {}).copy()
            for place, handler in wanted.items():
                patches[place] = _as_host_patch(handler, patches.get(place) or patches.get(place[:2]))
        branches = {_place(site.key)[:2]: handler for site, handler in handlers.items() if site.kind == RESIDUAL}
        if branches:
            patches = options["patches"] = options.get("patches", {}).copy()
            others = patches.get(_LAYER_PATCHES, [])
            patches[_LAYER_PATCHES] = [(ResBlock, _as_layer_patch(branches, others)), *others]
        return options

    def text_width(self, model) -> int:
        """See `sites.CrossAttentionFamily`."""
        return model.model_config.unet_config["context_dim"]

    def architecture(self, text_width: int) -> str:
        """See `sites.CrossAttentionFamily`."""
        known = _ARCHITECTURES.get(text_width)
        return f"{known} (text width {text_width})" if known else f"a model of text width {text_width}"

    def has_site(self, key: str) -> bool:
        """See `sites.CrossAttentionFamily`."""
        return bool(_KEY.fullmatch(key))

    def layer(self, key: str, part: str) -> str:
        """See `sites.CrossAttentionFamily`; the names are those of CompVis and of LoRA files."""
        path, number, depth = _place(key)
        return f"{_CONTAINERS[path].format(number)}.transformer_blocks.{depth}.attn2.{_PARTS[part]}"

    def projections(self, network: torch.nn.Module) -> tuple[str, ...]:
        """See `sites.CrossAttentionFamily`."""
        attention = [name for name, module in network.named_modules() if isinstance(module, CrossAttention)]
        return tuple(f"{name}.{_PARTS[part]}" for name in attention for part in "qkv")

    def diffusers_names(self, model) -> Mapping[str, str]:
        """See `sites.CrossAttentionFamily`."""
        return comfy.utils.unet_to_diffusers(model.model_config.unet_config)

    def levels(self, network: torch.nn.Module) -> tuple[tuple[int, int], ...]:
        """See `sites.EncoderFamily`."""
        self.sites(network)  # refuses video models, whose batch are frames
        found, last = [], (0, 0)
        for number, block in enumerate(network.input_blocks):
            branches = [module for module in block if isinstance(module, ResBlock)]
            if any(isinstance(module, Downsample) for module in block) or any(branch.updown for branch in branches):
                found.append(last)
            elif branches:
                last = number, branches[-1].out_channels
        return (*found, last)

    @_once_per_network
    def _places(self, network: torch.nn.Module) -> tuple[dict[int, int], tuple[Site, ...]]:
        """The last block of each level, -1 being the input, and all cross-attention."""
        blocks = {-1: 0, **{level: number for level, (number, _) in enumerate(self.levels(network))}}
        return blocks, tuple(site for site in self.sites(network) if site.kind == CROSS)

    def with_additions(self, executor, features, x, timesteps, context, y, control, transformer_options, **kwargs):
        """See `sites.EncoderFamily`."""
        options = transformer_options.copy()
        patches = options["patches"] = options.get("patches", {}).copy()
        network = executor.class_obj
        blocks, cross = self._places(network)
        added = {blocks[level]: value for level, value in features.levels.items()}

        def to_level(h, told):
            value = added.get(told["block"][1]) if told["block"][0] == "input" else None
            return h if value is None else h + _of_size(value, h)

        def to_time(embedding, _channels, _told):
            return embedding + features.time.to(embedding)

        if added:
            patches["input_block_patch"] = [*patches.get("input_block_patch", []), to_level]
        if features.time is not None:
            patches["emb_patch"] = [*patches.get("emb_patch", []), to_time]
        if features.tokens is not None:
            text = context.shape[1]
            context = torch.cat([context, features.tokens.to(context)], 1)
            if features.kept is not None:
                unseen = torch.nn.functional.pad(~features.kept.to(context.device), (text, 0))[:, None]
                bias = context.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))
                options = self.install(network, options, dict.fromkeys(cross, partial(_own_tokens, bias)))
        return executor(x, timesteps, context, y, control, options, **kwargs)

    def sees_places(self, network: torch.nn.Module, layer: str) -> bool:
        """See `sites.CrossAttentionFamily`."""
        try:
            module = network.get_submodule(layer)
        except AttributeError:
            return False
        outside = not set(layer.split(".")).isdisjoint(_OUTSIDE_THE_PICTURE)
        # Quantized linear layers of ComfyUI are no torch.nn.Linear.
        linear = isinstance(module, torch.nn.Linear) or hasattr(module, "in_features")
        return (linear or isinstance(module, torch.nn.Conv2d)) and not outside

    def around(self, network: torch.nn.Module, layer: str) -> str | None:
        """See `sites.CrossAttentionFamily`."""
        module, pieces = network, layer.split(".")
        for i, piece in enumerate(pieces[:-1], 1):
            module = getattr(module, piece)
            if isinstance(module, SpatialTransformer):
                return ".".join(pieces[:i])
        return None


def _place(key: str) -> tuple[str, int, int]:
    """ComfyUI's (path, block number, transformer number) for a site key."""
    path, number, depth = _KEY.fullmatch(key).groups()
    return path, int(number), int(depth)


def _blocks(unet: UNetModel) -> Iterable[tuple[str, int, int | None, torch.nn.Module]]:
    """(path, number, decoder stage, module) of all blocks in order of execution; a resolution change ends a stage."""
    for number, block in enumerate(unet.input_blocks):
        yield "input", number, None, block
    if unet.middle_block is not None:
        yield "middle", 0, None, unet.middle_block
    stage = 0
    for number, block in enumerate(unet.output_blocks):
        yield "output", number, stage, block
        stage += any(isinstance(part, (Upsample, Downsample)) for part in block)


def _of_size(value: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """A feature map (n, C, h', w') at the size of another one, which other nodes may have shrunk."""
    if value.shape[-2:] != h.shape[-2:]:
        value = torch.nn.functional.interpolate(value.float(), h.shape[-2:], mode="nearest-exact")
    return value.to(h)


def _branches(block: torch.nn.Module) -> list[ResBlock]:
    """The residual blocks in `block` that keep the resolution."""
    return [module for module in block.modules() if isinstance(module, ResBlock) and not module.updown]


def _own_tokens(bias: torch.Tensor, call: AttentionCall) -> torch.Tensor:
    """Cross-attention with a bias (B, 1, Lk), minus infinity for keys that a row does not see."""
    return call.attend(call.q, call.k, call.v, bias.to(call.q))


def _as_host_patch(handler: Handler, previous: Callable | None) -> Callable:
    def patch(q, k, v, extra_options, **_):
        heads, grid = extra_options["n_heads"], tuple(extra_options["activations_shape"][-2:])
        attend = partial(host_attention, heads=heads, options=extra_options)
        other = None if previous is None else lambda q, k, v: previous(q, k, v, extra_options)
        return handler(AttentionCall(q, k, v, heads, grid, slice(0, q.shape[1]), attend, other))

    return patch


def _as_layer_patch(handlers: Mapping[tuple, Handler], others: Sequence[tuple[type, Callable]]) -> Callable:
    def patch(layer, x, embedding, context, options, *rest):
        # ComfyUI stops at the first patch that matches a layer, so patches of other nodes must be called here.
        other = next((patch for kind, patch in others if isinstance(layer, kind)), None)

        def evaluate():
            return layer(x, embedding) if other is None else other(layer, x, embedding, context, options, *rest)

        handler = handlers.get(tuple(options["block"]))
        return evaluate() if handler is None else handler(ResBlockCall(layer, x, evaluate))

    return patch
