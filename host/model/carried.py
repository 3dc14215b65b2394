"""Conditionings that carry something which a prepared MODEL makes use of while it samples.

What is carried lies among the inputs of the model (`model_conds`), which ComfyUI takes from the right conditioning even
where it copies one for an area. A MODEL that is not prepared refuses it with a sentence at its first evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import comfy.conds
import torch
from comfy.patcher_extension import WrappersMP

Conds = list[list[dict] | None]
_RANGE = {"timestep_start", "timestep_end"}


class Carried(comfy.conds.CONDRegular):
    """What a conditioning carries.

    Args:
        content: of the node that made the conditioning.
        sentence: for a sampling with a MODEL that is not prepared.
    """

    def __init__(self, content: Any, sentence: str):
        super().__init__(None)
        self.content, self.sentence = content, sentence

    def process_cond(self, **_):
        """Raises ValueError: only a MODEL that is not prepared comes here."""
        raise ValueError(self.sentence)


class CarriedRun(Protocol):
    """One sampling with what a conditioning carries."""

    def write(self, inputs: Mapping[str, Any], entry: Mapping[str, Any], x: torch.Tensor, sigma: torch.Tensor) -> dict:
        """The inputs of the model for the latents x (B, C, h, w) at a noise level (B,).

        Args:
            inputs: those of the conditioning, without what is carried.
            entry: the conditioning's options.
        """


class _Running(comfy.conds.CONDRegular):
    """A run in the place of what was carried."""

    def __init__(self, run: CarriedRun):
        super().__init__(None)
        self.run = run


def carry(extras: Mapping[str, Any], key: str, content: Any, sentence: str) -> dict:
    """A conditioning's options with something that it carries.

    Args:
        extras: the options.
        key: of the system.
        content, sentence: see `Carried`.
    """
    return {**extras, "model_conds": {**extras.get("model_conds", {}), key: Carried(content, sentence)}}


def carried_by(extras: Mapping[str, Any], key: str) -> Any:
    """What a conditioning carries for a system, or None."""
    found = extras.get("model_conds", {}).get(key)
    return found.content if isinstance(found, Carried) else None


def prepared(
    model,
    key: str,
    open_run: Callable[[Any, Any, torch.Tensor], CarriedRun],
    models_of: Callable[[Any], Iterable[Any]],
    joinable: Callable[[Conds, dict], Conds] | None = None,
    check: Callable[[Sequence[Any]], None] = lambda _contents: None,
):
    """Returns a clone of the MODEL that makes use of what conditionings carry, and is otherwise the same.

    Args:
        model: MODEL.
        key: of the system.
        open_run: (content, model patcher, noise (B, C, h, w)) -> a run; called when a sampling begins.
        models_of: content -> the model patchers that it needs, which ComfyUI then loads together with the MODEL and
            keeps in memory while it samples.
        joinable: (conditionings of an evaluation, a list per prompt; ComfyUI's model options) -> the conditionings,
            changed so that ComfyUI can evaluate them in one batch; called once all runs have written theirs.
        check: (contents of a sampling) -> None; raises ValueError if they cannot be used in one.
    """
    model = model.clone()
    wrappers = {
        WrappersMP.OUTER_SAMPLE: _outer_sample(key, open_run, models_of, check),
        WrappersMP.CALC_COND_BATCH: _calc_cond_batch(key, joinable),
    }
    for kind, wrapper in wrappers.items():
        model.remove_wrappers_with_key(kind, key)
        model.add_wrapper_with_key(kind, key, wrapper)
    return model


def _outer_sample(key: str, open_run: Callable, models_of: Callable, check: Callable) -> Callable:
    def wrapper(executor, noise, *args, **kwargs):
        guider = executor.class_obj
        contents = {
            id(content): content
            for entries in guider.conds.values()
            for entry in entries
            if (content := carried_by(entry, key)) is not None
        }
        if not contents:
            return executor(noise, *args, **kwargs)
        check(list(contents.values()))
        patcher, before = guider.model_patcher, dict(guider.conds)
        runs = {number: open_run(content, patcher, noise) for number, content in contents.items()}
        for name, entries in before.items():
            guider.conds[name] = [_opened(entry, key, runs, models_of) for entry in entries]
        try:
            return executor(noise, *args, **kwargs)
        finally:
            # ComfyUI keeps a guider whose sampling was interrupted, and with it what a run holds.
            guider.conds.update(before)

    return wrapper


def _opened(entry: dict, key: str, runs: Mapping[int, CarriedRun], models_of: Callable) -> dict:
    """An entry with its run. The models that it needs are the entry's, not the MODEL's: ComfyUI would load those of the
    MODEL once more for every further device, and ours run on the first alone."""
    content = carried_by(entry, key)
    if content is None:
        return entry
    models = [*entry.get("additional_models", ()), *models_of(content)]
    inputs = {**entry["model_conds"], key: _Running(runs[id(content)])}
    return {**entry, "model_conds": inputs, "additional_models": models}


def is_seen(entry: Mapping[str, Any], sigma: torch.Tensor) -> bool:
    """Whether the part of the schedule in which a conditioning of ComfyUI acts includes a noise level (B,)."""
    if not _RANGE & entry.keys():
        return True
    return entry.get("timestep_end", 0.0) <= float(sigma[0]) <= entry.get("timestep_start", math.inf)


def _calc_cond_batch(key: str, joinable: Callable[[Conds, dict], Conds] | None) -> Callable:
    def wrapper(executor, model, conds, x, timestep, options):
        written = [_written(entries, key, x, timestep) for entries in conds]
        return executor(model, joinable(written, options) if joinable else written, x, timestep, options)

    return wrapper


def _written(entries: list[dict] | None, key: str, x: torch.Tensor, sigma: torch.Tensor) -> list[dict] | None:
    """Conditionings with the inputs of this evaluation; those that are switched off at its noise level only lose their
    run."""
    if entries is None:
        return None
    found = []
    for entry in entries:
        running = entry.get("model_conds", {}).get(key)
        if isinstance(running, _Running):
            inputs = {name: one for name, one in entry["model_conds"].items() if name != key}
            seen = is_seen(entry, sigma)
            entry = {**entry, "model_conds": running.run.write(inputs, entry, x, sigma) if seen else inputs}
        found.append(entry)
    return found
