"""Extra forward passes: pictures other than the sampled one go through the model.

A pass computes features (keys, values, residual branches) at the noise level of the evaluation that follows it, and
does not depend on the sampled picture. Patches of other nodes apply to it if they change features alike for all rows;
patches that depend on the rows of the sampled picture do not.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping

import comfy.samplers
import torch

from .families import family_of, network_of
from .layers import unhandled_layers
from .patching import Evaluation
from .sites import Handler, Site

_INPUT_PATCHES, _OUTPUT_PATCH = ("input_block_patch", "input_block_patch_after_skip"), "output_block_patch"
_DOWNSCALE = "nodes_model_downscale"
"""End of the name of the module that has PatchModelAddDownscale; ComfyUI puts the file's path before it."""
KERNEL_OVERRIDE = "optimized_attention_override"
_OPTIONS = ("sample_sigmas", KERNEL_OVERRIDE)


class StopForward(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    """Raised by a handler to skip the rest of the forward pass."""


def feature_patches(evaluation: Evaluation) -> dict[str, list]:
    """Patches of other nodes that change features alike for every row, and therefore also apply to extra passes.

    Of those of input blocks only ComfyUI's own, which shrinks (PatchModelAddDownscale): other packs' add what belongs
    to the sampled picture, such as a hint (ControlNeXt) or what is around a hole (Fooocus inpainting).
    """
    patches = evaluation.options.get("patches", {})
    found = {
        name: [patch for patch in patches[name] if getattr(patch, "__module__", "").endswith(_DOWNSCALE)]
        for name in _INPUT_PATCHES
        if name in patches
    }
    if _OUTPUT_PATCH in patches:
        found[_OUTPUT_PATCH] = patches[_OUTPUT_PATCH]
    return {name: kept for name, kept in found.items() if kept}


Conds = dict[str, torch.Tensor | int | float]
"""Inputs of a model call other than the latent, by name: tensors with one row per picture, and numbers."""


def encode(model, entry: Mapping, latent: torch.Tensor, side: str, seed: int, rows: int = 1) -> Conds:
    """Encodes one conditioning as inputs of a model call.

    Args:
        model: ComfyUI's BaseModel.
        entry: one conditioning in the form that `comfy.sampler_helpers.convert_cond` returns.
        latent: (1, C, h, w), on the device of the computation.
        side: POSITIVE or NEGATIVE.
        seed: seed of the noise that some models add to conditionings.
        rows: number of pictures in the call.
    """
    encoded = comfy.samplers.encode_model_conds(
        model.extra_conds,
        [{**entry, "model_conds": {}}],
        latent,
        latent.device,
        side,
        latent_image=latent,
        denoise_mask=torch.zeros_like(latent[:, :1]),
        seed=seed,
    )[0]["model_conds"]
    found = {name: c.process_cond(batch_size=rows, area=None).cond for name, c in encoded.items()}
    numbers = {name: c for name, c in found.items() if isinstance(c, (int, float))}
    return numbers | {name: c.to(latent.device) for name, c in found.items() if torch.is_tensor(c)}


def forward(evaluation: Evaluation, x: torch.Tensor, conds: Conds, handlers: Mapping[Site, Handler]) -> None:
    """Runs the model on `x` (n, C, h, w) at the noise level of `evaluation` until a handler raises StopForward.

    The wrappers of other nodes are bypassed. `conds` are the inputs from `encode`, for n rows.
    """
    model = evaluation.model
    sigma = evaluation.sigma[:1].repeat(len(x))
    options = {name: evaluation.options[name] for name in _OPTIONS if name in evaluation.options}
    options.update(
        cond_or_uncond=[0],
        uuids=[uuid.uuid4()],
        sigmas=sigma,
        patches=feature_patches(evaluation),
    )
    network = network_of(model)
    options = family_of(network).install(network, options, handlers)
    with contextlib.suppress(StopForward):
        evaluate(model, x, sigma, conds, options)


def evaluate(model, x: torch.Tensor, sigma: torch.Tensor, conds: Conds, options: dict) -> torch.Tensor:
    """Denoised latents (n, C, h, w) for `x` at the noise levels `sigma` (n,). All wrappers are bypassed."""
    conds = dict(conds)
    with unhandled_layers():
        return model._apply_model(
            x, sigma, conds.pop("c_concat", None), conds.pop("c_crossattn", None), None, options, **conds
        )
