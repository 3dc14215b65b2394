"""Single layers: handled while a model runs, by their names in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch

from .families import family_of

LayerHandler = Callable[[torch.Tensor, torch.Tensor, tuple[int, int] | None], torch.Tensor]
"""(input, output, grid) of a layer -> the output it shall have; grid (h, w) is that of the transformer around it."""

LayerHooks = Sequence[Callable[[], torch.utils.hooks.RemovableHandle]]
"""What `layer_hooks` has made ready; each call puts one hook into its layer."""

_UNHANDLED = ContextVar("conceptloom_unhandled_layers", default=False)


def layer_hooks(network: torch.nn.Module, handlers: Mapping[str, LayerHandler]) -> LayerHooks:
    """What handles layers of a `network_of` a model with cross-attention, by their names in it; for all evaluations."""
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
    """The hooks are in their layers while this is open."""
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
    """No layer is handled while this is open: for passes that are not the sampled picture's."""
    token = _UNHANDLED.set(True)
    try:
        yield
    finally:
        _UNHANDLED.reset(token)
