"""The file that Load FastComposer reads: fuser, trained vision layers, and the UNet or its LoRA."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

# The names of the published checkpoint.
_PUBLISHED = {"fuser": "postfuse_module", "vision": "image_encoder", "unet": "unet"}
_FACTORS = {".lora_A.default.weight": "lora_down", ".lora_B.default.weight": "lora_up"}


def export(trained: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    """Writes trained weights, by the names of `Composer.trainables`, as safetensors: all under the published names but
    the LoRA's factors, which stand as lora_unet_<diffusers' name with underscores>.lora_up.weight and the like."""
    state = {}
    for name, tensor in trained.items():
        part, _, rest = name.partition(".")
        ending = next((e for e in _FACTORS if rest.endswith(e)), None)
        if ending is None:
            key = f"{_PUBLISHED[part]}.{rest}"
        else:
            layer = "lora_unet_" + rest.removesuffix(ending).replace(".", "_")
            key = f"{layer}.{_FACTORS[ending]}.weight"
            if _FACTORS[ending] == "lora_down":
                # Alpha over rank is the factors' scale, 1 as they were trained.
                state[f"{layer}.alpha"] = torch.tensor(float(len(tensor)), dtype=dtype)
        state[key] = tensor.detach().to("cpu", dtype).contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(state, part, metadata={"format": "pt"})
    os.replace(part, path)
