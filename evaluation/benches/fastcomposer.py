"""FastComposer: only the text states differ, so it costs the same as plain sampling."""

from __future__ import annotations

import torch

from ...host.fastcomposer.delay import Delay, delayed, prepared
from ...samplers.switching import NEAREST
from ..rigs import Rig
from . import Session

SUBJECTS = (1, 2)
ALPHA = 0.7


def sessions(rig: Rig) -> list[Session]:
    """One session per number of subjects."""
    return [_session(rig, count) for count in SUBJECTS]


def _session(rig: Rig, count: int) -> Session:
    def begin():
        fused = []
        for states, extras in rig.positive:
            states = states.clone()
            states[:, 2 : 2 + count] = torch.randn(len(states), count, states.shape[-1])
            fused.append([states, dict(extras)])
        positive = delayed(rig.positive, fused, Delay(ALPHA, None, 0, NEAREST))
        model = prepared(rig.model)
        return {"default": lambda: rig.sample(model, 1, positive)}

    return Session(count, begin, {"default": 1.0})
