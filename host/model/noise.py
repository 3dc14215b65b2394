"""Which SAMPLERs of ComfyUI add noise of their own."""

from __future__ import annotations

import inspect

ADDS_NOISE = "conceptloom_adds_noise"
"""Attribute by which the function of one of our SAMPLERs says it."""
# Samplers that have the parameters for fresh noise, but do not add any.
_QUIET = ("sample_res_multistep", "sample_res_multistep_cfg_pp")


def adds_noise(sampler) -> bool:
    """Whether a SAMPLER of ComfyUI adds fresh noise during sampling, as ancestral and SDE samplers do. False for
    samplers of other kinds, about which nothing is known."""
    function = getattr(sampler, "sampler_function", None)
    if function is None or getattr(function, "__name__", "") in _QUIET:
        return False
    if hasattr(function, ADDS_NOISE):
        return getattr(function, ADDS_NOISE)
    defaults = {name: one.default for name, one in inspect.signature(function).parameters.items()}
    given = {**defaults, **sampler.extra_options}
    if given.get("s_churn", 0) > 0:
        return True
    always = 1.0 if "noise_sampler" in defaults else 0.0
    return all(given.get(name, always) > 0 for name in ("eta", "s_noise"))
