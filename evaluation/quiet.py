"""Measuring without the log: what is measured is done on purpose."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keeps our log silent: ablations do on purpose what it warns of, in every picture."""
    log = logging.getLogger("conceptloom")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
