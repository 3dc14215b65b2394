"""DDIM inversion with a MODEL, as a ComfyUI sampling with rising noise levels.

The sampler function below follows the flipped schedule, so that ComfyUI does the loading, conditionings, previews and
interruption. The latents of a trajectory are in the model's own latent space, in which ComfyUI samples
(`process_latent_in`). LATENT inputs and outputs are in the VAE's, as everywhere in ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import torch

from ...samplers import inversion
from ...samplers.inversion import Trajectory
from ...subjects.masks import check_aspect
from ...subjects.partition import layer_masks
from ..advice import advise
from ..model.patching import POSITIVE

NAME = "DDIM Inversion"
MAX_ERROR = 0.15
"""Relative error of the reconstruction above which it no longer shows the same picture."""

_LIMITS = {"area": "an area", "mask": "a mask", "gligen": "GLIGEN's boxes"}
"""Options of a conditioning that keep it from acting everywhere alike, in words."""

Callback = Callable[[int, torch.Tensor, torch.Tensor, int], None]
"""ComfyUI's callback: (step index, denoised latents, latents, number of steps)."""


@dataclass(frozen=True, eq=False)
class SourceTrajectory:
    """An inverted picture, for systems that use its features while another picture is sampled.

    Attributes:
        trajectory: its latents from the picture to the noise, in the model's latent space.
        conditioning: the conditioning of the inversion, which describes the picture.
        error: relative error of the reconstruction; for a batch, the largest.
    """

    trajectory: Trajectory
    conditioning: list
    error: float


class Inverted(NamedTuple):
    """The result of an inversion.

    Attributes:
        noise: LATENT to sample from; no noise must be added to it.
        source: for systems that use features of the picture.
        sigmas: (N + 1,), the falling schedule to sample with.
        reconstruction: LATENT that the Euler sampler makes from the noise with this schedule.
        error: its relative error; for a batch, the largest.
    """

    noise: dict
    source: SourceTrajectory
    sigmas: torch.Tensor
    reconstruction: dict
    error: float


def invert(
    model,
    latent: dict,
    conditioning: list,
    steps: int,
    scheduler: str,
    mode: str = inversion.PNP,
    refinements: int = 1,
    callback: Callback | None = None,
    name: str = NAME,
) -> Inverted:
    """Inverts a LATENT with one or more pictures, and samples from the noise again to measure the error.

    Args:
        model: MODEL with noise or v prediction.
        latent: encoded or sampled pictures.
        conditioning: prompt that describes the pictures; there is no negative prompt, as with cfg 1.
        steps: number of steps in the schedule.
        scheduler: ComfyUI's name of the scheduler.
        mode, refinements: see `samplers.inversion.invert`.
        callback: called after each step of the inversion and of the reconstruction.
        name: of the node, for advice.

    Raises:
        ValueError: an input cannot be used; raised before anything is computed.
    """
    sampling = model.get_model_object("model_sampling")
    _check_model(model, sampling)
    samples = _pictures_of(latent, model.get_model_object("latent_format").latent_channels)
    _check_conditioning(conditioning, len(samples))
    falling = comfy.samplers.calculate_sigmas(sampling, scheduler, steps).cpu()
    rising = inversion.rising(falling)
    trajectory, error = None, None

    def up(denoiser, x, sigmas, report):
        nonlocal trajectory
        noise, trajectory = inversion.invert(denoiser, x, sigmas, mode, refinements, float(sampling.sigma_data), report)
        return noise

    def down(denoiser, x, sigmas, report):
        nonlocal error
        x = inversion.reconstruct(denoiser, x, sigmas, report)
        error = float(inversion.relative_error(x.to(trajectory.latents), trajectory.latents[0]).max())
        return x

    both = 2 * len(falling) - 2
    noise = _walk(model, conditioning, samples, rising, up, _part_of(callback, 0, both))
    reconstruction = _walk(model, conditioning, noise, falling, down, _part_of(callback, len(falling) - 1, both))
    if not error <= MAX_ERROR:
        advise(
            name,
            f"sampled again, the picture comes out {100 * error:.0f}% different; more steps, more refinements or a "
            "prompt that describes it better bring it closer",
        )
    source = SourceTrajectory(trajectory, conditioning, error)
    return Inverted(like(latent, noise), source, falling, like(latent, reconstruction), error)


