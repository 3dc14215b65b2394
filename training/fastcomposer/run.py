"""A training run in a folder, on one process or many: resumed exactly, saved whole, stopped at any time."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...encoders.files import read, whole_file
from ..data.dataset import EpochBatches, SubjectPictures
from ..logs import add_row, go_back
from .batches import Shares, collate, draw
from .model import Composer

CHECKPOINT, LOG = "checkpoint.pt", "log.csv"


@dataclass(frozen=True)
class Settings:
    """How a run goes.

    Attributes:
        steps: to train to.
        batch: pictures of a process at a time.
        rate: of learning, constant after `warmup` steps.
        fuser_rate: that of the fuser and the vision tower, which may have learnt before; None for the same.
        average: how much of the averaged weights a step keeps; 0 keeps none.
        seed: of all that is drawn.
        workers: processes that read pictures; 0 reads them between steps.
        save_minutes: between checkpoints.
        log_every, sheet_every: steps; 0 for no sheets.
    """

    steps: int
    batch: int
    rate: float
    fuser_rate: float | None = None
    warmup: int = 0
    average: float = 0.0
    seed: int = 0
    workers: int = 0
    save_minutes: float = 10.0
    log_every: int = 100
    sheet_every: int = 1000

    def __post_init__(self):
        for name, least in (("steps", 0), ("batch", 1), ("warmup", 0), ("workers", 0), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}")
        # The optimizer looks at its default rate alone, not at those of its groups.
        for name in ("rate", "fuser_rate"):
            rate = getattr(self, name)
            if rate is not None and not rate >= 0:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 0, got {rate}")
        if not 0 <= self.average < 1:
            raise ValueError(f"--average: expected a share from 0 up to but not 1, got {self.average}")
        if self.workers and "fork" not in multiprocessing.get_all_start_methods():
            # A spawned process could not import this pack, which has no importable name of its own.
            raise ValueError(f"--workers: expected 0 on this system, which cannot fork processes, got {self.workers}")


class Run:
    """A run of `accelerator` in a folder, which continues where the folder's checkpoint stands.

    A step sees `batch` pictures times the accelerator's processes and accumulated batches. Which these are and what is
    drawn for them depends on the seed and the step alone.

    Args:
        kind: what a checkpoint must agree in to be continued, by the name of its option.
        sheet: writes a sheet of samples at a path; None for no sheets.

    Raises:
        ValueError: the folder's checkpoint is of another kind of run.
    """

    def __init__(
        self,
        folder: Path,
        accelerator,
        composer: Composer,
        data: SubjectPictures,
        settings: Settings,
        kind: dict[str, str | int],
        sheet: Callable[[Path], None] | None = None,
    ):
        self.folder, self.accelerator, self.data, self.settings = Path(folder), accelerator, data, settings
        self.composer, self.sheet, self.step = composer, sheet, 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trainables = composer.trainables
        unet, rest = (
            [p for name, p in self.trainables.items() if name.startswith("unet.") == inside] for inside in (True, False)
        )
        self.rates = settings.rate, settings.rate if settings.fuser_rate is None else settings.fuser_rate
        groups = [{"params": parameters, "lr": rate} for parameters, rate in zip((unet, rest), self.rates, strict=True)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
        self.model, self.optimizer = accelerator.prepare(composer, optimizer)
        self.averaged = None
        if settings.average:
            self.averaged = {name: p.detach().clone() for name, p in self.trainables.items()}
        self.accumulate = accelerator.gradient_accumulation_steps
        self.pictures_a_step = settings.batch * accelerator.num_processes * self.accumulate
        self.kind = {**kind, "seed": settings.seed, "pictures a step": self.pictures_a_step}
        if self._checkpoint.exists():
            self._load()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The averaged weights of what is trained where the run keeps them, else the current ones."""
        return self.averaged if self.averaged is not None else self.trainables

    def train(self) -> bool:
        """Trains to the last step and returns true, or to the end of the step in which the user interrupts (Ctrl-C or
        a termination signal) and returns false; either way the run is saved."""
        s, accelerator = self.settings, self.accelerator
        shares = Shares(
            EpochBatches(len(self.data), self.pictures_a_step, s.steps, self.step, s.seed),
            s.batch,
            self.accumulate,
            accelerator.num_processes,
            accelerator.process_index,
        )
        loader = torch.utils.data.DataLoader(
            self.data,
            batch_sampler=shares,
            collate_fn=partial(collate, vocabularies=self.composer.base.vocabularies),
            num_workers=s.workers,
            multiprocessing_context="fork" if s.workers else None,
            worker_init_fn=_leave_signals_to_the_run,
        )
        sums, counted, stopped = {}, 0, False
        began = saved_at = time.monotonic()
        with _asked_to_stop() as asked:
            batches = iter(loader)
            while self.step < s.steps and not stopped:
                for name, value in self._learn(batches, shares).items():
                    sums[name] = sums.get(name, 0.0) + value
                self.step, counted = self.step + 1, counted + 1
                if self.step % s.log_every == 0:
                    self._log(sums, counted, (time.monotonic() - began) / counted)
                    sums, counted, began = {}, 0, time.monotonic()
                if self.sheet and s.sheet_every and self.step % s.sheet_every == 0:
                    self._draw()
                if time.monotonic() - saved_at > 60 * s.save_minutes:
                    self.save()
                    saved_at = time.monotonic()
                if asked:
                    accelerator.set_trigger()
                # Signals reach processes at different times, but all have to end with the same step.
                stopped = accelerator.check_trigger()
        self.save()
        return self.step >= s.steps

    def save(self) -> None:
        """Writes the checkpoint, so that an interruption at any moment leaves a whole one."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "kind": self.kind,
            "step": self.step,
            "trainables": {name: p.detach() for name, p in self.trainables.items()},
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        with whole_file(self._checkpoint) as part:
            torch.save(state, part)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / CHECKPOINT

    def _load(self) -> None:
        saved = read(self._checkpoint, "--out").value
        other = [name for name in self.kind if saved["kind"].get(name) != self.kind[name]]
        if other:
            name = other[0]
            raise ValueError(
                f"--out: expected a new folder, or one of a run with {name} {self.kind[name]}, got {self.folder}, "
                f"begun with {saved['kind'].get(name)}"
            )
        with torch.no_grad():
            for name, p in self.trainables.items():
                p.copy_(saved["trainables"][name])
            if self.averaged is not None:
                for name, p in (saved["averaged"] or saved["trainables"]).items():
                    self.averaged[name].copy_(p)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        if self.accelerator.is_main_process:
            go_back(self.folder / LOG, self.step)

    def _learn(self, batches: Iterator[dict[str, torch.Tensor]], shares: Shares) -> dict[str, torch.Tensor]:
        """One step; returns the means of the losses, and the gradient's norm."""
        s, accelerator, base = self.settings, self.accelerator, self.composer.base
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, (self.step + 1) / max(1, s.warmup))
        found, norm = {}, None
        for i in range(self.accumulate):
            first = self.step * self.pictures_a_step + shares.offset(i)
            draws = draw(s.seed, range(first, first + s.batch), base.latent_shape, base.times)
            batch = {name: tensor.to(accelerator.device) for name, tensor in next(batches).items()}
            with accelerator.accumulate(self.model):
                losses = self.model(batch, type(draws)(*(d.to(accelerator.device) for d in draws)))
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trainables.values(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, loss in losses.items():
                found[name] = found.get(name, 0.0) + loss.detach() / self.accumulate
        if self.averaged is not None:
            # A short memory at first: the average must forget the first weights.
            keep = min(s.average, (1 + self.step) / (10 + self.step))
            names = list(self.averaged)
            with torch.no_grad():
                torch._foreach_lerp_([self.averaged[n] for n in names], [self.trainables[n] for n in names], 1 - keep)
        return {**found, "gradient_norm": norm}

    def _draw(self) -> None:
        """A sheet of samples with the averaged weights, which are put in place for it."""
        if not self.accelerator.is_main_process:
            return
        current = {name: p.detach().clone() for name, p in self.trainables.items()} if self.averaged else {}
        self._put(self.averaged or {})
        with self.accelerator.autocast():
            self.sheet(self.folder / f"samples_{self.step:07d}.png")
        self._put(current)

    @torch.no_grad()
    def _put(self, weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            self.trainables[name].copy_(tensor)

    def _log(self, sums: dict[str, torch.Tensor], counted: int, seconds: float) -> None:
        means = self.accelerator.reduce(torch.stack(list(sums.values())) / counted, "mean").tolist()
        if not self.accelerator.is_main_process:
            return
        row = {name: round(mean, 5) for name, mean in zip(sums, means, strict=True)}
        row |= {"rate": self.optimizer.param_groups[0]["lr"], "seconds": round(seconds, 3)}
        add_row(self.folder / LOG, self.step, row)
        print(f"step {self.step}/{self.settings.steps}", *(f"{k}={v}" for k, v in row.items()), flush=True)


def _leave_signals_to_the_run(_worker: int) -> None:
    """A terminal or a system that shuts down tells every process: those that read pictures must last to the end of the
    step, and end with the run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _asked_to_stop() -> Iterator[list[int]]:
    """A list that holds something once the user has asked the program to stop; asking twice stops it at once."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

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
