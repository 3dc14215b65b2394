"""The one way into a model's attention: found by walking the model, patched only while it runs, chained, freed.

A *system* (FreeCustom and its siblings) is attached to a MODEL and registers two wrappers and nothing else:

- OUTER_SAMPLE opens a *run*, the state of one sampling, and closes it when sampling ends, fails or is interrupted.
- APPLY_MODEL asks the run which attention *sites* it wants to handle in this model evaluation, and installs its
  handlers in a copy of the options of this one call. Whatever other nodes have put at a site is seen there, no
  matter who came first, and handed to the handler. A run that wants nothing leaves the call untouched.

A site is a self- or cross-attention layer, named by the model's *family*. Systems speak of sites alone; what a family's
blocks are called, and how a handler gets into them, only its adapter here knows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import comfy.model_patcher
import torch
from comfy.ldm.modules import attention as kernels
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample
from comfy.patcher_extension import WrappersMP

log = logging.getLogger("conceptloom")

RUNS = "conceptloom_runs"
ROLE_TAG = "conceptloom_role"
POSITIVE, NEGATIVE = "positive", "negative"
SELF, CROSS = "self", "cross"

LAST_TWO_STAGES = "last two decoder stages"
STAGE_BEFORE_LAST = "decoder stage before last"
LAST_STAGE = "last decoder stage"
ALL_BLOCKS = "all blocks"
PRESETS = (LAST_TWO_STAGES, STAGE_BEFORE_LAST, LAST_STAGE, ALL_BLOCKS)

_KERNELS_THAT_TAKE_A_BIAS = ("attention_basic", "attention_split", "attention_sub_quad", "attention_xformers")


@dataclass(frozen=True)
class Site:
    """One attention layer of a model.

    Attributes:
        kind: SELF or CROSS.
        key: what the host calls its block, such as ("output", 6, 0).
        index: its place among the sites of its kind in order of execution; layer number of the papers.
        stage: for decoder sites, the place of its resolution stage among those with attention, counted from the
            end (-1 is the last); None elsewhere.
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


Handler = Callable[[AttentionCall], torch.Tensor]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model within a run.

    Attributes:
        model: the host's BaseModel, on the device that computes.
        x: (rows, C, h, w), all conditionings of this call one after the other.
        sigma: (rows,), equal values.
        noise_level: the same as a number.
        step: index of the sampling step it belongs to.
        roles: per conditioning in the batch POSITIVE, NEGATIVE, or another name it was tagged with.
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


class Run(Protocol):
    """State of one sampling."""

    def handlers(self, evaluation: Evaluation) -> Mapping[Site, Handler]:
        """Which sites to handle in this evaluation, and how; empty leaves the evaluation untouched."""

    def finish(self, samples: torch.Tensor) -> None:
        """Sampling has succeeded and gave this latent."""

    def close(self) -> None:
        """Sampling has ended in any way: let go of everything."""


class System(Protocol):
    """What is attached to a MODEL."""

    def begin(self, sampling: Sampling) -> Run | None:
        """Opens the run of one sampling, before the model is loaded; None leaves the sampling untouched."""


@dataclass(frozen=True)
class Sampling:
    """What is known when a sampling begins.

    Attributes:
        guider: the host's guider; its model_patcher and conds are final.
        noise: (B, C, h, w), the shape of the picture's latent.
        sigmas: the schedule, as numbers.
        seed: the sampler's.
    """

    guider: Any
    noise: torch.Tensor
    sigmas: tuple[float, ...]
    seed: int


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
            for module in container.modules():
                if isinstance(module, SpatialVideoTransformer) or "Temporal" in type(module).__name__:
                    raise ValueError("model: a picture model is wanted, not one with video layers")
                if isinstance(module, BasicTransformerBlock):
                    kind_of_first = CROSS if module.disable_self_attn else SELF
                    found.append((kind_of_first, (path, position, depth), stage))
                    if module.attn2 is not None:
                        found.append((CROSS, (path, position, depth), stage))
                    depth += 1
        with_attention = sorted({stage for _, _, stage in found if stage is not None})
        stages = {stage: i - len(with_attention) for i, stage in enumerate(with_attention)}
        counts = {SELF: 0, CROSS: 0}
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
        return options


