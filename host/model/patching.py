"""The only way in which systems patch a model: at its sites, during model calls, along with patches of other nodes.

A *system* (such as FreeCustom) is attached to a MODEL. It adds an attachment and two wrappers, nothing else:

- OUTER_SAMPLE opens a *run*, the state of one sampling, and closes it when sampling ends, fails or is interrupted.
- APPLY_MODEL asks the run which *sites* (see `sites`) to handle in this model evaluation, and installs the handlers in
  a copy of the transformer options of this one call. A handler also receives the patch of another node at its site,
  regardless of which was applied first. A run without handlers leaves the call unchanged.

While a run is open, compiled modules run uncompiled (`_uncompiled`), whichever node compiled them and in which order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import comfy.hooks
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ..advice import executing_node, withdraw_earlier
from .families import family_of, network_of
from .layers import LayerHooks, handled_layers
from .sites import Handler, Site

log = logging.getLogger("conceptloom")

RUNS = "conceptloom_runs"
ROLE_TAG = "conceptloom_role"
POSITIVE, NEGATIVE = "positive", "negative"
TEXT = "text"
"""The prompt without subjects, where a guider has it as a side of its own."""
SIDES = "conceptloom_sides"
"""Attribute of a guider of ours: the roles of its sides, by the host's index."""
_COMPILE_KEY = "torch.compile"
"""Key of the wrapper that ComfyUI's compile node and most other compile nodes add."""

_NEGATIVES = (NEGATIVE, "empty_negative_prompt")
"""Conditionings that guidance moves away from; the second is Perp-Neg's."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model within a run.

    Attributes:
        model: ComfyUI's BaseModel, on the device of the computation.
        x: (rows, C, h, w), the rows of all conditionings in this call, one conditioning after the other.
        sigma: (rows,), equal values.
        noise_level: the value of `sigma` as a number.
        step: index of the sampling step.
        roles: for each conditioning in the batch POSITIVE, NEGATIVE, TEXT, or another name that it is tagged with.
        options: ComfyUI's transformer options.
    """

    model: Any
    x: torch.Tensor
    sigma: torch.Tensor
    noise_level: float
    step: int
    roles: tuple[str, ...]
    options: dict

    @property
    def rows_per_role(self) -> int:
        """Number of pictures per conditioning."""
        return len(self.x) // len(self.roles)

    @property
    def hooks(self) -> tuple[Any, tuple[float, ...]]:
        """Identifies the weights of this evaluation among those of the run: the hooks of its conditionings, and the
        scheduled strengths of the hooks that change weights. Hooks of other types do not change weights."""
        group = self.model.current_patcher.current_hooks
        changing = [] if group is None else group.get_type(comfy.hooks.EnumHookType.Weight)
        return group, tuple(hook.strength_model for hook in changing)


class Run(Protocol):
    """State of one sampling."""

    def handlers(self, evaluation: Evaluation) -> Mapping[Site, Handler]:
        """Returns the handlers of this evaluation by site; without any, the evaluation is left unchanged."""

    def finish(self, samples: torch.Tensor) -> None:
        """Called with the resulting latent when sampling has succeeded."""

    def close(self) -> None:
        """Called when sampling has ended, whether or not it succeeded. Releases everything."""


@runtime_checkable
class LayerRun(Run, Protocol):
    """A run that also handles single layers."""

    def layers(self, evaluation: Evaluation) -> LayerHooks:
        """Returns the layer hooks of this evaluation; empty if there are none."""


class System(Protocol):
    """What is attached to a MODEL. `name` is the display name of its node."""

    name: str

    def begin(self, sampling: Sampling) -> Run | None:
        """Opens the run of one sampling, before the model is loaded; None leaves the sampling unchanged."""


@dataclass(frozen=True)
class Sampling:
    """What is known when sampling begins.

    Attributes:
        guider: ComfyUI's guider, with its final model_patcher and conds.
        noise: (B, C, h, w), added to the input latent; zeros if that latent already contains the noise.
        sampler: ComfyUI's SAMPLER.
        sigmas: the noise schedule.
        seed: the sampler's seed.
        node: id of the node that attached the system, for `advice.advise`.
    """

    guider: Any
    noise: torch.Tensor
    sampler: Any
    sigmas: tuple[float, ...]
    seed: int
    node: str | None = None


