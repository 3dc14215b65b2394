"""Conditionings that switch at an exact step, on any sampler, scheduler and guider that follows a schedule.

The host limits a conditioning to a part of sampling by percent of the noise schedule, which hits a step only on some
schedules. So the parts carry a plan, and a MODEL that is `prepared` gives them, once the schedule is known, the noise
levels between which they hold. (A hook on the conditioning would do without the MODEL, but with its dynamic memory the
host then loads a second copy of the model.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from comfy.patcher_extension import WrappersMP

from ...samplers.switching import NEAREST, boundary_sigma, first_subject_step

TAG = "conceptloom_delay"
_PERCENTS = ("start_percent", "end_percent", "clip_start_percent", "clip_end_percent")


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

    @property
    def always_second(self) -> bool | None:
        """Whether the second part holds in all steps (true) or in none (false), however many there are; else None."""
        if self.step is not None:
            return True if self.step <= self.start_at_step else None
        if self.alpha == 0:
            return False
        # The published countings leave the text a step even then.
        return True if self.alpha == 1 and self.counting == NEAREST else None

    def first_step(self, steps: int) -> int:
        """The first step of the second part among `steps` that are sampled."""
        if self.step is None:
            return first_subject_step(self.alpha, steps, self.counting)
        return max(0, self.step - self.start_at_step)


@dataclass(frozen=True, eq=False)
class _Part:
    """What an entry carries: its delay, and whether it is the second part."""

    delay: Delay
    late: bool


class _NeedsPreparedModel:
    """Stands for a noise level until the schedule is known; whoever compares it has a MODEL that was not prepared."""

    def _refuse(self, _):
        raise ValueError(
            "Delayed Subject Conditioning: model: expected one from Load FastComposer in the sampler, for it tells the "
            "conditioning when to switch, got another (connect yours to Load FastComposer's input)."
        )

    __lt__ = __gt__ = _refuse


def delayed(early: list, late: list, delay: Delay) -> list:
    """One conditioning that is `early` up to the switch and `late` from it on; neither is changed.

    Where no schedule has a switch, it is the one that holds, alone, for any MODEL. Else `late` stands first, for nodes
    that read the first tensor alone (attention couples) had better see the subjects too early than never.

    Raises:
        ValueError: one of them has been delayed already.
    """
    entries = []
    for name, conditioning, is_late in (("subject", late, True), ("text_only", early, False)):
        for tensor, extras in conditioning:
            if TAG in extras:
                raise ValueError(f"{name}: expected a conditioning that does not switch yet, got a delayed one")
            waiting = {TAG: _Part(delay, is_late), "timestep_start": _NeedsPreparedModel()}
            entries.append([tensor, {**extras, **waiting}])
    if delay.always_second is None:
        return entries
    return list(late if delay.always_second else early)


def prepared(model):
    """The MODEL, in a clone that tells delayed conditionings the schedule and is otherwise the same."""
    model = model.clone()
    model.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, TAG)
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, TAG, _outer_sample)
    return model


def _outer_sample(executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
    guider = executor.class_obj
    levels, schedule = sigmas.tolist(), guider.model_patcher.get_model_object("model_sampling")
    for role, entries in guider.conds.items():
        resolved = [_resolve(entry, levels, schedule) for entry in entries]
        # A part that never comes would still lend its range to the negative where both have areas.
        active = [entry for entry in resolved if entry.get("timestep_start", math.inf) >= entry.get("timestep_end", 0)]
        guider.conds[role] = active or resolved
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _resolve(entry: dict, sigmas: list[float], schedule) -> dict:
    """The entry with the noise levels between which it holds."""
    part = entry.get(TAG)
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
    kept = {key: value for key, value in entry.items() if key not in (TAG, *_PERCENTS)}
    return {**kept, "timestep_start": start, "timestep_end": end}


def _within_percents(entry: dict, schedule, start: float, end: float) -> tuple[float, float]:
    """A range that other nodes have set stays in force: the host would put it in place of ours."""
    for key in _PERCENTS:
        if key in entry:
            level = schedule.percent_to_sigma(entry[key])
            start, end = (min(start, level), end) if "start" in key else (start, max(end, level))
    return start, end
