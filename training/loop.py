"""One resumable training run for every model of this pack."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..encoders.files import read, whole_file
from .logs import add_row, go_back
from .signals import Stopped, stop_requests

CHECKPOINT, LOG, REPORT = "checkpoint.pt", "log.csv", "report.csv"

Losses = Callable[[Any, torch.Generator], dict[str, torch.Tensor]]
"""(batch, generator) -> named losses, whose sum is minimised. The batch comes from the run's loader, or is the step."""


class Lanes:
    """The losses of a step, in parts that are computed at the same time, each by a thread of its own on one processor.

    A model with a few million weights gains more from one thread for each half of the batch than from two threads for
    each operation, which wait for one another (measured on two idle cores: 1.94 s for the gradients of a step of
    Shapeland's UNet instead of 2.25 s). The parts must share only their parameters and constants (see `replica`).
    """

    def __init__(self, parts: Sequence[Losses]):
        self.parts = parts
        self._threads = ThreadPoolExecutor(len(parts))

    def gradients(
        self, parameters: Sequence[torch.nn.Parameter], batch: Any, seed: int, device: torch.device, half: bool
    ) -> dict[str, torch.Tensor]:
        """Sets the parameters' gradients to the mean over the parts, and returns the means of their losses."""

        def work(number: int) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor | None, ...]]:
            generator = torch.Generator().manual_seed(seed * len(self.parts) + number)
            with bfloat16_where_fast(device, half):
                losses = self.parts[number](batch, generator)
            # Not backward(), with which threads would add to the same tensors at once.
            gradients = torch.autograd.grad(sum(losses.values()), parameters, allow_unused=True)
            return {name: value.detach() for name, value in losses.items()}, gradients

        before = torch.get_num_threads()
        torch.set_num_threads(before if len(self.parts) == 1 else 1)
        try:
            results = list(self._threads.map(work, range(len(self.parts))))
        finally:
            torch.set_num_threads(before)
        for parameter, *found in zip(parameters, *(gradients for _, gradients in results), strict=True):
            present = [gradient for gradient in found if gradient is not None]
            parameter.grad = sum(present[1:], present[0]) / len(self.parts) if present else None
        return {name: sum(losses[name] for losses, _ in results) / len(results) for name in results[0][0]}


