"""The pictures that a concept is trained on, and their views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...encoders.concept_texts import Name
from ...encoders.words import check_word
from ...subjects.masks import as_mask, check_aspect
from ...subjects.pictures import middle_square
from .augment import NONE, View, augment
from .learner import Recipe

VIEWS = 32
"""Views of each picture, if it is augmented; they are encoded once, before training, and no more are made than a
training sees."""


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of a concept.

    Attributes:
        images: (H, W, 3) each, in [0, 1].
        masks: (H', W') for each image, or None if the whole picture counts.
        captions: one for all, or one for each image; {} stands for the concept.

    Raises:
        ValueError: there is no picture, or masks or captions do not fit.
    """

    images: Sequence[torch.Tensor]
    masks: Sequence[torch.Tensor | None]
    captions: Sequence[str]

    def __post_init__(self):
        if not self.images:
            raise ValueError("images: expected at least one picture, got none")
        if len(self.masks) != len(self.images):
            raise ValueError(f"masks: expected one for each of {len(self.images)} pictures, got {len(self.masks)}")
        for number, (image, mask) in enumerate(self.pairs, 1):
            if mask is not None:
                shown = as_mask(mask, f"masks: mask {number}")
                check_aspect(shown, tuple(image.shape[:2]), f"masks: mask {number}")
                if not shown.any():
                    raise ValueError(f"masks: mask {number}: expected white on what is learned, got an empty one")
                if not middle_square(shown).any():
                    raise ValueError(
                        f"masks: mask {number}: expected white in the middle square of its picture, which is what is "
                        "seen, got it beside that; crop the picture"
                    )
        if len(self.captions) not in (1, len(self.images)):
            raise ValueError(
                f"captions: expected one line, or one for each of {len(self.images)} pictures, got {len(self.captions)}"
            )
        for caption in self.captions:
            if caption.count("{}") != 1:
                raise ValueError(f"captions: expected {{}} exactly once, in the place of its word, got {caption!r}")

    @property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Each image with its mask."""
        return list(zip(self.images, self.masks, strict=True))

    def views(self, recipe: Recipe, side: int) -> list[tuple[View, str]]:
        """The views (side, side) that a training sees, with their captions."""
        asked = -(-recipe.steps * recipe.batch_size // len(self.images))
        times = 1 if recipe.augmentation == NONE else min(VIEWS, asked)
        generator = torch.Generator().manual_seed(recipe.seed)
        views = []
        for _ in range(times):
            for i, (image, mask) in enumerate(self.pairs):
                view = augment(image, mask, side, recipe.augmentation, generator)
                views.append((view, view.prefix + self.captions[i % len(self.captions)]))
        return views


def name_of(class_word: str, placeholder: str, recipe: Recipe) -> Name:
    """The names of the concept.

    Raises:
        ValueError: the class word is empty, or the placeholder is not one word.
    """
    if not class_word.strip():
        raise ValueError("class_word: expected what kind of thing the concept is (such as dog), got an empty text")
    name = Name(class_word.strip(), placeholder.strip() if recipe.new_word else "")
    if recipe.new_word:
        check_word(name.placeholder, "placeholder")
    return name


def called(caption: str, name: Name) -> str:
    """A caption with the concept's words in place of {}."""
    return caption.replace("{}", " ".join(filter(None, (name.placeholder, name.class_word))))
