"""Guidance from one composition to another, in Composer's two ways (arXiv 2302.09778, section 3).

As a guider: eps = w eps(x, c2) + (1 - w) eps(x, c1), where conditions of both act once, those of c2 alone w times and
those of c1 alone 1 - w times. It is classifier-free guidance whose negative side is a composition too. And in both
directions: a picture is inverted under c1 and the noise sampled under c2, so that what both share stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import comfy.sample
import comfy.samplers
import torch

from ...compositions.composition import Composition
from ..structure.inversion import invert, like
from .adapter import LoadedAdapter, encode

NAME = "Bidirectional Guidance"


def guider_between(model, adapter: LoadedAdapter, clip, first: Composition, second: Composition, scale: float):
    """A GUIDER from `first` to `second`; 1 is `second` alone, 0 `first` alone.

    Raises:
        ValueError: the adapter does not understand a composition.
    """
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(encode(adapter, clip, second), encode(adapter, clip, first))
    guider.set_cfg(scale)
    return guider


class Edited(NamedTuple):
    """Attributes:
    latent: LATENT of the edited pictures.
    reconstruction: LATENT of the pictures as the inversion gives them back.
    error: relative error of the reconstruction; the largest of a batch.
    """

    latent: dict
    reconstruction: dict
    error: float


def edit(
    model,
    latent: dict,
    source: list,
    target: list,
    negative: list,
    steps: int,
    scheduler: str,
    refinements: int = 1,
    cfg: float = 1.0,
    callback: Callable | None = None,
) -> Edited:
    """Inverts pictures under one conditioning, and samples their noise under another.

    Args:
        model: MODEL with noise or v prediction.
        latent: LATENT of the pictures.
        source: conditioning that describes them.
        target: conditioning of what they shall become.
        negative: conditioning to guide away from; unused at cfg 1.
        steps, scheduler, refinements: see `structure.inversion.invert`.
        cfg: guidance scale of the sampling. The inversion has none.
        callback: called after each step.

    Raises:
        ValueError: an input cannot be used.
    """
    if len(source) != 1:
        raise ValueError(f"source: expected one prompt for the whole picture and all steps, got {len(source)}")
    done = 0

    def report(_step: int, denoised, x, _total: int) -> None:
        nonlocal done
        done += 1
        if callback:
            # Inversion, reconstruction and sampling, of about as many steps each.
            callback(min(done, 3 * steps) - 1, denoised, x, 3 * steps)

    found = invert(model, latent, source, steps, scheduler, refinements=refinements, callback=report, name=NAME)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(target, negative)
    guider.set_cfg(cfg)
    samples = comfy.sample.fix_empty_latent_channels(model, found.noise["samples"])
    made = guider.sample(
        torch.zeros_like(samples),
        samples,
        comfy.samplers.sampler_object("euler"),
        found.sigmas,
        callback=report,
        disable_pbar=True,
        seed=0,
    )
    return Edited(like(latent, made.cpu()), found.reconstruction, found.error)