def renew(latent: dict, partition: torch.Tensor, seed: int, strength: float) -> dict:
    """Mixes fresh noise into the noise of an inversion where concepts are; returns a LATENT.

    Args:
        latent: the noise; in a batch, each picture gets different fresh noise.
        partition: (N + 1, H, W), the background last, which keeps its noise.
        seed: seed of the fresh noise, which ComfyUI generates.
        strength: share of the variance that is replaced where the concepts' weights add up to 1, 0..1.

    Raises:
        ValueError: the latent does not contain pictures, or the partition has another aspect ratio.
    """
    samples = latent["samples"]
    if samples.is_nested or samples.ndim != 4:
        raise ValueError("noise: expected that of pictures, as DDIM Inversion gives it, got a video's")
    size = tuple(samples.shape[-2:])
    check_aspect(partition.sum(0), size, "partition", latent=True)
    concepts = layer_masks(partition.to(samples), size)[:-1].sum(0).clamp(0, 1)
    fresh = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")).to(samples)
    return {**latent, "samples": inversion.renew(samples, fresh, strength * concepts)}


def _walk(model, conditioning: list, samples: torch.Tensor, sigmas: torch.Tensor, walk: Callable, callback):
    """Runs `walk(denoiser, x, sigmas, report)`, which returns latents, as a ComfyUI sampler on `samples`."""

    def sampler_function(model, x, sigmas, extra_args, callback, disable):
        with comfy.utils.model_trange(len(sigmas) - 1, disable=disable) as bar:

            def report(i, x, sigma, denoised):
                bar.update(1)
                callback({"i": i, "x": x, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})

            return walk(partial(model, **extra_args), x, sigmas, report)

    guider = comfy.samplers.CFGGuider(model)
    # ComfyUI's guiders skip absent conditionings: without a negative, there is one row per picture.
    guider.inner_set_conds({POSITIVE: conditioning})
    result = guider.sample(
        torch.zeros_like(samples, device="cpu"),
        samples,
        comfy.samplers.KSAMPLER(sampler_function),
        sigmas,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=0,
    )
    return result.to(comfy.model_management.intermediate_device())


def _part_of(callback: Callback | None, first: int, total: int) -> Callback | None:
    """The callback for one of several samplings that share a progress bar."""
    if callback is None:
        return None
    return lambda step, denoised, x, _: callback(first + step, denoised, x, total)


def like(latent: dict, samples: torch.Tensor) -> dict:
    """The LATENT with other samples. An empty latent's size hint is dropped, as ComfyUI's samplers do."""
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**kept, "samples": samples}


def _check_model(model, sampling) -> None:
    kinds, other = comfy.model_sampling.EPS, comfy.model_sampling.IMG_TO_IMG
    if not isinstance(sampling, kinds) or isinstance(sampling, other):
        raise ValueError(
            "model: expected one of noise or v prediction (such as SD 1.x, SD 2.x, SDXL and Shapeland), got one of "
            "flow matching or of another kind"
        )
    wanted = model.get_model_object("latent_format").latent_channels
    given = model.model.model_config.unet_config.get("in_channels", wanted)
    if given != wanted:
        raise ValueError(
            f"model: expected one that sees {wanted} channels, the picture alone, got one of {given} for inpainting "
            "or editing"
        )


def _pictures_of(latent: dict, channels: int) -> torch.Tensor:
    """The samples (B, C, h, w) of a LATENT, after checking that they can be inverted."""
    samples = latent["samples"]
    if samples.is_nested or samples.ndim != 4:
        raise ValueError("latent: expected pictures, got a video or several kinds of latents in one")
    if samples.shape[1] != channels:
        raise ValueError(f"latent: expected {channels} channels for this model, got {samples.shape[1]}")
    if not torch.isfinite(samples).all():
        raise ValueError("latent: expected finite values, got NaN or infinity")
    if not samples.flatten(1).any(dim=1).all():
        raise ValueError("latent: expected an encoded or sampled picture, got an empty latent")
    if "noise_mask" in latent:
        raise ValueError(
            "latent: expected one without a noise mask, since the whole picture is inverted, got one with it"
        )
    return samples


def _check_conditioning(conditioning: list, pictures: int) -> None:
    if len(conditioning) != 1:
        raise ValueError(
            "conditioning: expected one prompt for the whole picture and all steps, got "
            + (f"{len(conditioning)} that are combined or follow each other" if conditioning else "an empty one")
        )
    context, extras = conditioning[0]
    limits = [said for name, said in _LIMITS.items() if extras.get(name) is not None]
    if extras.get("start_percent", 0.0) > 0 or extras.get("end_percent", 1.0) < 1:
        limits.append("a part of the schedule")
    if limits:
        raise ValueError(
            f"conditioning: expected one prompt for the whole picture and all steps, got one with {limits[0]}"
        )
    if context is not None and len(context) not in (1, pictures):
        raise ValueError(f"conditioning: expected one prompt or as many as pictures ({pictures}), got {len(context)}")
