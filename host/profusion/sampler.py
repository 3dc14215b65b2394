"""Fusion sampling as a SAMPLER: a fusion stage before each step of another SAMPLER."""

from __future__ import annotations

import inspect

import comfy.samplers
from comfy.k_diffusion.sampling import default_noise_sampler, trange
from comfy.model_sampling import CONST

from ...samplers.fusion import Fusion, Levels, sample_fusion
from ..model.noise import ADDS_NOISE, adds_noise
from ..model.window import Window
from .guider import FusionGuider

_WHOLE_SCHEDULES = (
    "dpm_fast_function",
    "dpm_adaptive_function",
    "sample_unipc",
    "sample_unipc_bh2",
    "sample_heunpp2",
    "sample_lcm_upscale",
)
"""Functions of SAMPLERs that cannot run one step by itself, or would be another sampler then."""


def fusion_sampler(base, repeats: int, eta: float, window: Window):
    """A SAMPLER with a fusion stage before each step of `base`.

    Args:
        base: the host's SAMPLER for refinement. One that looks back at earlier steps runs each as its first.
        repeats, eta: see `samplers.fusion.Fusion`.
        window: the part of the schedule in which the stage is run.

    Raises:
        ValueError: the base cannot run one step by itself, or a value is out of its range.
    """
    if not isinstance(base, comfy.samplers.KSAMPLER):
        raise ValueError(f"sampler: expected one of the host's samplers, got a {type(base).__name__}")
    function = base.sampler_function
    name = getattr(function, "__name__", type(function).__name__)
    if name in _WHOLE_SCHEDULES:
        raise ValueError(f"sampler: expected one that can run a single step, such as euler or heun, got {_shown(name)}")
    Fusion(repeats, eta)
    takes_noise = "noise_sampler" in inspect.signature(function).parameters

    def fusion(model, x, sigmas, extra_args=None, callback=None, disable=None):
        guider = model.inner_model
        sampling = guider.model_patcher.get_model_object("model_sampling")
        here = window.levels(sampling)
        noise_sampler = default_noise_sampler(x, seed=(extra_args or {}).get("seed"))
        options = dict(base.extra_options)
        if takes_noise:
            # One source for both stages; the base would begin its own anew in every step.
            options["noise_sampler"] = noise_sampler
        return sample_fusion(
            model,
            x,
            sigmas,
            extra_args,
            callback,
            disable,
            base=function,
            base_options=options,
            fusion=Fusion(repeats, eta, here.highest, here.lowest),
            levels=levels_of(sampling),
            noise_sampler=noise_sampler,
            share=guider.share if isinstance(guider, FusionGuider) else None,
            progress=trange,
        )

    setattr(fusion, ADDS_NOISE, (repeats > 0 and eta > 0) or adds_noise(base))
    return comfy.samplers.KSAMPLER(fusion, inpaint_options=base.inpaint_options)


def levels_of(sampling) -> Levels:
    """What noise levels mean to a model with this model_sampling."""
    flow = isinstance(sampling, CONST)
    return Levels(flow, float(sampling.sigma_min), getattr(sampling, "noise_scale", 1.0) if flow else 1.0)


def _shown(name: str) -> str:
    return name.removesuffix("_function").removeprefix("sample_")
