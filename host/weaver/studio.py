"""Trains a concept for a user: with class pictures, a progress bar, previews and a plot of the loss."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch

from ...encoders.concepts import Concept
from ...subjects.partition import Partition
from ...training.concepts.learner import Recipe
from ...training.concepts.pictures import Pictures
from ..model.sampling import sample
from ..progress import PREVIEW_STEPS, Progress, loss_picture, training_folder
from . import fusion, training
from .prompts import encode_text
from .weights import Weights

STEPS = 25
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
    base, caption = Weights.of(model).fingerprint(), pictures.captions[0]
    kind = [base, class_word, placeholder, asdict(recipe), side, class_pictures, list(pictures.captions)]
    folder = training_folder(checkpoints, kind, pictures, model, clip, vae.first_stage_model)
    progress, prior = Progress(recipe.steps, preview_every), None
    if class_pictures:
        text = caption.replace("{}", class_word)
        prior = draw_class(model, clip, text, class_pictures, side // vae.spacial_compression_encode(), recipe.seed)

    def report(step: int, loss: float, concept_now) -> None:
        progress.after(step, loss, lambda: draw_concept(model, clip, vae, concept_now(), caption, side, recipe.seed))

    concept = training.train(model, clip, vae, pictures, class_word, placeholder, recipe, side, prior, report, folder)
    said = progress.sentence(concept.name, recipe.batch_size)
    return replace(concept, base=base), loss_picture(progress.losses), said


def draw_class(model, clip, text: str, count: int, cells: int, seed: int) -> torch.Tensor:
    """Generates latents (count, C, cells, cells) of pictures of a class with the model."""
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (text, ""))
    batches = [
        sample(model, positive, negative, cells, seed + first, STEPS, min(AT_ONCE, count - first))
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
    return vae.decode(sample(drawing, positive, empty, cells, seed, PREVIEW_STEPS))[0, ..., :3]