def _as_host_patch(handler: Handler, previous: Callable | None) -> Callable:
    def patch(q, k, v, extra_options, **_):
        return handler(AttentionCall(q, k, v, extra_options, previous))

    return patch


FAMILIES = (UNetFamily(),)


def family_of(diffusion_model) -> UNetFamily:
    """The adapter of a model's family.

    Raises:
        ValueError: no family supports it.
    """
    for family in FAMILIES:
        if family.owns(diffusion_model):
            return family
    supported = ", ".join(family.names for family in FAMILIES)
    raise ValueError(f"model: one of the families {supported} is wanted, not {type(diffusion_model).__name__}")


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
        raise ValueError(f"blocks: numbers from 0 to {len(own) - 1} are wanted for this model, not {max(numbers)}")
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
            raise ValueError(f'{name}: numbers such as "10-15" or "3, 7-9" are wanted, not {text!r}')
        numbers.update(range(int(first), int(last or first) + 1))
    if not numbers:
        raise ValueError(f"{name}: rising ranges are wanted, not {text!r}")
    return frozenset(numbers)


class StopForward(Exception):  # noqa: N818 (no error: it ends a forward pass early)
    """Raised by a handler when the rest of the model need not be computed; see `partial_forward`."""


def partial_forward(model, x, sigma, conds: Mapping[str, torch.Tensor], options: dict) -> None:
    """Runs a BaseModel on its own until a handler raises StopForward, past all wrappers of other packs."""
    conds = dict(conds)
    with contextlib.suppress(StopForward):
        model._apply_model(
            x, sigma, conds.pop("c_concat", None), conds.pop("c_crossattn", None), None, options, **conds
        )


@dataclass(frozen=True)
class _Scope:
    """A run, and what it takes to read the host's calls for it."""

    run: Run
    sigmas: tuple[float, ...]
    roles: Mapping[Any, str]
    second_is_negative: bool

    @classmethod
    def open(cls, run: Run, sampling: Sampling) -> _Scope:
        conds = sampling.guider.conds
        roles = {cond["uuid"]: cond.get(ROLE_TAG, side) for side, entries in conds.items() for cond in entries or ()}
        return cls(run, sampling.sigmas, roles, set(conds) == {POSITIVE, NEGATIVE})

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
        return tuple(
            NEGATIVE if self.second_is_negative and index == 1 else self.roles.get(uuid, POSITIVE)
            for index, uuid in zip(indices, uuids, strict=True)
        )


def attach(model, key: str, system: System):
    """A clone of the MODEL with the system attached, in the place of one of the same key."""
    model = model.clone()
    detach_key(model, key)
    model.set_attachments(key, system)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, _outer_sample(key, system))
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


def _outer_sample(key: str, system: System) -> Callable:
    def outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        seed = args[3] if len(args) > 3 else kwargs.get("seed")
        sampling = Sampling(guider, noise, tuple(sigmas.tolist()), seed or 0)
        run = system.begin(sampling)
        if run is None:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        original = guider.model_options
        try:
            guider.model_options = comfy.model_patcher.create_model_options_clone(original)
            runs = guider.model_options.setdefault("transformer_options", {}).setdefault(RUNS, {})
            runs[key] = _Scope.open(run, sampling)
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
            run.finish(samples)
            return samples
        finally:
            guider.model_options = original
            run.close()

    return outer_sample


def _apply_model(key: str) -> Callable:
    def apply_model(executor, x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs):
        scope = transformer_options.get(RUNS, {}).get(key)
        if scope is not None:
            evaluation = scope.read(executor.class_obj, x, sigma, transformer_options)
            handlers = scope.run.handlers(evaluation)
            if handlers:
                family = family_of(executor.class_obj.diffusion_model)
                transformer_options = family.install(transformer_options, handlers)
        return executor(x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs)

    return apply_model
