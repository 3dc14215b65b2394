"""Conditionings that switch at an exact step, on any sampler, scheduler and guider of the host.

The host limits a conditioning to a part of sampling by percent of the noise schedule, which hits a step only on some
schedulers. So each part carries a hook, which the host runs once the schedule is known; there the parts get the noise
levels between which they hold. No MODEL is patched. The hook is taken off again in the same place, for the host
evaluates conditionings of different hooks one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import comfy.hooks
from comfy.patcher_extension import WrappersMP

from ..samplers.switching import boundary_sigma, first_subject_step

TAG = "conceptloom_delay"


@dataclass(frozen=True, eq=False)
class Delay:
    """When the second part of a conditioning takes over.

    Attributes:
        alpha: share of the sampled steps that belong to the second part; ignored where `step` is given.
        step: first step of the second part, counted from 0; None takes `alpha`.
        start_at_step: the first step that this sampler runs, where several share one schedule; `step` counts from the
            schedule's beginning.
        counting: how `alpha` becomes a step, see `samplers.switching`.
    """

    alpha: float
    step: int | None
    start_at_step: int
    counting: str

    def first_step(self, steps: int) -> int:
        """The first step of the second part among `steps` that are sampled."""
        if self.step is None:
            return first_subject_step(self.alpha, steps, self.counting)
        return max(0, self.step - self.start_at_step)


@dataclass(frozen=True, eq=False)
class _Part:
    """What an entry carries: its delay, which part it is, and its hooks before and with ours."""

    delay: Delay
    late: bool
    hook: comfy.hooks.TransformerOptionsHook
    before: comfy.hooks.HookGroup | None
    hooked: comfy.hooks.HookGroup


def delayed(early: list, late: list, delay: Delay) -> list:
    """One conditioning that is `early` up to the switch and `late` from it on; neither is changed.

    Raises:
        ValueError: one of them has been delayed already.
    """
    hook = comfy.hooks.TransformerOptionsHook({"wrappers": {WrappersMP.OUTER_SAMPLE: {TAG: [_outer_sample]}}})
    entries = []
    for name, conditioning, is_late in (("text_only", early, False), ("subject", late, True)):
        for tensor, extras in conditioning:
            if TAG in extras:
                raise ValueError(f"{name}: a conditioning that does not switch yet is wanted, not a delayed one")
            before = extras.get("hooks")
            hooked = before.clone() if before is not None else comfy.hooks.HookGroup()
            hooked.add(hook)
            part = _Part(delay, is_late, hook, before, hooked)
            entries.append([tensor, {**extras, TAG: part, "hooks": hooked}])
    return entries


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    levels, schedule = sigmas.tolist(), guider.model_patcher.get_model_object("model_sampling")
    for role, entries in guider.conds.items():
        guider.conds[role] = [_resolve(entry, levels, schedule) for entry in entries]
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _resolve(entry: dict, sigmas: list[float], schedule) -> dict:
    """The entry with its noise levels and without our hook."""
    part = entry.get(TAG)
    if part is None:
        return entry
    steps = len(sigmas) - 1
    step = part.delay.first_step(steps)
    if step <= 0 or step >= steps:
        start, end = (math.inf, 0.0) if part.late == (step <= 0) else _NEVER
    else:
        boundary = boundary_sigma(sigmas, step)
        start, end = (boundary, 0.0) if part.late else (math.inf, boundary)
    start, end = _within_percents(entry, schedule, start, end)
    return {
        **{key: value for key, value in entry.items() if key not in (TAG, "hooks", *_PERCENTS)},
        **_hooks_without(entry.get("hooks"), part),
        "timestep_start": start,
        "timestep_end": end,
    }


_NEVER = (0.0, math.inf)
_PERCENTS = ("start_percent", "end_percent", "clip_start_percent", "clip_end_percent")


def _within_percents(entry: dict, schedule, start: float, end: float) -> tuple[float, float]:
    """A range that other nodes have set stays in force: the host would put it in place of ours."""
    for key in _PERCENTS:
        if key in entry:
            level = schedule.percent_to_sigma(entry[key])
            start, end = (min(start, level), end) if "start" in key else (start, max(end, level))
    return start, end


def _hooks_without(hooks: comfy.hooks.HookGroup | None, part: _Part) -> dict:
    if hooks is part.hooked:
        rest = part.before
    else:
        rest = hooks.clone()
        rest.remove(part.hook)
    return {"hooks": rest} if rest else {}
