"""What the command lines share that train on pictures, in one process or many."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from .draws import Shares, shares_of
from .loop import Run
from .optimizers import warmup
from .signals import Stopped


def accelerator_of(options: Namespace):
    """accelerate's `Accelerator` for the options of `options.add_run`.

    Raises:
        ValueError: the device cannot compute in the requested precision.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(f"--precision: expected no or bf16 on a {accelerator.device.type}, got fp16")
    return accelerator


def spread(pictures: int, shown: int) -> range:
    """At most `shown` of some pictures, from all over their folder."""
    return range(0, pictures, max(1, pictures // shown))[:shown]


def train_on_pictures(
    options: Namespace,
    accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    pictures: int,
    batches: Callable[[Shares], Iterable[dict[str, torch.Tensor]]],
    kind: Mapping[str, str | int | float | bool | None],
    sheet: Callable[[Path], None] | None = None,
) -> Run | None:
    """Trains a model in the folder --out.

    Args:
        options: of `options.add_base` and `options.add_run`.
        accelerator: of `accelerator_of`.
        model: called with a batch, returns its named losses.
        optimizer: of the parameters that are trained.
        pictures: how many there are.
        batches: which pictures -> the batches of them, on the accelerator's device.
        kind: options, by name, that a checkpoint must agree with, besides those that all such runs have.
        sheet: draws samples into a file, every `options.sheet_every` steps.

    Returns:
        The run, in the process that writes its result; None in the others, or when the user has stopped it.

    Raises:
        ValueError: the folder's checkpoint is of another kind of run.
    """
    processes = accelerator.num_processes, accelerator.process_index
    pictures_a_step = options.batch_size * accelerator.num_processes * options.accumulate
    kind = {"base": options.base, **kind, "pictures": pictures, "seed": options.seed}
    kind["pictures a step"] = pictures_a_step
    schedule = warmup(options.warmup)
    run = Run(options.out, model, optimizer, options.steps, options.seed, schedule, options.average, accelerator, kind)

    def report(step: int) -> dict[str, float]:
        with accelerator.autocast():
            sheet(options.out / f"samples_{step:07d}.png")
        return {}

    try:
        run.train(
            lambda batch, _generator: run.module(batch),
            options.log_every,
            lambda step: batches(shares_of(pictures, options, pictures_a_step, step, processes)),
            report if sheet else None,
            options.sheet_every if sheet else 0,
            save_seconds=60 * options.save_minutes,
        )
    except Stopped as stopped:
        accelerator.print(stopped)
        return None
    return run if accelerator.is_main_process else None
