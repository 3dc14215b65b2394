"""The file that Load FastComposer reads: fuser, trained vision layers, and the UNet or its LoRA. A run may start with
the fuser in such a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...encoders.fastcomposer import FUSER, UNET, VISION, split
from ...encoders.files import read_state, whole_file
from ...encoders.fuser import Fuser

_PUBLISHED = {"fuser": FUSER, "vision": VISION, "unet": UNET}
_FACTORS = {".lora_A.default.weight": "lora_down", ".lora_B.default.weight": "lora_up"}


def export(trained: Mapping[str, torch.Tensor], path: Path, dtype: torch.dtype) -> None:
    """Writes trained weights, named as in `FastComposer.trainables`, as safetensors. They have the published names,
    except the factors of a LoRA: lora_unet_<diffusers' name with underscores>.lora_up.weight and so on."""
    state = {}
    for name, tensor in trained.items():
        part, _, rest = name.partition(".")
        ending = next((e for e in _FACTORS if rest.endswith(e)), None)
        if ending is None:
            key = _PUBLISHED[part] + rest
        else:
            layer = "lora_unet_" + rest.removesuffix(ending).replace(".", "_")
            key = f"{layer}.{_FACTORS[ending]}.weight"
            if _FACTORS[ending] == "lora_down":
                # Alpha over rank is the factors' scale, which is 1 in training.
                state[f"{layer}.alpha"] = torch.tensor(float(len(tensor)), dtype=dtype)
        state[key] = tensor.detach().to("cpu", dtype).contiguous()
    with whole_file(path) as part:
        save_file(state, part, metadata={"format": "pt"})


def start_from(fuser: Fuser, path: Path) -> None:
    """Gives a fuser the weights of the one in a file.

    Raises ValueError if it is not a file of weights, or holds no fuser of these widths.
    """
    wanted = f"--fuser: expected a file with a fuser of widths {fuser.text_width} and {fuser.image_width}"
    state = read_state(path, "--fuser")
    try:
        found = Fuser.from_state(split(state)[FUSER])
    except ValueError as error:
        raise ValueError(f"{wanted}, got {path.name} ({error})") from error
    if (found.text_width, found.image_width) != (fuser.text_width, fuser.image_width):
        raise ValueError(f"{wanted}, got {path.name} with {found.text_width} and {found.image_width}")
    fuser.load_state_dict(found.state_dict())
