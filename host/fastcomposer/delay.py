"""Conditionings that switch at an exact step, with any sampler, scheduler and guider that follows a schedule.

ComfyUI limits a conditioning to a part of sampling by percent of the noise schedule, which matches a step only on some
schedules. Therefore the parts of a conditioning contain a `Delay`, and a MODEL from `prepared` replaces it by noise
levels as soon as the schedule is known. (A hook on the conditioning would not need the MODEL, but with dynamic memory
ComfyUI would then load a second copy of the model.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from comfy.patcher_extension import WrappersMP

from ...samplers.switching import NEAREST, boundary_sigma, first_subject_step
from ..model.carried import carried_by, carry

TAG = "conceptloom_delay"
_PERCENTS = ("start_percent", "end_percent", "clip_start_percent", "clip_end_percent")


@dataclass(frozen=True, eq=False)
class Delay:
    """When a conditioning switches to its second part.

    Attributes:
        alpha: share of the sampled steps that use the second part; ignored if `step` is given.
        step: first step of the second part, counted from 0; None uses `alpha`.
        start_at_step: the first step that this sampler runs, if several samplers share one schedule; `step` is counted
            from the beginning of the schedule.
        counting: how `alpha` is converted to a step, see `samplers.switching`.
    """

    alpha: float
    step: int | None
    start_at_step: int
    counting: str

    @property
    def always_second(self) -> bool | None:
        """True if the second part is used in all steps, False if in none, for any number of steps; else None."""
        if self.step is not None:
            return True if self.step <= self.start_at_step else None
        if self.alpha == 0:
            return False
        # With the published countings the first step uses the text even then.
        return True if self.alpha == 1 and self.counting == NEAREST else None

    def first_step(self, steps: int) -> int:
        """Index of the first step of the second part, out of `steps` sampled steps."""
        if self.step is None:
            return first_subject_step(self.alpha, steps, self.counting)
        return max(0, self.step - self.start_at_step)


@dataclass(frozen=True, eq=False)
class _Part:
    """What each entry of a delayed conditioning contains: the delay, and whether it belongs to the second part."""

    delay: Delay
    late: bool


_UNPREPARED = (
    "Delayed Subject Conditioning: model: expected one from Load FastComposer in the sampler, for it tells the "
    "conditioning when to switch, got another (connect yours to Load FastComposer's input)."
)


def delayed(early: list, late: list, delay: Delay) -> list:
    """Combines two conditionings into one that is `early` before the switch and `late` from the switch on.

    The inputs are not changed. If one part is used in all steps of any schedule, it is returned alone, and works with
    any MODEL. Otherwise `late` comes first, because some nodes (attention couples) read only the first tensor, and for
    them seeing the subjects too early is better than never.

    Raises:
        ValueError: one of the conditionings is already delayed.
    """
    entries = []
    for name, conditioning, is_late in (("subject", late, True), ("text_only", early, False)):
        for tensor, extras in conditioning:
            if carried_by(extras, TAG):
                raise ValueError(f"{name}: expected a conditioning that does not switch yet, got a delayed one")
            entries.append([tensor, carry(extras, TAG, _Part(delay, is_late), _UNPREPARED)])
    if delay.always_second is None:
        return entries
    return list(late if delay.always_second else early)


def prepared(model):
    """Returns a clone of the MODEL that passes the schedule to delayed conditionings and is otherwise the same."""
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, TAG)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, TAG, _outer_sample)
    return model


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    levels, schedule = sigmas.tolist(), guider.model_patcher.get_model_object("model_sampling")
    for role, entries in guider.conds.items():
        resolved = [_resolve(entry, levels, schedule) for entry in entries]
        # If both sides have areas, even a part that is never used would pass its range on to the negative.
        active = [entry for entry in resolved if entry.get("timestep_start", math.inf) >= entry.get("timestep_end", 0)]
        guider.conds[role] = active or resolved
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _resolve(entry: dict, sigmas: list[float], schedule) -> dict:
    """The entry with the noise levels between which it is used."""
    part = carried_by(entry, TAG)
    if part is None:
        return entry
    steps = len(sigmas) - 1
    step = part.delay.first_step(steps)
    rising = sigmas[0] < sigmas[-1]
    if step <= 0 or step >= steps:
        start, end = (math.inf, 0.0) if part.late == (step <= 0) else (0.0, math.inf)
    else:
        boundary = boundary_sigma(sigmas, step)
        start, end = (boundary, 0.0) if part.late != rising else (math.inf, boundary)
    start, end = _within_percents(entry, schedule, start, end)
    kept = {key: value for key, value in entry.items() if key not in _PERCENTS}
    inputs = {name: one for name, one in entry["model_conds"].items() if name != TAG}
    return {**kept, "model_conds": inputs, "timestep_start": start, "timestep_end": end}


def _within_percents(entry: dict, schedule, start: float, end: float) -> tuple[float, float]:
    """Limits a range to the one that other nodes have set, which ComfyUI would use in place of ours."""
    for key in _PERCENTS:
        if key in entry:
            level = schedule.percent_to_sigma(entry[key])
            start, end = (min(start, level), end) if "start" in key else (start, max(end, level))
    return start, end
