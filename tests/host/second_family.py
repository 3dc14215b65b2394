"""The host's Z-Image transformer as a family: all that an installed one would be is this file under
host/model/families, and its name in FAMILIES there.

Its joint layers see [text, picture], each padded to a multiple of tokens; the noise refiners ahead of them see the
picture and its padding, and the context refiners ahead of those the text alone. No list of patches reaches them, but
the host asks one function, `optimized_attention_override`, for every attention (specs/dit.md, 0.3 and A).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import partial

import torch
from comfy.ldm.lumina.model import NextDiT
from comfy.patcher_extension import WrappersMP
from conceptloom.host.model.sites import SELF, AttentionCall, Handler, Site, host_attention

OVERRIDE = "optimized_attention_override"


class ZImageFamily:
    """See `sites.Family`. A site's key is its layer's name. Of models with reference latents nothing is known."""

    names = "Z-Image"
    kinds = frozenset({SELF})

    def owns(self, module: torch.nn.Module) -> bool:
        """See `sites.Family`."""
        return isinstance(module, NextDiT)

    def sites(self, network: NextDiT) -> tuple[Site, ...]:
        """See `sites.Family`."""
        keys = [f"{name}.{i}" for name in ("noise_refiner", "layers") for i in range(len(network.get_submodule(name)))]
        return tuple(Site(SELF, key, i, i, False, None) for i, key in enumerate(keys))

    def install(self, network: NextDiT, options: dict, handlers: Mapping[Site, Handler]) -> dict:
        """See `sites.Family`. What others have as the override computes whatever needs no bias."""
        by_key = {site.key: handler for site, handler in handlers.items()}

        def forward(executor, x, *args, transformer_options, **kwargs):
            grid = tuple(-(-side // network.patch_size) for side in x.shape[-2:])
            override = _override(network, grid, by_key, transformer_options.get(OVERRIDE))
            options = {**transformer_options, OVERRIDE: override}
            return executor(x, *args, transformer_options=options, **kwargs)

        wrappers = {kind: dict(by_name) for kind, by_name in options.get("wrappers", {}).items()}
        forwards = wrappers.setdefault(WrappersMP.DIFFUSION_MODEL, {})
        forwards[OVERRIDE] = [*forwards.get(OVERRIDE, []), forward]
        return {**options, "wrappers": wrappers}


def _override(network: NextDiT, grid: tuple[int, int], handlers: Mapping[str, Handler], earlier):
    """The override of one forward pass."""
    tokens, multiple = grid[0] * grid[1], network.pad_tokens_multiple or 1
    padded = -(-tokens // multiple) * multiple
    # Refiners are not told apart by the options, so their calls are counted.
    calls = itertools.count(-len(network.context_refiner))

    def site_key(options: dict) -> str:
        return f"layers.{options['block_index']}" if "block_index" in options else f"noise_refiner.{next(calls)}"

    def override(kernel, q, k, v, heads, *args, transformer_options, **kwargs):
        handler = handlers.get(site_key(transformer_options))
        options = {name: option for name, option in transformer_options.items() if name != OVERRIDE}
        if earlier is not None:
            options[OVERRIDE] = earlier
            kernel = partial(earlier, kernel)
        if handler is None:
            return kernel(q, k, v, heads, *args, transformer_options=options, **kwargs)
        start = q.shape[2] - padded
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        attend = partial(host_attention, heads=heads, options=options)
        return handler(AttentionCall(q, k, v, heads, grid, slice(start, start + tokens), attend, None))

    return override
