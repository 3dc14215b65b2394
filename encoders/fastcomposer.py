"""The format of FastComposer's weights: the published flat state dict, and files with a part of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

UNET, TEXT, VISION, FUSER, VAE = "unet.", "text_encoder.", "image_encoder.", "postfuse_module.", "vae."
PREFIXES = (UNET, TEXT, VISION, FUSER, VAE)
LORA = "lora"
"""The part with low-rank factors for the UNet, whose tensors keep the names that LoRA loaders read."""
_LORA_NAMES = ("lora_unet_", "diffusion_model.")
# Top-level names of a UNet that diffusers saved by itself.
_BARE_UNET = ("conv_in.", "time_embedding.", "down_blocks.", "mid_block.", "up_blocks.", "conv_norm_out.", "conv_out.")

State = dict[str, torch.Tensor]


def split(state: Mapping[str, torch.Tensor]) -> dict[str, State]:
    """A file's tensors by part (PREFIXES and LORA), without the part's prefix.

    The published file's position ids are left out, because they are constants. A UNet saved by itself counts as UNET.

    Raises:
        ValueError: a tensor belongs to no part, or there are no tensors.
    """
    parts: dict[str, State] = {name: {} for name in (*PREFIXES, LORA)}
    for key, tensor in state.items():
        if key.endswith("position_ids"):
            continue
        prefix = next((p for p in PREFIXES if key.startswith(p)), None)
        if prefix is not None:
            parts[prefix][key.removeprefix(prefix)] = tensor
        elif key.startswith(_BARE_UNET):
            parts[UNET][key] = tensor
        elif key.startswith(_LORA_NAMES):
            parts[LORA][key] = tensor
        else:
            raise ValueError(f"file: expected a FastComposer checkpoint or a part of one, got one with {key!r}")
    if not any(parts.values()):
        raise ValueError("file: expected a FastComposer checkpoint or a part of one, got an empty file")
    return parts


def trained_layers(vision: Mapping[str, torch.Tensor]) -> State:
    """The last two layers of the vision tower, the only ones that FastComposer trained."""
    number = {key: int(key.split(".layers.")[1].split(".")[0]) for key in vision if ".layers." in key}
    last = max(number.values(), default=0)
    return {key: vision[key] for key, layer in number.items() if layer >= last - 1}
