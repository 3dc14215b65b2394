"""Loads weights files for ComfyUI's models."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
import torch

from ...encoders.files import SAFETENSORS, check, read_state, state_of


def load_state(path: Path | str, name: str = "file") -> dict[str, torch.Tensor]:
    """Loads the tensors of a weights file by name.

    Safetensors are read by ComfyUI, whose memory management can load such weights from disk when they are needed. They
    are checked first, because ComfyUI's errors are not written for users.

    Args:
        path: the file.
        name: name of the node input, for error messages.

    Raises:
        ValueError: the file is not a weights file, is incomplete, or does not map names to tensors.
    """
    path = Path(path)
    # ComfyUI recognizes formats by the file extension.
    if check(path, name) == SAFETENSORS and path.suffix.lower() in (".safetensors", ".sft"):
        return state_of(comfy.utils.load_torch_file(str(path), safe_load=True), path, name)
    return read_state(path, name)
