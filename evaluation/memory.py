"""Measures the memory of one session on the CPU, in a process of its own, so that other sessions do not affect it.

    python tools/run.py evaluation.memory SYSTEM ARCH SUBJECTS

prints JSON: for each variant, the peak growth of resident memory over the loaded model, in MiB.
"""

from __future__ import annotations

import json

import torch

from .bench import sessions_of
from .benches import Session
from .meters import ResidentPeak
from .quiet import without_warnings
from .rigs import PLANS, Rig


def growth(session: Session) -> dict[str, float]:
    """Peak MiB of each variant above the level before the first variant."""
    samplings = session.begin()
    before = ResidentPeak().resident()
    peaks = {}
    for variant, sample in samplings.items():
        with ResidentPeak() as watch:
            sample()
        peaks[variant] = (watch.peak - before) / 2**20
    return peaks


def main(argv: list[str]) -> None:
    """Prints the growth of one session as JSON."""
    system, arch, subjects = argv
    with torch.inference_mode(), without_warnings():
        rig = Rig.build(PLANS[arch, "cpu"])
        chosen = next(s for s in sessions_of(system, rig) if s.subjects == int(subjects))
        print(json.dumps(growth(chosen)))
