"""Options of the training command lines, and checks that they share."""

from __future__ import annotations

import multiprocessing
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path


def check_least(options: Namespace, least: Mapping[str, float]) -> None:
    """Raises ValueError for the first option that is given and is NaN or less than its smallest value."""
    for option, smallest in least.items():
        given = getattr(options, option)
        if given is not None and not given >= smallest:
            raise ValueError(f"--{option.replace('_', '-')}: expected at least {smallest}, got {given}")


def check_run(options: Namespace, least: Mapping[str, float]) -> None:
    """Checks the options of `add_run`, and others against their smallest values.

    Raises:
        ValueError: one cannot be used; see `check_least`.
    """
    check_least(options, least)
    if not 0 <= options.average < 1:
        raise ValueError(f"--average: expected a share from 0 up to but not 1, got {options.average}")
    if options.workers and "fork" not in multiprocessing.get_all_start_methods():
        # A spawned process could not import this pack, which has no importable name of its own.
        raise ValueError(f"--workers: expected 0 on this system, which cannot fork processes, got {options.workers}")


RUN_LEAST = {"steps": 0, "batch_size": 1, "accumulate": 1, "warmup": 0, "workers": 0, "log_every": 1}
UNET_LEAST = {**RUN_LEAST, "sheet_every": 0}
"""The least values of the options of `add_run` and `add_unet`, for `check_run`."""


def add_base(parser: ArgumentParser, data: str) -> None:
    """Adds the options that name the model, the pictures (which `data` describes) and the run's folder."""
    add = parser.add_argument
    add("--base", required=True, metavar="shapeland|FOLDER", help="the model to train for")
    add("--vision", type=Path, metavar="FOLDER", help="the vision tower, with a folder as --base")
    add("--data", type=Path, required=True, metavar="FOLDER", help=data)
    add("--out", type=Path, required=True, metavar="FOLDER", help="the run's own folder")


def add_run(parser: ArgumentParser, export: str, steps: int, batch_size: int) -> None:
    """Adds the options of a run; `export` is the name of the file that it writes at its end."""
    add = parser.add_argument
    add("--steps", type=int, default=steps, help="train to this step (default: %(default)s)")
    add("--batch-size", type=int, default=batch_size, help="pictures of a process at a time (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="batches of a process in a step (default: %(default)s)")
    add("--precision", choices=("no", "fp16", "bf16"), default="no", help="mixed precision (default: %(default)s)")
    add("--warmup", type=int, default=0, help="steps in which learning rates rise (default: %(default)s)")
    add("--resolution", type=int, help="of pictures, in pixels (default: the base's own)")
    add("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare pictures (default: %(default)s)")
    add("--save-minutes", type=float, default=10.0, help="between checkpoints (default: %(default)s)")
    add("--log-every", type=int, default=100, help="steps (default: %(default)s)")
    add("--export", type=Path, metavar="FILE", help=f"what to write at the end (default: OUT/{export})")


def add_unet(parser: ArgumentParser) -> None:
    """Adds the options of a run that trains through a UNet and draws with it."""
    add = parser.add_argument
    add("--checkpointing", action="store_true", help="compute the UNet twice to save most of its memory")
    add("--sheet-every", type=int, default=1000, help="steps between sample sheets; 0 for none (default: %(default)s)")


def export_file(options: Namespace, name: str) -> Path:
    """What a run writes at its end.

    Raises:
        ValueError: it is not named as safetensors.
    """
    file = options.export or options.out / name
    if file.suffix != ".safetensors":
        raise ValueError(f"--export: expected a name that ends in .safetensors, got {file.name}")
    return file
