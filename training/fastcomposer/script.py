"""Trains FastComposer on diffusers' models, in one process or many."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

import torch

from ..base import open_base
from ..data.dataset import SubjectPictures
from ..draws import Shares, drawn_batches
from ..on_pictures import accelerator_of, train_on_pictures
from ..options import UNET_LEAST, check_run
from .batches import check_subjects, collate
from .export import export, start_from
from .model import LORA, FastComposer
from .sheet import open_sheet

_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
_LEAST = {**UNET_LEAST, "learning_rate": 0, "fuser_learning_rate": 0}


def train(options: Namespace, file: Path) -> None:
    """Runs the training of `options` (see the package) and writes its result to `file`.

    Raises:
        ValueError, FileNotFoundError: an option cannot be used; the message says which and why.
    """
    check_run(options, _LEAST)
    base = open_base(options.base, options.vision, options.resolution)
    data = SubjectPictures(
        options.data,
        resolution=base.resolution,
        object_resolution=base.vision.config.image_size,
        object_types=options.object_types,
        uncondition=options.uncondition,
        object_appear=options.object_appear,
        augment=not options.no_augmentation,
        seed=options.seed,
    )
    check_subjects(data)
    model = FastComposer(
        base,
        options.train,
        options.rank,
        options.vision_layers,
        options.localization,
        options.mask_loss_probability,
        options.seed,
    )
    if options.fuser:
        start_from(model.fuser, options.fuser)
    accelerator = accelerator_of(options)
    if accelerator.mixed_precision in _HALF:
        model.keep_frozen_in(_HALF[accelerator.mixed_precision])
    if options.checkpointing:
        model.unet.enable_gradient_checkpointing()
    kind = {"train": options.train, "vision layers": options.vision_layers}
    if options.train == LORA:
        kind["rank"] = options.rank

    def batches(shares: Shares):
        read = partial(collate, vocabularies=base.vocabularies)
        return drawn_batches(data, base, shares, options.workers, read, accelerator.device)

    sheet = open_sheet(options.data, model, options.object_types) if options.sheet_every else None
    optimizer = _optimizer(model, options)
    run = train_on_pictures(options, accelerator, model, optimizer, len(data), batches, kind, sheet)
    if run:
        state = run.best_state()
        dtype = _HALF.get(options.export_precision, torch.float32)
        export({name: state[name] for name in model.trainables}, file, dtype)
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def _optimizer(model: FastComposer, options: Namespace) -> torch.optim.Optimizer:
    """The paper's AdamW; fuser and vision tower, which may be trained already, have a learning rate of their own."""
    unet, rest = (
        [p for name, p in model.trainables.items() if name.startswith("unet.") == inside] for inside in (True, False)
    )
    fuser_learning_rate = options.learning_rate if options.fuser_learning_rate is None else options.fuser_learning_rate
    groups = [{"params": unet, "lr": options.learning_rate}, {"params": rest, "lr": fuser_learning_rate}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
