"""Copies of a MODEL and a CLIP for training in ComfyUI.

Autograd cannot use parameters that ComfyUI created in inference mode. Therefore the diffusion model and the text
encoder are loaded a second time, and released when the training ends, whether or not it succeeds.

ComfyUI's own models may only move between devices in inference mode: a parameter that was created in it and moves
outside of it cannot be computed with again, in either mode.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import comfy.clip_model
import comfy.model_management
import torch

from .families import network_of
from .sites import CROSS

_SPARE = 1.1  # ComfyUI frees this multiple of a model's size before it loads the model


@contextmanager
def trainable_copies(model, clip) -> Iterator[tuple[Any, Any]]:
    """Copies of a MODEL and a CLIP that autograd can use, a model patcher and a CLIP, for the duration of the context.
    Models in fp16 compute in bf16 or, where that is slow, in full precision.

    Raises:
        ValueError: one of them cannot be loaded a second time, or is of an unknown family, or another node has replaced
            parts of it.
    """
    for given, what in ((model, "model"), (clip.patcher, "clip")):
        if given.cached_patcher_init is None:
            raise ValueError(
                f"{what}: expected one from the host's own loaders, got one that cannot be loaded a second time"
            )
    network_of(model.model, CROSS)
    patched = next((name for name in model.object_patches if name.startswith("diffusion_model")), None)
    if patched:
        raise ValueError(
            f"model: expected one whose layers are its checkpoint's, got one with another node's patch of {patched}, "
            "which would not be of the copy that is trained on; connect the model ahead of that node"
        )
    with torch.inference_mode():
        # A loader may put a model onto its device at once, and makes room for it a second time.
        _make_room([model, clip.patcher] * 2, [])
    # The fresh patchers are kept too: without a model's first patcher, ComfyUI reports a memory leak at every load.
    (patcher, _fresh_unet), (text_patcher, _fresh_text) = _copy(model), _copy(clip.patcher)
    if patcher.model.get_dtype_inference() == torch.float16:
        # Gradients of a mean over all latents are less than the least number of fp16. ComfyUI's own training does this.
        fast = comfy.model_management.should_use_bf16(patcher.load_device)
        patcher.set_model_compute_dtype(torch.bfloat16 if fast else torch.float32)
    text = clip.clone()
    text.patcher = text_patcher
    text.cond_stage_model = text.patcher.model
    # `load_copies` loads it: to encode a text must not make ComfyUI unload anything in the middle of a step.
    text.load_model = lambda *_: text_patcher
    training = comfy.model_management.in_training
    comfy.model_management.in_training = True
    try:
        for one in (patcher, text.patcher):
            one.model.requires_grad_(False)
        for layer in text.cond_stage_model.modules():
            if isinstance(layer, comfy.clip_model.CLIPLayer):
                layer.forward = MethodType(_out_of_place, layer)
        yield patcher, text
    finally:
        comfy.model_management.in_training = training
        for layer in text.cond_stage_model.modules():
            # A bound method on its layer is a reference cycle, which would keep the copy until garbage collection.
            layer.__dict__.pop("forward", None)
        with torch.inference_mode():
            for one in (patcher, text.patcher):
                comfy.model_management.unload_model_and_clones(one)


def load_copies(patchers: Sequence) -> None:
    """Loads patchers of `trainable_copies` onto their devices, for which ComfyUI may unload other models."""
    with torch.inference_mode():
        _make_room(patchers, patchers)
    comfy.model_management.load_models_gpu(patchers)


def encoded(vae, pictures: torch.Tensor) -> torch.Tensor:
    """Latents (n, C, h, w) of pictures (n, H, W, 3) from ComfyUI's VAE; autograd can use them."""
    with torch.inference_mode():
        latents = vae.encode(pictures)
    return latents.clone()


def _make_room(patchers: Sequence, kept: Sequence) -> None:
    """Unloads what ComfyUI would unload to load models of these patchers' sizes, but none of those that are `kept`."""
    loaded = [comfy.model_management.LoadedModel(one) for one in kept]
    needed: dict[torch.device, float] = {}
    for one in patchers:
        there = one.loaded_size() if one in kept else 0
        needed[one.load_device] = needed.get(one.load_device, 0.0) + one.model_size() - there
    for device, size in needed.items():
        if device.type != "cpu":
            spare = comfy.model_management.minimum_inference_memory()
            comfy.model_management.free_memory(_SPARE * size + spare, device, loaded)


def _copy(patcher) -> tuple:
    """Copies a patcher and its patches of weights onto a newly loaded model; returns the copy, and the patcher that the
    new model came with."""
    factory, arguments, *index = patcher.cached_patcher_init
    fresh = factory(*arguments, disable_dynamic=True)
    fresh = fresh[index[0]] if index else fresh
    made = patcher.clone(force_deepcopy=True, model_override=fresh.get_clone_model_override())
    # ComfyUI unloads together what has one such id, and loads what the options name, such as another node's model.
    made.clone_base_uuid = uuid.uuid4()
    made.model_options = {"transformer_options": {}}
    return made, fresh


def _out_of_place(layer, x, mask=None, optimized_attention=None):
    """Forward pass of a text encoder's layer. ComfyUI's own adds in place, which autograd does not allow."""
    x = x + layer.self_attn(layer.layer_norm1(x), mask, optimized_attention)
    return x + layer.mlp(layer.layer_norm2(x))
