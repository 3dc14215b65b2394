"""FreeCustom: the first picture runs the reference passes; further seeds find their keys and values in the bank."""

from __future__ import annotations

from ...host.freecustom.attention import apply
from ...host.freecustom.job import MrsaSettings
from ..rigs import Rig
from . import Session

SUBJECTS = (1, 2, 3)


def sessions(rig: Rig) -> list[Session]:
    """One session per number of references, each with its own picture."""
    return [_session(rig, count) for count in SUBJECTS]


def _session(rig: Rig, count: int) -> Session:
    def begin():
        model = apply(rig.model, rig.vae, rig.clip, rig.subjects(count), MrsaSettings())
        return {"default": lambda: rig.sample(model, 1), "banked": lambda: rig.sample(model, 2)}

    return Session(count, begin, {"default": 1 + 0.55 * count, "banked": 1.10})
