"""Stage 1: the autoencoder between pictures and latents."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ...shapeland import models
from ...shapeland.autoencoder import Autoencoder
from ..loop import Run, warmup_cosine
from .common import RUNS, SEED, open_scenes, pixels, psnr, rows_of, save_sheet, weights_file
from .scenes import SHARD

# Noise added to the latents while training, relative to their spread: neighbouring latents must decode alike, so that
# what a diffusion model nearly hits still looks right.
NOISE = 0.05
# Weight of the error of turned and halved pictures, decoded from turned and halved latents (EQ-VAE, arXiv 2502.09509,
# and arXiv 2502.14831): latents that go with the picture are smooth where it is, and easier for a diffusion model.
EQUIVARIANCE = 0.5


def moved(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Pictures or latents (n, C, h, w), half of the times at half the size, else turned by one to three quarters. Equal
    generators move both alike."""
    choice, turns = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, 2), (1, 4)))
    return torch.rot90(tensor, turns, (2, 3)) if choice else F.avg_pool2d(tensor, 2)


def train_autoencoder(device: str, steps: int, shipped: bool = False) -> None:
    """Absolute plus squared error with noisy latents, which move with the picture; writes weights whose latents have
    mean 0 and variance 1. A run without a checkpoint starts from the shipped weights if so wished."""
    data = open_scenes(4)
    torch.manual_seed(SEED)
    model = Autoencoder()
    if shipped:
        model.load_state_dict(models.load("autoencoder"))
        # Latents get their scale anew at the end.
        model.mean.zero_()
        model.std.fill_(1)
    run = Run(RUNS / "autoencoder", model, warmup_cosine(2e-3, 100, steps), steps, SEED, average=0.995, device=device)
    held_out = pixels(data.take("image", np.arange(3 * SHARD, 3 * SHARD + 512)), device)

    def loss_of(step, generator):
        x = pixels(data.take("image", rows_of(step, 16, 3 * SHARD)), device)
        latents = model.encode(x)
        spread = latents.detach().float().std((0, 2, 3), keepdim=True)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        latents = latents + NOISE * spread * noise
        absolute, squared = errors(model.decode(latents).float(), x)
        seed = generator.initial_seed()
        there = [moved(tensor, torch.Generator().manual_seed(seed)) for tensor in (latents, x)]
        elsewhere = sum(errors(model.decode(there[0]).float(), there[1]))
        return {"absolute": absolute, "squared": squared, "moved": EQUIVARIANCE * elsewhere}

    def errors(y, x):
        return (y - x).abs().mean(), 4 * (y - x).square().mean()

    def averaged():
        model = Autoencoder().to(device)
        model.load_state_dict(run.best_state())
        return model

    @torch.no_grad()
    def report(step):
        model = averaged()
        y = model.decode(model.encode(held_out)).clamp(-1, 1)
        save_sheet(torch.stack([held_out[:32], y[:32]], 1).flatten(0, 1), run.folder / "samples.png")
        return {"psnr": round(psnr(y, held_out), 3)}

    run.train(loss_of, 50, report, 250)
    model = averaged()
    with torch.no_grad():
        latents = model.encode(held_out)
        model.mean.copy_(latents.mean((0, 2, 3)))
        model.std.copy_(latents.std((0, 2, 3)))
    models.save("autoencoder", model.state_dict(), weights_file("autoencoder"))
