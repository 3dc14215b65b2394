"""Stopping a run: at the end of the step in which the user asks for it, with the run saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """The user has stopped a run, which is saved and can be continued."""


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that receives the signal by which the user asks the program to stop; asking twice stops it at once.

    Outside the main thread, where Python allows no handlers, and of signals that the program ignores it receives none.
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
    """Starts a worker process that outlasts the step in which the user asks to stop, and ends with the run: a terminal
    and a system that shuts down tell every process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
