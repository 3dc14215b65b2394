"""Stage 1: the autoencoder between pictures and latents."""

from __future__ import annotations

import numpy as np
import torch

from ...shapeland import models
from ...shapeland.autoencoder import Autoencoder
from ..loop import Run, warmup_cosine
from .common import RUNS, SEED, open_scenes, pixels, psnr, rows_of, save_sheet, weights_file
from .scenes import SHARD

# Noise added to the latents while training, relative to their spread: neighbouring latents must decode alike, so that
# what a diffusion model nearly hits still looks right.
NOISE = 0.05


def train_autoencoder(device: str, steps: int) -> None:
    """Absolute plus squared error with noisy latents; writes weights whose latents have mean 0 and variance 1."""
    data = open_scenes(4)
    torch.manual_seed(SEED)
    model = Autoencoder()
    run = Run(RUNS / "autoencoder", model, warmup_cosine(2e-3, 100, steps), steps, SEED, average=0.995, device=device)
    held_out = pixels(data.take("image", np.arange(3 * SHARD, 3 * SHARD + 512)), device)

    def loss_of(step, generator):
        x = pixels(data.take("image", rows_of(step, 16, 3 * SHARD)), device)
        latents = model.encode(x)
        spread = latents.detach().float().std((0, 2, 3), keepdim=True)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        y = model.decode(latents + NOISE * spread * noise).float()
        return {"absolute": (y - x).abs().mean(), "squared": 4 * (y - x).square().mean()}

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
