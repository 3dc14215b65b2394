"""Measuring without warnings in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silences the pack's warnings: ablations do deliberately what these warn about, in every picture."""
    log = logging.getLogger("conceptloom")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
