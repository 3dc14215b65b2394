"""The one way into a model: its sites are patched only while it runs, chained, freed.

A *system* (FreeCustom and its siblings) is attached to a MODEL and registers two wrappers and nothing else:

- OUTER_SAMPLE opens a *run*, the state of one sampling, and closes it when sampling ends, fails or is interrupted.
- APPLY_MODEL asks the run which *sites* (see `sites`) it wants to handle in this model evaluation, and installs its
  handlers in a copy of the options of this one call. Whatever other nodes have put at a site is seen there, no
  matter who came first, and handed to the handler. A run that wants nothing leaves the call untouched.

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
"""Of the wrapper that the host's compile node and most others set."""

_NEGATIVES = (NEGATIVE, "empty_negative_prompt")
"""Sides that guidance moves away from; the second is Perp-Neg's."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model within a run.

    Attributes:
        model: the host's BaseModel, on the device that computes.
        x: (rows, C, h, w), all conditionings of this call one after the other.
        sigma: (rows,), equal values.
        noise_level: the same as a number.
        step: index of the sampling step it belongs to.
        roles: per conditioning in the batch POSITIVE, NEGATIVE, TEXT, or another name it was tagged with.
        options: the host's transformer options.
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
        """Pictures per conditioning."""
        return len(self.x) // len(self.roles)

    @property
    def hooks(self) -> tuple[Any, tuple[float, ...]]:
        """What tells the weights of this evaluation from those of others of the run: the hooks of its conditionings,
        and the strengths to which a schedule has set those that change weights. Other hooks only wrap."""
        group = self.model.current_patcher.current_hooks
        changing = [] if group is None else group.get_type(comfy.hooks.EnumHookType.Weight)
        return group, tuple(hook.strength_model for hook in changing)


class Run(Protocol):
    """State of one sampling."""

    def handlers(self, evaluation: Evaluation) -> Mapping[Site, Handler]:
        """Which sites to handle in this evaluation, and how; empty leaves the evaluation untouched."""

    def finish(self, samples: torch.Tensor) -> None:
        """Sampling has succeeded and gave this latent."""

    def close(self) -> None:
        """Sampling has ended in any way: let go of everything."""


@runtime_checkable
class LayerRun(Run, Protocol):
    """A run that handles single layers too."""

    def layers(self, evaluation: Evaluation) -> LayerHooks:
        """What handles layers of the diffusion model in this evaluation; empty where there is nothing to handle."""


class System(Protocol):
    """What is attached to a MODEL; `name` is its node's."""

    name: str

    def begin(self, sampling: Sampling) -> Run | None:
        """Opens the run of one sampling, before the model is loaded; None leaves the sampling untouched."""


@dataclass(frozen=True)
class Sampling:
    """What is known when a sampling begins.

    Attributes:
        guider: the host's guider; its model_patcher and conds are final.
        noise: (B, C, h, w), what is added to the picture's latent; zeros where that is noise already.
        sampler: the host's SAMPLER.
        sigmas: the schedule, as numbers.
        seed: the sampler's.
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
    """A run, and what it takes to read the host's calls for it."""

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
        """Both marks are needed: the host gives the negative's share of an area the positive's uuid, but the
        index 1; and guidance that evaluates the negative alone gives it the index 0, but its own uuid."""
        indices, uuids = options.get("cond_or_uncond"), options.get("uuids")
        if not indices or not uuids:
            return (POSITIVE,)
        return tuple(self._role_of(index, uuid) for index, uuid in zip(indices, uuids, strict=True))

    def _role_of(self, index: int, uuid) -> str:
        side = self.sides[index] if index < len(self.sides) else POSITIVE
        return self.roles.get(uuid, POSITIVE) if side == POSITIVE else side


def attach(model, key: str, system: System, node: str | None = None):
    """A clone of the MODEL with the system attached, in the place of one of the same key.

    What it advises while a picture is sampled is shown on `node`; None means the node that is executed now.
    """
    model = model.clone()
    detach_key(model, key)
    model.set_attachments(key, system)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, _outer_sample(key, system, node or executing_node()))
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, _apply_model(key))
    return model


def detach_key(model, key: str) -> None:
    """Takes the system of this key off a MODEL that the caller owns."""
    for wrapper in (WrappersMP.OUTER_SAMPLE, WrappersMP.APPLY_MODEL):
        model.remove_wrappers_with_key(wrapper, key)
    if model.get_attachment(key) is not None:
        model.remove_attachments(key)


def attached(model, key: str) -> System | None:
    """The system of this key on a MODEL."""
    return model.get_attachment(key)


def unload_compiled(model) -> None:
    """Unloads a MODEL's model where an earlier sampling has left compiled modules in it: weights have other names in
    those."""
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


@contextmanager
def _uncompiled(name: str, options: Mapping) -> Iterator[None]:
    """Compiled modules run as they are written while this is open.

    Compiled code has no hooks, and the compile nodes drop its guards on the options that carry our handlers: it would
    go on as it was first run, and draw the picture without them.

    Raises:
        ValueError: a node has compiled the model, and this PyTorch cannot do without.
    """
    compiled = _COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
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
