"""Checks that the training command lines share."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping


def check_least(options: Namespace, least: Mapping[str, float]) -> None:
    """Raises ValueError for the first option that is given and is NaN or less than its smallest value."""
    for option, smallest in least.items():
        given = getattr(options, option)
        if given is not None and not given >= smallest:
            raise ValueError(f"--{option.replace('_', '-')}: expected at least {smallest}, got {given}")
