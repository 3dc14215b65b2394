"""DDIM inversion: from a picture's latent to the noise from which the sampler makes that picture.

DDIM without fresh noise (Song et al., arXiv 2010.02502, equations 13 and 14) is Euler's method for an ordinary
differential equation. With x = z / sqrt(alpha_bar), sigma = sqrt((1 - alpha_bar) / alpha_bar) and a denoiser D, it is

    dx / dsigma = eps(x, sigma) = (x - D(x, sigma)) / sigma

whatever the network predicts. From noise level b down to a, the sampler computes x_a = x_b - (sigma_b - sigma_a)
eps(x_b, sigma_b). Inversion goes up, x_b = x_a + (sigma_b - sigma_a) eps, and needs eps at an x_b that it does not know
yet:

- `euler` uses eps(x_a, sigma_a), the equation read backwards.
- `pnp` passes the network's input at a, z_a, unchanged to the network at the noise level of b, as in the code of
  Plug-and-Play (Tumanyan et al., arXiv 2211.12572).
- Refinements then repeat x_b <- x_a + (sigma_b - sigma_a) eps(x_b, sigma_b), whose fixed point is the exact inverse of
  the sampler's step (Pan et al., arXiv 2309.04907).

A denoiser here is `model(x, sigma) -> denoised` with x (B, ...) and sigma (B,).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

PNP, EULER = "pnp", "euler"
MODES = (PNP, EULER)

LOWEST_LEVEL = 1e-4
"""Where `euler` starts instead of at 0, where eps is 0 / 0; ComfyUI's FlipSigmas starts there too."""

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Report = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Called after each step with its index, the new latents, their noise level, and the step's first denoised output."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The latents that an inversion passed through, in the model's own latent space.

    Attributes:
        sigmas: the N + 1 noise levels, rising.
        latents: (N + 1, B, ...), float32 on the CPU; first the picture's own latents, last the noise.

    Raises:
        ValueError: the noise levels do not rise, or their number differs from that of the latents.
    """

    sigmas: tuple[float, ...]
    latents: torch.Tensor

    def __post_init__(self):
        if len(self.sigmas) != len(self.latents) or not self.sigmas:
            raise ValueError(
                f"sigmas: expected one noise level for each of the latents, got {len(self.sigmas)} for "
                f"{len(self.latents)}"
            )
        if not all(low < high for low, high in pairwise(self.sigmas)):
            raise ValueError(f"sigmas: expected rising noise levels, got {_listed(self.sigmas)}")

    def at(self, sigma: float) -> torch.Tensor:
        """The latents (B, ...) at a noise level.

        Between two levels they are interpolated linearly in sigma, as in an Euler step. Below the lowest and above the
        highest level they are the picture's latents and the noise, unchanged.
        """
        above = bisect_right(self.sigmas, sigma)
        if above == 0 or above == len(self.sigmas):
            return self.latents[min(above, len(self.sigmas) - 1)]
        low, high = self.sigmas[above - 1 : above + 1]
        return torch.lerp(self.latents[above - 1], self.latents[above], (sigma - low) / (high - low))


def rising(sigmas: torch.Tensor) -> torch.Tensor:
    """Reverses a sampler's falling schedule (N + 1,) for inversion.

    Raises:
        ValueError: there are fewer than two noise levels, they do not fall strictly, or one is negative or not finite.
    """
    falls = sigmas.ndim == 1 and len(sigmas) > 1 and bool((sigmas[1:] < sigmas[:-1]).all())
    if not falls or not torch.isfinite(sigmas).all() or sigmas[-1] < 0:
        raise ValueError(
            "sigmas: expected at least two noise levels, each lower than the one before, got "
            f"{_listed(sigmas.flatten().tolist())}"
        )
    return sigmas.flip(0)


def invert(
    model: Denoiser,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    mode: str = PNP,
    refinements: int = 0,
    sigma_data: float = 1.0,
    report: Report | None = None,
) -> tuple[torch.Tensor, Trajectory]:
    """Inverts latents; returns the noise (B, ...), in their dtype and on their device, and the trajectory to it.

    Args:
        model: the denoiser with the single conditioning that describes the pictures, without guidance.
        x: (B, ...), the pictures' latents; each picture is inverted independently of the others.
        sigmas: (N + 1,), rising, from `rising`.
        mode: PNP or EULER.
        refinements: maximum number of fixed-point refinements per step; each costs one evaluation of the model.
        sigma_data: the network's input is x / sqrt(sigma^2 + sigma_data^2); 1 for Stable Diffusion.
        report: called after each step.

    Raises:
        ValueError: the mode is unknown or the number of refinements negative.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if refinements < 0:
        raise ValueError(f"refinements: expected 0 or more, got {refinements}")
    levels = sigmas.clone()
    if mode == EULER and levels[0] == 0:
        levels[0] = LOWEST_LEVEL
    passed = [_kept(x)]
    for i, (a, b) in enumerate(pairwise(levels)):
        if mode == PNP:
            scale = ((b**2 + sigma_data**2) / (a**2 + sigma_data**2)).sqrt()
            eps, denoised = _eps(model, x * scale, b)
        else:
            eps, denoised = _eps(model, x, a)
        x = _refine(model, x, x + eps * (b - a), b - a, b, refinements)
        passed.append(_kept(x))
        if report is not None:
            report(i, x, b, denoised)
    return x, Trajectory(tuple(levels.tolist()), torch.stack(passed))


