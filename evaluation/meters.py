"""What a sampling costs: seconds, memory and evaluations of the UNet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of a call, including the work it queues on the device."""
    _finish(device)
    begin = time.perf_counter()
    call()
    _finish(device)
    return time.perf_counter() - begin


def gpu_seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds in which a CUDA GPU computed for a call, without those in which it waited for the CPU."""
    _finish(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        _finish(device)
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class ResidentPeak:
    """Watches this process's resident memory from another thread, a thousand times per second.

    Used as a context manager; `peak` is the highest value seen, in bytes. Short peaks may be missed, but an allocator
    returns little memory at once, so what is missed is small.
    """

    def __init__(self):
        import psutil

        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak = 0

    def resident(self) -> int:
        """Resident memory now, in bytes."""
        return self._process.memory_info().rss

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, self.resident())

    def __enter__(self) -> ResidentPeak:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self.resident())


@dataclass
class Call:
    """One call of the model: its rows, its floating-point operations, and whether it finished."""

    rows: int
    flops: int
    finished: bool = False


@dataclass
class Calls:
    """The calls of one sampling."""

    calls: list[Call] = field(default_factory=list)

    def flops_per_row(self) -> float:
        """Operations per row, over all finished calls."""
        whole = [call for call in self.calls if call.finished]
        return sum(call.flops for call in whole) / sum(call.rows for call in whole)

    def evaluations(self, flops_per_row: float) -> float:
        """Rows of the finished calls, plus the operations of calls that ended early, in units of `flops_per_row`."""
        return sum(call.rows if call.finished else call.flops / flops_per_row for call in self.calls)


@contextmanager
def counted_calls(diffusion_model: torch.nn.Module) -> Iterator[Calls]:
    """Counts calls of the model while the context is open. Counting takes time, so do not measure time inside."""
    counted = Calls()
    with FlopCounterMode(display=False) as counter:

        def close_last() -> None:
            # What was counted since the last call began belongs to it, because nothing between calls multiplies
            # matrices.
            if counted.calls:
                counted.calls[-1].flops += counter.get_total_flops()

        def begin(_, args) -> None:
            close_last()
            counted.calls.append(Call(len(args[0]), -counter.get_total_flops()))

        def end(*_) -> None:
            counted.calls[-1].finished = True

        hooks = [diffusion_model.register_forward_pre_hook(begin), diffusion_model.register_forward_hook(end)]
        try:
            yield counted
        finally:
            for hook in hooks:
                hook.remove()
            close_last()
