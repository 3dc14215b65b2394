"""One module per system, named like it, with `sessions(rig) -> list[Session]`, and `facts(rig) -> list[str]` where
sentences say what is no sampling's cost.

A new system is a new file here; `bench.py` finds it by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..rigs import Rig


@dataclass(frozen=True)
class Session:
    """Samplings of one number of subjects that follow each other, since a later one may profit from an earlier one.

    Attributes:
        subjects: how many.
        begin: prepares, unmeasured, and gives the samplings to measure, by variant and in this order.
        budgets: per variant the ratio to plain sampling that is aimed at.
    """

    subjects: int
    begin: Callable[[], Mapping[str, Callable[[], object]]]
    budgets: Mapping[str, float] = field(default_factory=dict)


def plain_session(rig: Rig) -> Session:
    """The untouched model: what all others are compared with."""
    return Session(0, lambda: {"plain": lambda: rig.sample(rig.model, 1)})
