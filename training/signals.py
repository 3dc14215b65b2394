"""Stops a run when the user asks for it: at the end of the current step, with the run saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The user has stopped a run, which is saved and can be resumed."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives the signal by which the user asks the program to stop; asking twice stops it at once.

    It receives none outside the main thread, where Python allows no handlers, and no signals that the program ignores.
    """
    asked: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def note(number, _frame):
        asked.append(number)
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_stop_requests(_worker: int) -> None:
    """Makes a worker process ignore stop signals, which a terminal or a system that shuts down sends to every process:
    the worker outlives the step in which the user asks to stop, and ends with the run."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