@dataclass(frozen=True)
class _Scope:
    """A run, with what is needed to interpret ComfyUI's model calls for it."""

    run: Run
    sigmas: tuple[float, ...]
    roles: Mapping[Any, str]
    sides: tuple[str, ...]

    @classmethod
    def open(cls, run: Run, sampling: Sampling) -> _Scope:
        conds = sampling.guider.conds
        roles = {
            cond["uuid"]: cond.get(ROLE_TAG, NEGATIVE if side in _NEGATIVES else side)
            for side, entries in conds.items()
            for cond in entries or ()
        }
        known = (POSITIVE, NEGATIVE) if set(conds) == {POSITIVE, NEGATIVE} else ()
        return cls(run, sampling.sigmas, roles, getattr(sampling.guider, SIDES, known))

    def read(self, model, x, sigma, options) -> Evaluation:
        noise_level = float(sigma[0])
        step = sum(level >= noise_level * (1 - 1e-4) for level in self.sigmas[:-1]) - 1
        return Evaluation(model, x, sigma, noise_level, max(0, step), self._roles_of(options), options)

    def _roles_of(self, options) -> tuple[str, ...]:
        """Returns the role of each conditioning in the batch. Both marks are needed: ComfyUI gives the negative's share
        of an area the positive's uuid, but index 1, and guidance that evaluates the negative alone gives it index 0,
        but its own uuid."""
        indices, uuids = options.get("cond_or_uncond"), options.get("uuids")
        if not indices or not uuids:
            return (POSITIVE,)
        return tuple(self._role_of(index, uuid) for index, uuid in zip(indices, uuids, strict=True))

    def _role_of(self, index: int, uuid) -> str:
        side = self.sides[index] if index < len(self.sides) else POSITIVE
        return self.roles.get(uuid, POSITIVE) if side == POSITIVE else side


def attach(model, key: str, system: System, node: str | None = None):
    """Returns a clone of the MODEL with the system attached. A system with the same key is replaced.

    Advice that the system gives during sampling is shown on the node with the id `node`; None means the node that is
    currently executed.
    """
    model = model.clone()
    detach_key(model, key)
    model.set_attachments(key, system)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, _outer_sample(key, system, node or executing_node()))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, _apply_model(key))
    return model


def detach_key(model, key: str) -> None:
    """Removes the system with this key from a MODEL, in place."""
    for wrapper in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
        model.remove_wrappers_with_key(wrapper, key)
    if model.get_attachment(key) is not None:
        model.remove_attachments(key)


def attached(model, key: str) -> System | None:
    """Returns the system with this key on a MODEL, or None."""
    return model.get_attachment(key)


def unload_compiled(model) -> None:
    """Unloads a MODEL in which an earlier sampling has left compiled modules, because these have other weight names."""
    if any("._orig_mod." in name for name, _ in model.model.named_parameters()):
        comfy.model_management.unload_model_and_clones(model)


def _outer_sample(key: str, system: System, node: str | None) -> Callable:
    def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        seed = args[3] if len(args) > 3 else kwargs.get("seed")
        sampling = Sampling(guider, noise, sampler, tuple(sigmas.tolist()), seed or 0, node)
        withdraw_earlier(node)
        run = system.begin(sampling)
        if run is None:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        original = guider.model_options
        try:
            guider.model_options = comfy.model_patcher.create_model_options_clone(original)
            runs = guider.model_options.setdefault("transformer_options", {}).setdefault(RUNS, {})
            runs[key] = _Scope.open(run, sampling)
            with _uncompiled(system.name, guider.model_options["transformer_options"]):
                samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            run.finish(samples)
            return samples
        finally:
            guider.model_options = original
            run.close()

    return outer_sample


def is_compiled(options: Mapping) -> bool:
    """Whether a node has compiled the model, by ComfyUI's transformer options."""
    return _COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})


@contextmanager
def _uncompiled(name: str, options: Mapping) -> Iterator[None]:
    """Runs compiled modules uncompiled for the duration of the context.

    Hooks do not run in compiled code, and compile nodes drop its guards on the options that contain our handlers. It
    would run as it was first compiled, without the handlers.

    Raises:
        ValueError: a node has compiled the model, and this version of PyTorch cannot run it uncompiled.
    """
    compiled = is_compiled(options)
    if not hasattr(torch.compiler, "set_stance"):
        if compiled:
            raise ValueError(
                f"{name}: model: expected one that is not compiled, got one from TorchCompileModel; remove that node, "
                "or update PyTorch to 2.6 or newer"
            )
        yield
        return
    if compiled:
        log.info("%s: the model runs uncompiled in this sampling", name)
    with torch.compiler.set_stance("force_eager"):
        yield


def _apply_model(key: str) -> Callable:
    def apply_model(executor, x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs):
        scope = transformer_options.get(RUNS, {}).get(key)
        if scope is not None:
            evaluation = scope.read(executor.class_obj, x, sigma, transformer_options)
            handlers = scope.run.handlers(evaluation)
            if handlers:
                network = network_of(executor.class_obj)
                transformer_options = family_of(network).install(network, transformer_options, handlers)
            if isinstance(scope.run, LayerRun):
                with handled_layers(scope.run.layers(evaluation)):
                    return executor(x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs)
        return executor(x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs)

    return apply_model