def replica(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module that shares its parameters and buffers, for another thread."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, shared)


class Run:
    """A training run in a folder: trained weights, optimizer, averaged weights, step count and log, resumed exactly
    from the folder's checkpoint.

    Batches must depend on the step alone, never on hidden state, so that an interrupted run and an uninterrupted one
    see the same data. Randomness inside a step comes from the generator that is passed to the losses, seeded by the
    run's seed and the step.

    An accelerator (of the library accelerate) decides on precision, on how many batches accumulate in a step, and on
    how processes share the work. Losses must then be computed by `module`, the prepared model, and only the first
    process writes. All of them read the checkpoint, so the folder must be visible to all.

    Args:
        folder: the run's own folder; None writes nothing.
        model: on the device that trains it, or one that the accelerator puts there.
        optimizer: optimizer of the parameters that require gradients, each group with its learning rate.
        steps: number of steps to train to.
        seed: seed of everything random.
        schedule: step -> factor of every group's learning rate; constant by default.
        average: how much of the averaged weights a step keeps, less at first; 0 keeps none.
        accelerator: see above; None trains on the model's device in this process alone.
        kind: options, by name, that a checkpoint must agree with to be resumed.

    Attributes:
        module: computes the losses.
        step: number of steps done.

    Raises:
        ValueError: the folder's checkpoint is of another kind of run or another model, or cannot be read.
    """

    def __init__(
        self,
        folder: Path | None,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        steps: int,
        seed: int = 0,
        schedule: Callable[[int], float] = lambda step: 1.0,
        average: float = 0.0,
        accelerator=None,
        kind: Mapping[str, str | int | float | bool | None] | None = None,
    ):
        self.folder, self.model, self.steps, self.seed, self.schedule = folder, model, steps, seed, schedule
        self.module, self.optimizer, self.accelerator = model, optimizer, accelerator
        if accelerator:
            self.module, self.optimizer = accelerator.prepare(model, optimizer)
        self.writes = folder is not None and (accelerator is None or accelerator.is_main_process)
        self.kind, self.average, self.step = dict(kind or {}), average, 0
        # Kept here, because a checkpoint restores the scheduled rates of its last step.
        self._learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._device = next(iter(self._trained.values())).device
        self._accumulated = accelerator.gradient_accumulation_steps if accelerator else 1
        self.averaged = {name: p.detach().clone() for name, p in self._trained.items()} if average else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            if self._checkpoint.exists():
                self._load()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def _state(self) -> dict[str, torch.Tensor]:
        """What steps may change: trained parameters and buffers."""
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}

    def save(self) -> None:
        """Writes the checkpoint, so that an interruption at any moment leaves a whole one."""
        if not self.writes:
            return
        state = {
            "model": self._state(),
            "optimizer": self.optimizer.state_dict(),
            "averaged": self.averaged,
            "step": self.step,
            "kind": self.kind,
        }
        if self._scaler:
            state["scaler"] = self._scaler.state_dict()
        with whole_file(self._checkpoint) as part:
            torch.save(state, part)

    def _load(self) -> None:
        saved = read(self._checkpoint, "--out").value
        for option, value in self.kind.items():
            if (begun := saved["kind"].get(option)) != value:
                raise ValueError(
                    f"--out: expected a new folder, or one of a run with {option} {value}, got {self.folder}, begun "
                    f"with {begun}"
                )
        missing, unexpected = self.model.load_state_dict(saved["model"], strict=False)
        kept = self._state()
        if other := [*unexpected, *(name for name in missing if name in kept)]:
            raise ValueError(
                f"--out: expected a new folder, or one of a run that trains the same, got {self.folder}, which differs "
                f"in {other[0]}"
            )
        for name, tensor in (self.averaged or {}).items():
            # A run that started without averages starts them here.
            tensor.copy_((saved["averaged"] or saved["model"])[name])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self._scaler and "scaler" in saved:
            self._scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        if self.writes:
            for name in (LOG, REPORT):
                go_back(self.folder / name, self.step)

    @property
    def _scaler(self):
        """The accelerator's gradient scaler, which keeps fp16 gradients in range."""
        return self.accelerator and self.accelerator.scaler

    def best_state(self) -> dict[str, torch.Tensor]:
        """The model's whole state dict, with averaged weights if the run keeps them."""
        return {**self.model.state_dict(), **(self.averaged or {})}

    def train(
        self,
        losses: Losses | Lanes,
        log_every: int,
        loader: Callable[[int], Iterable] | None = None,
        report: Callable[[int], dict[str, float]] | None = None,
        report_every: int = 0,
        after: Callable[[int, dict[str, torch.Tensor]], None] | None = None,
        half: bool = True,
        save_seconds: float = 180.0,
        seconds: float = float("inf"),
    ) -> None:
        """Trains to the last step, or until `seconds` have passed.

        Args:
            losses: losses of a batch.
            log_every: steps whose means go to `log.csv` and the screen.
            loader: first step -> the batches of all steps from there on, as many for each as accumulate.
            report: step -> values for `report.csv`; called by the process that writes, with the averaged weights in the
                model and without gradients.
            report_every: steps between reports; 0 for none.
            after: called when a step is done and its memory is freed, with the step and its losses.
            half: compute in bfloat16 where the device is fast at it; an accelerator decides this itself.
            save_seconds: seconds between checkpoints.
            seconds: seconds after which no step starts.

        Raises:
            Stopped: the user has interrupted the program (Ctrl-C or a termination signal); the step was finished.
        """
        sums: dict[str, torch.Tensor] = {}
        counted, stopped = 0, False
        began = saved_at = time.monotonic()
        end = began + seconds
        steps = (number // self._accumulated for number in itertools.count(self.step * self._accumulated))
        with stop_requests() as asked:
            batches = iter(loader(self.step) if loader else steps)
            while self.step < self.steps and not stopped and time.monotonic() < end:
                found, norm = self._learn(losses, batches, half)
                for name, value in {**found, "gradient_norm": norm}.items():
                    sums[name] = sums.get(name, 0.0) + value.float()
                counted += 1
                if after:
                    after(self.step - 1, found)
                if self.step % log_every == 0:
                    self._log_means(sums, counted, time.monotonic() - began)
                    sums, counted, began = {}, 0, time.monotonic()
                if report and report_every and self.step % report_every == 0 and self.writes:
                    paused = time.monotonic()
                    self._report(report)
                    began += time.monotonic() - paused
                if time.monotonic() - saved_at > save_seconds:
                    self.save()
                    saved_at = time.monotonic()
                stopped = self._stops(bool(asked))
        self.save()
        if stopped and self.step < self.steps:
            raise Stopped(f"stopped after step {self.step} of {self.steps}; the same command continues")

    def _learn(
        self, losses: Losses | Lanes, batches: Iterator, half: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One step; returns the means of its losses, detached, and the norm of its gradient."""
        for group, rate in zip(self.optimizer.param_groups, self._learning_rates, strict=True):
            group["lr"] = rate * self.schedule(self.step)
        found = self._gradients(losses, batches, half)
        clip = self.accelerator.clip_grad_norm_ if self.accelerator else torch.nn.utils.clip_grad_norm_
        norm = clip(self._trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.averaged is not None:
            self._update_average()
        return found, norm

    def _gradients(self, losses: Losses | Lanes, batches: Iterator, half: bool) -> dict[str, torch.Tensor]:
        """Computes the gradients of a step; returns its losses."""
        seed = self.seed * 1_000_003 + self.step
        if isinstance(losses, Lanes):
            return losses.gradients(list(self._trained.values()), next(batches), seed, self._device, half)
        means: dict[str, torch.Tensor] = {}
        for part in range(self._accumulated):
            generator = torch.Generator().manual_seed(seed * self._accumulated + part)
            if self.accelerator:
                with self.accelerator.accumulate(self.module):
                    found = losses(next(batches), generator)
                    self.accelerator.backward(sum(found.values()))
            else:
                with bfloat16_where_fast(self._device, half):
                    found = losses(next(batches), generator)
                sum(found.values()).backward()
            for name, value in found.items():
                means[name] = means.get(name, 0.0) + value.detach() / self._accumulated
        return means

    def _update_average(self) -> None:
        # A shorter average at first, so that it forgets the initial weights.
        keep = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.values()), list(self._trained.values()), 1 - keep)

    def _stops(self, asked: bool) -> bool:
        if self.accelerator is None or self.accelerator.num_processes == 1:
            return asked
        # Signals reach processes at different times, but all have to end at the same step.
        if asked:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _report(self, report: Callable[[int], dict[str, float]]) -> None:
        with self._averaged_in_place(), torch.no_grad():
            row = report(self.step)
        if row:
            self._log(REPORT, row)

    @contextmanager
    def _averaged_in_place(self) -> Iterator[None]:
        """Puts the averaged weights into the model, and restores the current ones afterwards."""
        current = {name: p.detach().clone() for name, p in self._trained.items()} if self.averaged else {}
        self._put(self.averaged or {})
        try:
            yield
        finally:
            self._put(current)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            self._trained[name].copy_(tensor)

    def _log_means(self, sums: Mapping[str, torch.Tensor], counted: int, seconds: float) -> None:
        means = torch.stack(list(sums.values())) / counted
        if self.accelerator:
            means = self.accelerator.reduce(means, "mean")
        *losses, norm = means.tolist()
        row = {"loss": sum(losses), **dict(zip(sums, (*losses, norm), strict=True))}
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self._log(LOG, {**row, "learning_rate": learning_rate, "seconds": seconds / counted})

    def _log(self, name: str, row: Mapping[str, float]) -> None:
        if not self.writes:
            return
        row = {key: float(f"{value:.5g}") for key, value in row.items()}
        add_row(self.folder / name, self.step, row)
        print(f"step {self.step}/{self.steps}", *(f"{key}={value}" for key, value in row.items()), flush=True)


def bfloat16_where_fast(device: str | torch.device, enabled: bool = True) -> torch.autocast:
    """Autocast to bfloat16, except where it is emulated: on a CPU without instructions for it a matrix product takes
    over a hundred times as long as in fp32, and NVIDIA cards before Ampere have none either."""
    kind = torch.device(device).type
    if kind == "cpu":
        enabled = enabled and _cpu_has_bfloat16()
    elif kind == "cuda":
        enabled = enabled and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=enabled)


def _cpu_has_bfloat16() -> bool:
    # torch has these checks under names that differ between versions.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in checks)
