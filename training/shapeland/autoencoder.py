"""Stages 'autoencoder' and 'decoder': the autoencoder between pictures and latents."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ...shapeland import models
from ...shapeland.autoencoder import Autoencoder
from ..loop import Run
from ..optimizers import adamw, warmup_cosine
from .common import RUNS, SEED, open_scenes, pixels, psnr, save_sheet, step_rows, weights_file
from .scenes import SHARD

# Noise added to the latents in training, relative to their standard deviation: similar latents must decode alike, so
# that the small errors of a diffusion model still look right.
NOISE = 0.05
# Weight of the error of rotated and halved pictures, decoded from rotated and halved latents (EQ-VAE, arXiv 2502.09509,
# and arXiv 2502.14831): latents that transform with the picture are smooth where it is, and easier for a diffusion
# model.
EQUIVARIANCE = 0.5


def moved(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures or latents (n, C, h, w), with probability 1/2 at half the size, else rotated by one to three quarter
    turns. Generators in the same state transform both alike."""
    choice, turns = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, 2), (1, 4)))
    return torch.rot90(tensor, turns, (2, 3)) if choice else F.avg_pool2d(tensor, 2)


def train_autoencoder(device: str, steps: int, shipped: bool = False) -> None:
    """Trains with absolute plus squared error on noisy latents, also rotated and halved ones; writes weights whose
    latents have mean 0 and variance 1. A run without a checkpoint starts from the shipped weights if `shipped`."""
    torch.manual_seed(SEED)
    model = Autoencoder()
    if shipped:
        model.load_state_dict(models.load("autoencoder"))
        # The scale of the latents is set again at the end.
        model.mean.zero_()
        model.std.fill_(1)

    def loss_of(x, generator):
        latents = model.encode(x)
        spread = latents.detach().float().std((0, 2, 3), keepdim=True)
        latents = latents + NOISE * spread * torch.randn(latents.shape, generator=generator).to(device)
        absolute, squared = _errors(model.decode(latents), x)
        seed = generator.initial_seed()
        there = [moved(tensor, torch.Generator().manual_seed(seed)) for tensor in (latents, x)]
        elsewhere = sum(_errors(model.decode(there[0]), there[1]))
        return {"absolute": absolute, "squared": squared, "moved": EQUIVARIANCE * elsewhere}

    held_out = _train(model, "autoencoder", loss_of, steps, device)
    with torch.no_grad():
        latents = model.encode(held_out)
        model.mean.copy_(latents.mean((0, 2, 3)))
        model.std.copy_(latents.std((0, 2, 3)))
    models.save("autoencoder", model.state_dict(), weights_file("autoencoder"))


def train_decoder(device: str, steps: int) -> None:
    """Trains the decoder alone, so that latents stay as they are: it no longer has to decode transformed latents, which
    cost it sharpness. Rewrites the autoencoder's weights."""
    torch.manual_seed(SEED)
    model = Autoencoder()
    model.load_state_dict(models.load("autoencoder", weights_file("autoencoder")))
    model.encoder.requires_grad_(False)

    def loss_of(x, generator):
        with torch.no_grad():
            latents = model.encode(x)
        latents = latents + NOISE * torch.randn(latents.shape, generator=generator).to(device)
        absolute, squared = _errors(model.decode(latents), x)
        return {"absolute": absolute, "squared": squared}

    _train(model, "decoder", loss_of, steps, device)
    models.save("autoencoder", model.state_dict(), weights_file("autoencoder"))


def _errors(y: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    difference = y.float() - x
    return difference.abs().mean(), 4 * difference.square().mean()


def _train(model: Autoencoder, name: str, loss_of, steps: int, device: str) -> torch.Tensor:
    """Trains the model by a run in the folder `name`, leaves averaged weights in it, and returns held-out pictures."""
    data = open_scenes(4)
    model.to(device)
    run = Run(RUNS / name, model, adamw(model, 2e-3), steps, SEED, warmup_cosine(100, steps), average=0.995)
    held_out = pixels(data.take("image", np.arange(3 * SHARD, 3 * SHARD + 512)), device)

    def report(_step):
        y = model.decode(model.encode(held_out)).clamp(-1, 1)
        save_sheet(torch.stack([held_out[:32], y[:32]], 1).flatten(0, 1), run.folder / "samples.png")
        return {"psnr": round(psnr(y, held_out), 3)}

    def step_loss(step, generator):
        return loss_of(pixels(data.take("image", step_rows(step, 16, 3 * SHARD)), device), generator)

    run.train(step_loss, 50, report=report, report_every=250)
    model.load_state_dict(run.best_state())
    return held_out
