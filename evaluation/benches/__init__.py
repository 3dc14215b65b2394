"""One module per system, with the system's name and `sessions(rig) -> list[Session]`; optionally with `facts(rig) ->
list[str]`, sentences about costs outside sampling.

A new system is a new file here; `bench.py` finds it by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..rigs import Rig


@dataclass(frozen=True)
class Session:
    """Samplings with one number of subjects, run in order, since a later one may profit from an earlier one.

    Attributes:
        subjects: number of subjects.
        begin: prepares, unmeasured, and returns the samplings to measure, by variant and in this order.
        budgets: per variant, the ratio to plain sampling that is aimed at.
    """

    subjects: int
    begin: Callable[[], Mapping[str, Callable[[], object]]]
    budgets: Mapping[str, float] = field(default_factory=dict)


def plain_session(rig: Rig) -> Session:
    """Sampling with the untouched model, which all others are compared with."""
    return Session(0, lambda: {"plain": lambda: rig.sample(rig.model, 1)})
