"""Trains a Composer adapter on diffusers' models, in one process or many."""

from __future__ import annotations

import hashlib
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ...encoders.composer_adapter import ComposerAdapter, load, save
from ..base import open_base
from ..draws import Shares
from ..on_pictures import accelerator_of, spread, train_on_pictures
from ..options import UNET_LEAST, check_run
from ..sampling import sample
from ..shapeland.common import save_sheet
from .model import ComposerTraining, config_of
from .pictures import NAMES, Composed, caption_of, collate, read_batches

SHOWN, SHEET_STEPS, GUIDANCE = 8, 25, 3.0
_LEAST = {**UNET_LEAST, "learning_rate": 0, "local_width": 1, "body_share": 1}
_PREFIX = "adapter."
_SCALED_TO = 128


def train(options: Namespace, file: Path) -> None:
    """Runs the training of `options` (see the package) and writes its result to `file`.

    Raises:
        ValueError, FileNotFoundError: an option cannot be used; the message says which and why.
    """
    check_run(options, _LEAST)
    base = open_base(options.base, options.vision, options.resolution)
    if not 0 <= options.from_noise <= 1:
        raise ValueError(f"--from-noise: expected a share from 0 to 1, got {options.from_noise:g}")
    if options.only not in ("", *NAMES):
        raise ValueError(f"--only: expected one of {', '.join(NAMES)}, got {options.only}")
    if options.only and not options.start:
        raise ValueError("--only: expected an adapter whose other weights stay, got none; name it with --start")
    if options.from_noise and base.predicts_noise:
        raise ValueError(
            f"--from-noise: expected 0 for a base that predicts epsilon, which is all that it sees then, got "
            f"{options.from_noise:g}"
        )
    data = Composed(options.data, base.resolution, options.seed, options.only)
    accelerator = accelerator_of(options)
    config = config_of(base, Path(options.base).name, options.mode, options.local_width, options.body_share)
    model = ComposerTraining(base, config, options.seed)
    if options.start:
        start_from(model.adapter, options.start)
    if options.only:
        keep_all_but(model.adapter, options.only)
    if options.checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
    kind = {"mode": options.mode, "local width": options.local_width, "body share": options.body_share}
    kind |= {"timesteps": options.timesteps, "from noise": options.from_noise, "only": options.only}
    trained = [weight for weight in model.adapter.parameters() if weight.requires_grad]
    if not trained:
        raise ValueError(f"--only: expected a representation that this adapter has weights for, got {options.only}")
    if options.only:
        # A checkpoint holds what is trained; the rest is of that file whenever the run continues.
        kind["start"] = f"{options.start.name} ({hashlib.sha256(options.start.read_bytes()).hexdigest()[:8]})"
    optimizer = torch.optim.AdamW(trained, options.learning_rate, weight_decay=1e-2)

    def batches(shares: Shares):
        cubic, device = options.timesteps == "cubic", accelerator.device
        return read_batches(data, base, shares, options.workers, device, cubic, options.from_noise)

    sheet = partial(draw_sheet, model, data, spread(len(data), SHOWN)) if options.sheet_every else None
    run = train_on_pictures(options, accelerator, model, optimizer, len(data), batches, kind, sheet)
    if run:
        own = {key.removeprefix(_PREFIX): v for key, v in run.best_state().items() if key.startswith(_PREFIX)}
        save(model.adapter, file, own, trained_steps=str(options.steps))
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def start_from(adapter: ComposerAdapter, path: Path) -> None:
    """Gives an adapter the weights of another one's file.

    Raises:
        ValueError: the file holds no adapter of this architecture.
    """
    try:
        found = load(path)
    except ValueError as error:
        raise ValueError(f"--start: expected a Composer adapter, got {path.name} ({error})") from error
    own = found.config if found.config.prediction else replace(found.config, prediction=adapter.config.prediction)
    if own != adapter.config:
        raise ValueError(f"--start: expected an adapter of this architecture, got {path.name} with {found.config}")
    adapter.load_state_dict(found.state_dict())


def keep_all_but(adapter: ComposerAdapter, name: str) -> None:
    """Freezes an adapter's weights but those of one representation: what it adds to the timestep embedding, its tokens
    and the convolutions of its map."""
    for key, weight in adapter.named_parameters():
        weight.requires_grad_(name in key.split("."))


@torch.no_grad()
def draw_sheet(model: ComposerTraining, data: Composed, rows, path: Path) -> None:
    """Draws a row for each of some pictures: the picture, one drawn from its caption, one from the caption and
    each other representation, and one from all of them."""
    device, base = next(model.parameters()).device, model.base
    batch = collate([data[row, 0] for row in rows], base.vocabularies)
    # Whatever this epoch drops, a sheet shows.
    captions = [caption_of(data.files[row]) for row in rows]
    batch["tokens"] = torch.tensor([[vocabulary.row(text) for vocabulary in base.vocabularies] for text in captions])
    given = {name: batch[name].flatten(1).any(1).float() for name in NAMES if name in batch}
    given[NAMES[0]] = torch.tensor([float(bool(text)) for text in captions])
    there = torch.stack([given.get(name, torch.ones(len(captions))) for name in NAMES], 1)
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    states, sentences = model.read(batch["tokens"])
    empty = torch.tensor([[vocabulary.row("") for vocabulary in base.vocabularies]] * len(rows), device=device)
    nothing = model.read(empty)[0]
    shown = [batch["target"]]
    for names in ((), *((name,) for name in NAMES[1:]), NAMES):
        chosen = torch.tensor([float(name in (*names, NAMES[0])) for name in NAMES])
        kept = {**batch, "kept": (there * chosen).to(device)}
        features = model.adapter(model.conditions(kept, sentences), tuple(base.latent_shape[-2:]))

        def predict(x, t, context, features=features):
            # Guidance asks for both sides in one call; a composition is that of the second.
            plain, composed = x.chunk(2)
            without, text = zip(*((None, None) if one is None else one.chunk(2) for one in context), strict=True)
            return torch.cat([base.predict(plain, t, without), model.predict(composed, t, text, features)])

        shape, schedule = (len(rows), *base.latent_shape), base.scheduler.config
        latents = sample(predict, schedule, shape, nothing, lambda *_: states, SHEET_STEPS, GUIDANCE, data.seed)
        shown.append(model.autoencoder.decode(latents))
    pictures = torch.stack(shown, 1).flatten(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(pictures, path, columns=len(shown), scale=max(1, _SCALED_TO // base.resolution))
