"""Samples pictures with a MODEL for the pack's own use, such as previews."""

from __future__ import annotations

import comfy.sample
import torch

SAMPLER, SCHEDULER, CFG = "euler", "normal", 5.0


def sample(model, positive: list, negative: list, cells: int, seed: int, steps: int, count: int = 1) -> torch.Tensor:
    """Latents (count, C, cells, cells) for two conditionings, from pure noise."""
    empty = torch.zeros(count, model.model.latent_format.latent_channels, cells, cells)
    noise = comfy.sample.prepare_noise(empty, seed)
    return comfy.sample.sample(
        model, noise, steps, CFG, SAMPLER, SCHEDULER, positive, negative, empty, disable_pbar=True, seed=seed
    )
