"""Checks that the training command lines share."""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from collections.abc import Mapping


def check_least(options: Namespace, least: Mapping[str, float]) -> None:
    """Raises ValueError for the first option that is given and is NaN or less than its smallest value."""
    for option, smallest in least.items():
        given = getattr(options, option)
        if given is not None and not given >= smallest:
            raise ValueError(f"--{option.replace('_', '-')}: expected at least {smallest}, got {given}")


def check_average(average: float) -> None:
    """Raises ValueError for an --average that is no share of weights to keep per step."""
    if not 0 <= average < 1:
        raise ValueError(f"--average: expected a share from 0 up to but not 1, got {average}")


def check_workers(workers: int) -> None:
    """Raises ValueError for --workers on a system that cannot fork processes."""
    if workers and "fork" not in multiprocessing.get_all_start_methods():
        # A spawned process could not import this pack, which has no importable name of its own.
        raise ValueError(f"--workers: expected 0 on this system, which cannot fork processes, got {workers}")
