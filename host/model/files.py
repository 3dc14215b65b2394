"""Files of weights for the host's models."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
import torch

from ...encoders.files import SAFETENSORS, check, read_state, state_of


def load_state(path: Path | str, name: str = "file") -> dict[str, torch.Tensor]:
    """The tensors of a file by name. Safetensors are read by the host, whose memory management can take such weights
    from the disk when they are needed; they are checked before, since the host's errors are not for users.

    Args:
        path: of the file.
        name: the input that errors name.

    Raises:
        ValueError: it is no file of weights, not whole, or holds other things than tensors by name.
    """
    path = Path(path)
    # The host knows files by their endings.
    if check(path, name) == SAFETENSORS and path.suffix.lower() in (".safetensors", ".sft"):
        return state_of(comfy.utils.load_torch_file(str(path), safe_load=True), path, name)
    return read_state(path, name)
