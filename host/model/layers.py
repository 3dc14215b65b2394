"""Forward hooks on single layers of a diffusion model, which are given by their module names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch

from .families import family_of

LayerHandler = Callable[[torch.Tensor, torch.Tensor, tuple[int, int] | None], torch.Tensor]
"""(input, output, grid) -> new output of a layer; `grid` is the token grid (h, w) of the enclosing transformer, or None
for a layer outside of transformers."""

LayerHooks = Sequence[Callable[[], torch.utils.hooks.RemovableHandle]]
"""Prepared by `layer_hooks`; each call registers one hook and returns its handle."""

_UNHANDLED = ContextVar("conceptloom_unhandled_layers", default=False)


def layer_hooks(network: torch.nn.Module, handlers: Mapping[str, LayerHandler]) -> LayerHooks:
    """Prepares hooks that run `handlers` on layers of a diffusion model. They can be used for all evaluations.

    Args:
        network: from `network_of`; its family must have cross-attention.
        handlers: by the layer's name in `network`.
    """
    grids: dict[str | None, tuple[int, int]] = {}

    def note(name: str) -> Callable:
        def before(_transformer, inputs) -> None:
            if not _UNHANDLED.get():
                grids[name] = tuple(inputs[0].shape[-2:])

        return before

    def hook(handler: LayerHandler, around: str | None) -> Callable:
        return lambda _layer, inputs, output: (
            output if _UNHANDLED.get() else handler(inputs[0], output, grids.get(around))
        )

    family = family_of(network)
    around = {name: family.around(network, name) for name in handlers}
    transformers = {name: network.get_submodule(name) for name in {*around.values()} - {None}}
    return [
        *(partial(module.register_forward_pre_hook, note(name)) for name, module in transformers.items()),
        *(
            partial(network.get_submodule(name).register_forward_hook, hook(handler, around[name]))
            for name, handler in handlers.items()
        ),
    ]


@contextmanager
def handled_layers(hooks: LayerHooks) -> Iterator[None]:
    """Registers the hooks for the duration of the context."""
    handles = []
    try:
        for register in hooks:
            handles.append(register())
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def unhandled_layers() -> Iterator[None]:
    """Turns all layer handlers off for the duration of the context, for passes other than those of the sampled
    picture."""
    token = _UNHANDLED.set(True)
    try:
        yield
    finally:
        _UNHANDLED.reset(token)
