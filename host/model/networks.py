"""Our own networks, in patchers of ComfyUI, which manage their memory."""

from __future__ import annotations

import comfy.model_management
import comfy.model_patcher
import torch


def compute_dtype() -> torch.dtype:
    """The precision of our networks: fp16 where ComfyUI's device is fast in it."""
    half = comfy.model_management.should_use_fp16(comfy.model_management.get_torch_device())
    return torch.float16 if half else torch.float32


def in_patcher(net: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A patcher for a network that computes where diffusion models do; the network is `patcher.model`."""
    return comfy.model_patcher.CoreModelPatcher(
        net,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
