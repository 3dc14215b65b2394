"""Trains a concept for a user: with class pictures, a progress bar, previews and a plot of the loss."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import comfy.sample
import comfy.utils
import torch

from ...encoders.concepts import Concept
from ...encoders.files import checked_folder
from ...subjects.partition import Partition
from ...training.concepts.learner import Recipe
from ...training.concepts.pictures import Pictures
from . import fusion, training
from .prompts import encode_text
from .weights import Weights

SAMPLER, SCHEDULER, CFG = "euler", "normal", 5.0
STEPS, PREVIEW_STEPS = 25, 12
AT_ONCE = 4
"""Number of class pictures in a batch."""


def train_with_progress(
    model,
    clip,
    vae,
    pictures: Pictures,
    class_word: str,
    placeholder: str,
    recipe: Recipe,
    side: int,
    class_pictures: int = 0,
    preview_every: int = 0,
    checkpoints: Path | None = None,
) -> tuple[Concept, torch.Tensor, str]:
    """Trains a concept under ComfyUI's progress bar.

    Args:
        model, clip, vae, pictures, class_word, placeholder, recipe, side: see `training.train`.
        class_pictures: number of pictures of the class that the model generates beforehand, as a prior.
        preview_every: steps between two previews; 0 shows none.
        checkpoints: folder for the checkpoint from which this training can continue; None keeps no checkpoint.

    Returns:
        The concept, a plot of the loss (H, W, 3), and a sentence about the training.

    Raises:
        ValueError: raised by `training.train`, or the folder cannot be written.
    """
    training.check(vae, class_word, placeholder, recipe, side)
    if checkpoints is not None:
        checked_folder(checkpoints)
    began = time.monotonic()
    caption = pictures.captions[0]
    progress = comfy.utils.ProgressBar(recipe.steps)
    losses: list[float] = []
    prior = None
    if class_pictures:
        text = caption.replace("{}", class_word)
        prior = draw_class(model, clip, text, class_pictures, side // vae.spacial_compression_encode(), recipe.seed)

    def report(step: int, loss: float, concept_now) -> None:
        losses.append(loss)
        shown = None
        if preview_every and step and step % preview_every == 0:
            with torch.inference_mode():
                shown = draw_concept(model, clip, vae, concept_now(), caption, side, recipe.seed)
        progress.update_absolute(step + 1, recipe.steps, None if shown is None else _as_preview(shown))

    base = Weights.of(model).fingerprint()
    kind = [base, class_word, placeholder, asdict(recipe), side, class_pictures, list(pictures.captions)]
    folder = checkpoints and checkpoints / _training_name(kind, pictures)
    concept = training.train(model, clip, vae, pictures, class_word, placeholder, recipe, side, prior, report, folder)
    seconds = time.monotonic() - began
    said = f"{concept.name}: {len(losses)} steps of {recipe.batch_size} pictures in {seconds:.0f} s"
    if len(losses) < recipe.steps:
        said += f", continued at step {recipe.steps - len(losses)}"
    return replace(concept, base=base), loss_picture(losses), said


def draw_class(model, clip, text: str, count: int, cells: int, seed: int) -> torch.Tensor:
    """Generates latents (count, C, cells, cells) of pictures of a class with the model."""
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (text, ""))
    batches = [
        _sample(model, positive, negative, cells, seed + first, STEPS, min(AT_ONCE, count - first))
        for first in range(0, count, AT_ONCE)
    ]
    return torch.cat(batches)


def draw_concept(model, clip, vae, concept: Concept, caption: str, side: int, seed: int) -> torch.Tensor:
    """Generates a quick picture (side, side, 3) with a concept everywhere."""
    text = caption.replace("{}", f"{concept.placeholder} {concept.class_word}".strip())
    prompted = fusion.PromptedConcept(concept, encode_text(clip, text, concept))
    everywhere = Partition(torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]))
    settings = fusion.FusionSettings(suppression=0.0)
    drawing, positive = fusion.apply(model, prompted.conditioning, [prompted], everywhere, settings)
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    cells = side // vae.spacial_compression_encode()
    return vae.decode(_sample(drawing, positive, empty, cells, seed, PREVIEW_STEPS))[0, ..., :3]


def _sample(model, positive: list, negative: list, cells: int, seed: int, steps: int, count: int = 1) -> torch.Tensor:
    empty = torch.zeros(count, model.model.latent_format.latent_channels, cells, cells)
    noise = comfy.sample.prepare_noise(empty, seed)
    return comfy.sample.sample(
        model, noise, steps, CFG, SAMPLER, SCHEDULER, positive, negative, empty, disable_pbar=True, seed=seed
    )


def _as_preview(picture: torch.Tensor) -> tuple:
    """A picture (H, W, 3) in the form of ComfyUI's progress bar; small pictures are enlarged."""
    from PIL import Image

    image = Image.fromarray((picture.clamp(0, 1) * 255).round().byte().cpu().numpy())
    times = max(1, 256 // max(image.size))
    return "JPEG", image.resize((image.width * times, image.height * times), Image.NEAREST), None


def _training_name(kind: list, pictures: Pictures) -> str:
    """Name that identifies a training by its inputs, so that no training continues another's checkpoint."""
    digest = hashlib.sha256(json.dumps(kind).encode())
    for tensor in (*pictures.images, *(mask for mask in pictures.masks if mask is not None)):
        digest.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return f"training-{digest.hexdigest()[:16]}"


def loss_picture(losses: Sequence[float], width: int = 512, height: int = 256) -> torch.Tensor:
    """Plots the losses of a training, (height, width, 3): each step in grey, the running mean in a dark colour."""
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
    for curve, colour, line in ((values, "#c8c8c8", 1), (mean, "#303060", 2)):
        xs = torch.linspace(8, width - 8, len(curve)).tolist()
        ys = (height - 8 - (curve / top).clamp(max=1) * (height - 16)).tolist()
        draw.line(list(zip(xs, ys, strict=True)), fill=colour, width=line)
    draw.text((12, 8), f"{len(values)} steps, mean of the last {window}: {float(mean[-1]):.4f}", fill="black")
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(height, width, 3).float() / 255
