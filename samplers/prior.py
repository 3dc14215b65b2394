"""Samples an embedding with a prior: the reverse process of DDPM (arXiv 2006.11239) on a cosine schedule, for a network
that predicts the sample without noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

CLIP = 5.0
"""Largest absolute value of a predicted coordinate, in standard deviations."""
_MOST_BETA = 0.999


def cosine_alphas(times: int = 1000) -> torch.Tensor:
    """alpha-bar (times,), float64, of the cosine schedule (arXiv 2102.09672, equation 17)."""

    def level(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - level((i + 1) / times) / level(i / times), _MOST_BETA) for i in range(times)]
    return torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)


def sample_prior(
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    shape: tuple[int, int],
    timesteps: Sequence[int],
    generator: torch.Generator,
    alphas: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeddings (n, D).

    Args:
        predict: (embeddings, timestep) -> embeddings without noise, with guidance.
        shape: (n, D).
        timesteps: falling.
        generator: of the noise, on the CPU.
        alphas: alpha-bar (times,); the cosine schedule by default.
    """
    alphas = cosine_alphas() if alphas is None else alphas
    x = torch.randn(shape, generator=generator)
    for i, t in enumerate(timesteps):
        before = timesteps[i + 1] if i + 1 < len(timesteps) else -1
        level, lower = float(alphas[t]), float(alphas[before]) if before >= 0 else 1.0
        found = predict(x, t).float().cpu().clamp(-CLIP, CLIP)
        alpha = level / lower
        # The mean and the variance of q(x_before | x_t, x_0), DDPM's equation 7.
        mean = (lower**0.5 * (1 - alpha) * found + alpha**0.5 * (1 - lower) * x) / (1 - level)
        variance = (1 - alpha) * (1 - lower) / (1 - level)
        x = mean + variance**0.5 * torch.randn(shape, generator=generator) if before >= 0 else mean
    return x
