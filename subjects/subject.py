"""A subject: something that is to appear in a picture, with everything that the systems know about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from .masks import as_mask, check_aspect

DEFAULT_WEIGHT = 3.0
"""The published one, for Stable Diffusion."""
MAX_WEIGHT = 10.0
"""Largest weight. e^10 in attention odds already outweighs everything else, and logits stay safe in half precision."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One subject, the same for every system.

    Compared and hashed by identity: two subjects with equal content are still two subjects.

    Attributes:
        image: reference picture, (H, W, 3), values 0..1.
        noun: what the subject is called in a prompt ("dog").
        mask: (H', W'), 1 on the subject, with the image's aspect ratio; None means the whole picture.
        prompt: describes the reference picture; if empty, made from the noun.
        weight: how strongly the subject is used, 0..10; 0 switches it off.
        target_mask: (h, w), where in the new picture the subject may appear; None means anywhere.
        encodings: results of encoders, by the encoder's name.

    Raises:
        ValueError: an attribute has a wrong shape or range, holds non-finite values, or is an empty mask or noun.
    """

    image: torch.Tensor
    noun: str
    mask: torch.Tensor | None = None
    prompt: str = ""
    weight: float = DEFAULT_WEIGHT
    target_mask: torch.Tensor | None = None
    encodings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        image = self.image
        if image.ndim != 3 or image.shape[-1] not in (3, 4) or 0 in image.shape:
            raise ValueError(f"image: expected one color picture (height, width, 3), got {tuple(image.shape)}")
        if not torch.isfinite(image).all():
            raise ValueError("image: expected finite values, got NaN or infinity")
        noun = self.noun.strip()
        if not noun:
            raise ValueError("noun: expected a word for the subject (such as dog), got an empty text")
        if not 0.0 <= self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight: expected a number from 0 (off) to {MAX_WEIGHT:g}, got {self.weight:g}")
        mask = None if self.mask is None else as_mask(self.mask)
        if mask is not None:
            remedy = (
                "paint the subject with the mask brush of Load Image's mask editor (its paint brush colors the "
                "picture), or remove the wire to use the whole picture"
            )
            _check_white(mask, "mask", "the subject", remedy)
            check_aspect(mask, tuple(image.shape[:2]))
        target_mask = None if self.target_mask is None else as_mask(self.target_mask, name="target_mask")
        if target_mask is not None:
            remedy = "paint it, or remove the wire to let the subject appear anywhere"
            _check_white(target_mask, "target_mask", "the subject's place in the new picture", remedy)
        object.__setattr__(self, "image", image[..., :3])
        object.__setattr__(self, "noun", noun)
        object.__setattr__(self, "mask", mask)
        object.__setattr__(self, "target_mask", target_mask)
        object.__setattr__(self, "prompt", self.prompt.strip() or describe(noun))
        object.__setattr__(self, "encodings", MappingProxyType(dict(self.encodings)))

    def with_encoding(self, encoder: str, value: Any) -> Subject:
        """The same subject with `value`, the result of `encoder`, added."""
        return replace(self, encodings={**self.encodings, encoder: value})


def _check_white(mask: torch.Tensor, name: str, where: str, remedy: str) -> None:
    if not (mask > 0).any():
        raise ValueError(f"{name}: expected white on {where}, got an empty mask (all black): {remedy}")


def describe(noun: str) -> str:
    """The prompt for a reference picture of which only the noun is known: "a dog", "an owl"."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