def _refine(model, x, guess, step, sigma, refinements: int) -> torch.Tensor:
    """Solves x_b = x + step eps(x_b, sigma) by iteration, for each picture independently.

    Evaluating a guess gives its residual: how far the iteration moves it. If the residual grows, the iteration does not
    converge, so the previous guess, whose residual was smaller, is kept and the picture is done.
    """
    best, smallest = guess, x.new_full((len(x),), torch.inf)
    running = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(refinements):
        moved = x + _eps(model, guess, sigma)[0] * step
        residual = (moved - guess).flatten(1).norm(dim=1)
        better = running & (residual < smallest)
        best = _where(better, guess, best)
        guess = _where(better, moved, best)
        smallest, running = torch.where(better, residual, smallest), better
        if not running.any():
            break
    return guess


def reconstruct(
    model: Denoiser, noise: torch.Tensor, sigmas: torch.Tensor, report: Report | None = None
) -> torch.Tensor:
    """The latents (B, ...) that the Euler sampler makes from noise (B, ...) along a falling schedule (N + 1,)."""
    x = noise
    for i, (b, a) in enumerate(pairwise(sigmas)):
        eps, denoised = _eps(model, x, b)
        x = x + eps * (a - b)
        if report is not None:
            report(i, x, a, denoised)
    return x


def renew(noise: torch.Tensor, fresh: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Replaces part of an inversion's noise (B, C, h, w) with fresh Gaussian noise of the same strength.

    Inverted noise retains the colors of its picture. The two noises are independent, so sqrt(1 - s) z + sqrt(s) e
    keeps the variance; where the share is 0 the noise stays as it is, bit for bit.

    Args:
        fresh: standard normal noise of the same shape; scaled to the root mean square of each picture's noise.
        share: (h, w), the share of the variance to replace, 0..1.
    """
    strength = noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    return (1 - share).sqrt() * noise + share.sqrt() * strength * fresh


def relative_error(reconstruction: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Distance of each reconstruction from its original, as a share of the original's norm: (B, ...) to (B,)."""
    return (reconstruction - original).flatten(1).norm(dim=1) / original.flatten(1).norm(dim=1)


def _eps(model: Denoiser, x: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    denoised = model(x, sigma * x.new_ones(len(x)))
    return (x - denoised) / sigma, denoised


def _where(chosen: torch.Tensor, x: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    return torch.where(chosen.view(-1, *(1,) * (x.ndim - 1)), x, otherwise)


def _kept(x: torch.Tensor) -> torch.Tensor:
    return x.to("cpu", torch.float32)


def _listed(sigmas) -> str:
    shown = ", ".join(f"{sigma:.4g}" for sigma in sigmas[:6])
    return f"[{shown}{', ...' if len(sigmas) > 6 else ''}]"
