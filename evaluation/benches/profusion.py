"""Fusion sampling: the evaluations of two stages, for subjects that are conditionings."""

from __future__ import annotations

import comfy.samplers

from ...host.model.window import Window
from ...host.profusion.guider import FusionGuider, Guidance
from ...host.profusion.sampler import fusion_sampler
from ..rigs import SAMPLER, Rig
from . import Session

SUBJECTS = (1, 2)
RANGE = Window(0.8, 1.0)


def sessions(rig: Rig) -> list[Session]:
    """One session per number of subjects."""
    return [_session(rig, count) for count in SUBJECTS]


def _session(rig: Rig, count: int) -> Session:
    def begin():
        subjects = [rig.clip.encode_from_tokens_scheduled("") for _ in range(count)]
        base = comfy.samplers.sampler_object(SAMPLER)

        def fused(repeats: int = 1, window: Window | None = None, reuse: bool = False):
            guider = FusionGuider(rig.model, rig.positive, rig.negative, subjects, Guidance(reuse=reuse))
            sampler = fusion_sampler(base, repeats, 1.0, window or Window())
            return lambda: rig.sample_with(guider, sampler, 1)

        return {
            "default": fused(),
            "reuse": fused(reuse=True),
            "range": fused(window=RANGE),
            "composable": fused(repeats=0),
        }

    # Two conditionings in the fusion stage and three in refinement, where plain guidance has two, for one subject.
    budgets = {"default": 2.5, "range": 1.6} if count == 1 else {"default": 3.5}
    return Session(count, begin, budgets)
