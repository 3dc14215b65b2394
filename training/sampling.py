"""The sampler that training draws pictures with: DDIM with guidance, on a diffusers schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

States = tuple[torch.Tensor, torch.Tensor | None]
"""Text states (n, 77, D) and, with two text towers, the pooled state (n, P) of the second."""


@torch.no_grad()
def sample(
    predict: Callable[[torch.Tensor, torch.Tensor, States], torch.Tensor],
    schedule: Mapping[str, Any],
    shape: tuple[int, int, int, int],
    unconditional: States,
    conditional: Callable[[int, torch.Tensor, torch.Tensor], States],
    steps: int,
    guidance: float,
    seed: int,
) -> torch.Tensor:
    """DDIM latents (Song et al., arXiv 2010.02502) with classifier-free guidance (arXiv 2207.12598).

    Args:
        predict: (latents, timestep, states) -> the model's prediction, in fp32.
        schedule: configuration of the model's diffusers scheduler.
        shape: (n, C, h, w) of the latents.
        unconditional: states of n empty texts.
        conditional: (step, counted from 0; latents; timestep (n,)) -> states of the step's n texts.
        steps: number of sampling steps.
        guidance: guidance scale; 1 uses the conditional prediction alone.
        seed: seed of the noise, which is drawn on the CPU.
    """
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(
        schedule, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    scheduler.set_timesteps(steps)
    device = unconditional[0].device
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)
    for i, t in enumerate(scheduler.timesteps):
        both = tuple(
            None if a is None else torch.cat((a, b))
            for a, b in zip(unconditional, conditional(i, x, t.to(device).expand(len(x))), strict=True)
        )
        without, with_text = predict(torch.cat((x, x)), t.to(device), both).chunk(2)
        x = scheduler.step(without + guidance * (with_text - without), t, x).prev_sample
    return x
