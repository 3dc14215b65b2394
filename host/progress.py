"""What a user sees of a training in ComfyUI: a progress bar with previews, a plot of the loss, and a sentence."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.utils
import comfy.weight_adapter
import torch

from ..encoders.files import checked_folder
from ..training.concepts.pictures import Pictures

PREVIEW_STEPS = 12
"""Steps in which a preview is sampled."""


class Progress:
    """The progress of one training.

    Args:
        steps: of the training.
        preview_every: steps between two previews; 0 shows none.
    """

    def __init__(self, steps: int, preview_every: int):
        self.steps, self.preview_every = steps, preview_every
        self.losses: list[float] = []
        self._bar, self._began = comfy.utils.ProgressBar(steps), time.monotonic()

    def after(self, step: int, loss: float, draw: Callable[[], torch.Tensor]) -> None:
        """Notes a step, given by its index, and its loss; `draw` gives a preview (H, W, 3) if it is time for one."""
        self.losses.append(loss)
        shown = None
        if self.preview_every and step and step % self.preview_every == 0:
            with torch.inference_mode():
                shown = draw()
        self._bar.update_absolute(step + 1, self.steps, None if shown is None else _as_preview(shown))

    def sentence(self, name: str, batch_size: int) -> str:
        """The steps and the time of the training of what is called `name`."""
        seconds, done = time.monotonic() - self._began, len(self.losses)
        said = f"{name}: {done} steps of {batch_size} pictures in {seconds:.0f} s"
        return said if done == self.steps else f"{said}, continued at step {self.steps - done}"


def training_folder(
    folder: Path | None, kind: list, pictures: Pictures, model, clip, *networks: torch.nn.Module
) -> Path | None:
    """The place in `folder` for the checkpoint of a training with the inputs `kind`, these pictures, these networks,
    and the patches of the MODEL and the CLIP, such as LoRAs, and of no other one; None if there is no folder.

    Raises:
        ValueError: the folder cannot be written.
    """
    if folder is None:
        return None
    checked_folder(folder)
    kind = [*kind, _summary(model.patches), _summary(clip.patcher.patches), clip.layer_idx]
    kind += [_sign(network) for network in (clip.cond_stage_model, *networks)]
    digest = hashlib.sha256(json.dumps(kind).encode())
    for tensor in (*pictures.images, *(mask for mask in pictures.masks if mask is not None)):
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return folder / f"training-{digest.hexdigest()[:16]}"


def _sign(network: torch.nn.Module) -> list[float]:
    """What tells a network from another one: the sums of its norms and biases. On the CPU, for sums differ from device
    to device."""
    return [float(one.cpu().float().sum()) for one in network.state_dict().values() if one.ndim == 1]


def _summary(patches: Any) -> Any:
    """Patches of ComfyUI as plain values: of a tensor its sum."""
    if torch.is_tensor(patches):
        return float(patches.float().sum())
    if isinstance(patches, dict):
        return sorted([str(key), _summary(value)] for key, value in patches.items())
    if isinstance(patches, (list, tuple)):
        return [_summary(value) for value in patches]
    if isinstance(patches, comfy.weight_adapter.WeightAdapterBase):
        return [patches.name, _summary(patches.weights)]
    return patches if isinstance(patches, (str, int, float, type(None))) else str(type(patches))


def _as_preview(picture: torch.Tensor) -> tuple:
    """A picture (H, W, 3) in the form of ComfyUI's progress bar; small pictures are enlarged."""
    from PIL import Image

    image = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())
    times = max(1, 256 // max(image.size))
    return "JPEG", image.resize((image.width * times, image.height * times), Image.NEAREST), None


def loss_picture(losses: Sequence[float], width: int = 512, height: int = 256) -> torch.Tensor:
    """Plots the losses of a training, (height, width, 3): each step in gray, the running mean in a dark color."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    if not losses:  # resumed after its last step
        return torch.ones(height, width, 3)
    values = torch.tensor(losses)
    window = max(1, len(values) // 20)
    padded = torch.cat((values[:1].expand(window - 1), values))
    mean = padded.unfold(0, window, 1).mean(1)
    top = float(values.quantile(0.98)) or 1.0
    for curve, color, line in ((values, "#c8c8c8", 1), (mean, "#303060", 2)):
        xs = torch.linspace(8, width - 8, len(curve)).tolist()
        ys = (height - 8 - (curve / top).clamp(max=1) * (height - 16)).tolist()
        draw.line(list(zip(xs, ys, strict=True)), fill=color, width=line)
    draw.text((12, 8), f"{len(values)} steps, mean of the last {window}: {float(mean[-1]):.4f}", fill="black")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3).float() / 255
