"""Fusion sampling: each step first fuses the subjects into the picture, then refines it towards text and subjects.

ProFusion (Zhou et al., arXiv 2305.13579), algorithm 1, in the form that holds for every parametrization. A latent is
x = a x0 + b n with the signal a and the noise b of its level; D is a denoiser's estimate of x0.

- Fusion keeps the clean estimate D_f and renews a part of the noise, so that the picture can move to where subjects and
  text agree:  x <- a D_f + kappa (x - a D_f) + b sqrt(1 - kappa^2) z,  z ~ N(0, 1), with
  kappa = 1 - eta^2 (1 - (lambda' / lambda)^2),  lambda = b / a, lambda' that of the next level. It is the published
  DDIM step down and step of renewed noise up again, merged: at eta 1 an ancestral step down and the Markov step up.
- Refinement is a step of any sampler with D_r.

With u the negative prompt, C the text without subjects, J_j the prompt with subject j, and J_j^g the same with its
subject weakened by gamma (equations 7 to 9 of the paper, for several subjects as in the published code):

    D_f = sum_j w_j [D_u + g_f (D_Jj^g - D_u)],  w_j = s_j / sum s
    D_r = D_u + sum_j s_j (D_Jj - D_u) + s_C (D_C - D_u)

The weights may be maps, for subjects that each have a region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

STAGE = "conceptloom_stage"
"""Name in `model_options` under which the model is told the stage that it is evaluated for."""

FOLLOWING = "conceptloom_following_stage"
"""Name in `model_options` under which the model is told the stage after a fusion stage: another one, or refinement."""

FUSION, REFINEMENT = "fusion", "refinement"

Sampler = Callable[..., torch.Tensor]
NoiseSampler = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Fusion:
    """How the fusion stage is run.

    Attributes:
        repeats: m, times per step; 0 leaves refinement alone, the variant with independent conditions.
        eta: how much of the noise is renewed, 0..1; 0 changes nothing, as `repeats` 0.
        highest, lowest: noise levels between which the stage is run.

    Raises:
        ValueError: one of them is out of its range.
    """

    repeats: int = 1
    eta: float = 1.0
    highest: float = float("inf")
    lowest: float = 0.0

    def __post_init__(self):
        if self.repeats < 0:
            raise ValueError(f"fusion_steps: expected 0 or more, got {self.repeats}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected 0 to 1, got {self.eta:g}")

    def repeats_at(self, sigma: float) -> int:
        """Times that the stage is run at a noise level."""
        return self.repeats if self.eta and self.lowest <= sigma <= self.highest else 0


@dataclass(frozen=True)
class Levels:
    """What a noise level means for a model.

    Attributes:
        flow: x = (1 - sigma) x0 + sigma n, as flow matching has it, in place of x = x0 + sigma n.
        lowest: the model's lowest noise level. At the last step, whose next level is 0, the published sampler goes to
            this one, for all noise would be renewed otherwise.
        noise_scale: standard deviation of n.
    """

    flow: bool = False
    lowest: float = 0.0
    noise_scale: float = 1.0

    def signal(self, sigma: torch.Tensor) -> torch.Tensor:
        """The factor a of the picture."""
        return 1 - sigma if self.flow else torch.ones_like(sigma)

    def kept(self, sigma: torch.Tensor, following: torch.Tensor, eta: float) -> torch.Tensor:
        """kappa: the part of the noise that stays, where the next level is `following`."""
        following = following.clamp(min=self.lowest)
        # (lambda' / lambda)^2 without a division by the signal, which is 0 at the beginning of a flow.
        ratio = following * self.signal(sigma) / (sigma * self.signal(following))
        return 1 - eta**2 * (1 - ratio**2).clamp(0, 1)


def renew(
    x: torch.Tensor,
    denoised: torch.Tensor,
    noise: torch.Tensor,
    levels: Levels,
    sigma: torch.Tensor,
    following: torch.Tensor,
    eta: float = 1.0,
    share: torch.Tensor | float = 1.0,
) -> torch.Tensor:
    """The latents (B, C, ...) after one fusion step: their clean estimate stays, a part of their noise is fresh.

    Args:
        denoised: D_f, of the same shape.
        noise: standard normal, of the same shape.
        sigma, following: this noise level and the next, without axes.
        eta: see `Fusion`.
        share: (..., h, w), 0..1, how much of this happens where; at 0 the latents stay as they are, bit by bit.
    """
    renewed = (1 - levels.kept(sigma, following, eta)) * share
    fresh = sigma * levels.noise_scale * (renewed * (2 - renewed)) ** 0.5  # 1 - kappa^2
    return x - renewed * (x - levels.signal(sigma) * denoised) + fresh * noise


def sample_fusion(
    model: Callable[..., torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    *,
    base: Sampler,
    base_options: Mapping[str, Any] | None = None,
    fusion: Fusion,
    levels: Levels,
    noise_sampler: NoiseSampler,
    share: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | float] | None = None,
    progress: Callable[..., Iterable[int]] | None = None,
) -> torch.Tensor:
    """Samples with a fusion stage before each step of another sampler.

    Args:
        model: `model(x, sigma, **extra_args) -> denoised`; told the stage by STAGE in its `model_options`, and what
            comes after fusion by FOLLOWING.
        x: (B, C, ...), noise of the first level.
        sigmas: (N + 1,), falling.
        callback: told once per step what `base` tells, with the index of the step.
        base: a sampler of the same signature, run for one step at a time.
        base_options: keyword arguments of it.
        noise_sampler: (sigma, following) to standard normal noise of the shape of x; fusion draws first in each step.
        share: (latents, sigma) to where fusion acts, see `renew`; at the number 0 the stage is left out. None means
            everywhere.
        progress: (steps, disable=...) to the numbers of the steps, with a bar on the console; None shows none.

    Returns:
        (B, C, ...), the latents of the last level.
    """
    extra_args = dict(extra_args or {})
    options = extra_args.pop("model_options", {})
    fusing = [
        {**extra_args, "model_options": {**options, STAGE: FUSION, FOLLOWING: stage}} for stage in (FUSION, REFINEMENT)
    ]
    refining = {**extra_args, "model_options": {**options, STAGE: REFINEMENT}}
    rows = x.new_ones(len(x))
    count, repeats = len(sigmas) - 1, [fusion.repeats_at(sigma) for sigma in sigmas.tolist()]
    for i in range(count) if progress is None else progress(count, disable=disable):
        sigma, following = sigmas[i], sigmas[i + 1]
        for repeat in range(repeats[i]):
            here = 1.0 if share is None else share(x, sigma)
            if not isinstance(here, torch.Tensor) and here == 0:
                break
            denoised = model(x, sigma * rows, **fusing[repeat == repeats[i] - 1])
            x = renew(x, denoised, noise_sampler(sigma, following), levels, sigma, following, fusion.eta, here)
        told = None if callback is None else (lambda facts, i=i: callback({**facts, "i": i}))
        x = base(
            model,
            x,
            sigmas[i : i + 2],
            # A copy: some samplers put functions of their own into the options, once per call.
            extra_args=dict(refining),
            callback=told,
            disable=True,
            **(base_options or {}),
        )
    return x


def shares(scales: Sequence[torch.Tensor | float]) -> list[torch.Tensor | float]:
    """w_j: each scale as a part of their sum. Scales are numbers above 0, or maps (..., h, w); where all maps are 0, so
    are the parts."""
    total = sum(scales)
    if not isinstance(total, torch.Tensor):
        return [scale / total for scale in scales]
    nonzero = torch.where(total > 0, total, torch.ones_like(total))
    return [scale / nonzero for scale in scales]


def combine(
    estimates: Sequence[torch.Tensor], scales: Sequence[torch.Tensor | float], negative: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """A pair (D, S) with D_u + S (D - D_u) = D_u + sum_i s_i (D_i - D_u), so that whatever acts on the two sides of
    guidance acts on several sides too.

    Args:
        estimates: D_i, (B, C, ...) each.
        scales: s_i, numbers or maps (..., h, w), not negative; S is the largest sum of them.
        negative: D_u; None where their sum is 1 everywhere, which does without.

    One estimate with a number is its own pair, bit by bit.
    """
    if len(estimates) == 1 and not isinstance(scales[0], torch.Tensor):
        return estimates[0], float(scales[0])
    total = sum(scales)
    largest = float(total.max()) if isinstance(total, torch.Tensor) else float(total)
    weighted = torch.zeros_like(estimates[0])
    for scale, estimate in zip(scales, estimates, strict=True):
        weighted = weighted + scale * estimate
    if negative is None:
        return weighted, largest
    return negative + (weighted - total * negative) / largest, largest
