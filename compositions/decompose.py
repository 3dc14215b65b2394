"""Takes pictures apart. No network runs here: what one has found comes in as an embedding, a map or masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..subjects.masks import fit_mask, same_aspect
from ..subjects.pictures import resized_strokes
from ..subjects.subject import Subject
from .composition import (
    CAPTION,
    DEPTH,
    INSTANCES,
    INTENSITY,
    MASK,
    PALETTE,
    SEMANTICS,
    SKETCH,
    Caption,
    Composition,
    Part,
)
from .depth import normalized_depth
from .instance_map import InstanceMap, instance_map
from .intensity import WEIGHTS
from .intensity import intensity as intensity_of
from .palette import Palette, palette_of_picture
from .region import Region
from .semantics import Semantics
from .sketch import AUTO, as_sketch


def decompose(
    image: torch.Tensor,
    caption: str = "",
    semantics: Semantics | None = None,
    palette: Palette | None = None,
    sketch: torch.Tensor | None = None,
    polarity: str = AUTO,
    instances: InstanceMap | None = None,
    depth: torch.Tensor | None = None,
    intensity: str | None = None,
    mask: torch.Tensor | None = None,
    depth_is_distance: bool = False,
) -> Composition:
    """The composition of a picture (H, W, 3) in [0, 1] of the representations that are given. Maps are brought to its
    size.

    Args:
        caption: what the picture shows; empty for no caption.
        semantics, palette, instances: see their classes.
        sketch: (H', W', C), strokes.
        polarity: of the sketch, see `sketch.as_sketch`.
        depth: (H', W', C), larger where it is near; with `depth_is_distance` where it is far.
        intensity: the name of its weights, of `intensity.WEIGHTS`; None for no intensity.
        mask: (H', W'), 1 where the picture is to be drawn anew.

    Raises:
        ValueError: something cannot be used; the message names it.
    """
    if not torch.isfinite(image).all():
        raise ValueError("image: expected finite values, got NaN or infinity")
    image, size = image[..., :3].float().clamp(0, 1), (image.shape[0], image.shape[1])
    given = {SKETCH: sketch, DEPTH: depth, INSTANCES: None if instances is None else instances.labels}
    for name, map_ in given.items():
        if map_ is not None and not same_aspect(map_.shape, size):
            raise ValueError(
                f"{name}: expected the shape of the picture ({size[1]}x{size[0]}), got {map_.shape[1]}x{map_.shape[0]}"
            )
    strokes = None if sketch is None else resized_strokes(as_sketch(sketch, polarity)[None, None], size)[0, 0]
    near = None if depth is None else normalized_depth(fit_plane(depth, size), depth_is_distance)
    parts = {
        CAPTION: Caption(((caption.strip(), 1.0),)) if caption.strip() else None,
        SEMANTICS: semantics,
        PALETTE: palette,
        SKETCH: strokes,
        INSTANCES: None if instances is None else _fit_labels(instances, size),
        DEPTH: near,
        INTENSITY: None if intensity is None else intensity_of(image, WEIGHTS[intensity]),
        MASK: None if mask is None else Region(image, fit_mask(mask, size)),
    }
    for name, what, found in ((SKETCH, "strokes", strokes), (DEPTH, "near and far", near)):
        if found is not None and found.max() == found.min():
            raise ValueError(f"{name}: expected a picture with {what}, got one that is the same everywhere")
    return Composition(size, {name: Part(value) for name, value in parts.items() if value is not None}, image)


def decompose_subject(subject: Subject, semantics: Semantics | None = None, sigma: float = 10.0) -> Composition:
    """The composition of a subject: its prompt, its shape as an instance of its noun, its picture's semantics if they
    are given, and the colors inside its mask."""
    size = (subject.image.shape[0], subject.image.shape[1])
    mask = torch.ones(size)
    if subject.mask is not None:
        mask = fit_mask(subject.mask, size)
    parts = {
        CAPTION: Part(Caption(((subject.prompt, 1.0),))),
        PALETTE: Part(palette_of_picture(subject.image, mask, sigma=sigma)),
        INSTANCES: Part(instance_map(mask[None], [subject.noun])),
    }
    if semantics is not None:
        parts[SEMANTICS] = Part(semantics)
    return Composition(size, parts, subject.image)


def subject_of(composition: Composition, noun: str, weight: float = 3.0) -> Subject:
    """The subject that a composition shows: its picture, and the mask of the thing that is called `noun`.

    Raises:
        ValueError: there is no picture, or no such thing.
    """
    instances = composition.get(INSTANCES)
    if composition.picture is None or instances is None:
        what = "a picture" if composition.picture is None else "instances"
        raise ValueError(f"composition: expected one with {what}, got one without; connect Decompose Image with them")
    noun = noun.strip() or (instances.names[0] if instances.names else "")
    if not noun:
        raise ValueError("noun: expected the name of a thing, got an empty text for one that has none")
    numbers = [number for number, name in enumerate(instances.names) if name.lower() == noun.lower()]
    if not numbers:
        known = ", ".join(name for name in instances.names if name) or "none with a name"
        raise ValueError(f"noun: expected one of the composition's things ({known}), got {noun!r}")
    mask = instances.mask(numbers[0])
    if not mask.any():
        raise ValueError(f"noun: expected a thing that can be seen, got {noun!r}, which others cover")
    caption = composition.get(CAPTION)
    text = caption.texts[0][0] if caption and noun.lower() in caption.texts[0][0].lower() else ""
    return Subject(composition.picture, noun, mask, text, weight)


def _fit_labels(instances: InstanceMap, size: tuple[int, int]) -> InstanceMap:
    labels = F.interpolate(instances.labels[None, None].float(), size, mode="nearest-exact")[0, 0]
    return InstanceMap(labels.round().int(), instances.names)


def fit_plane(picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map (H', W', C), whose channels are averaged, at another size (H, W); values keep their range."""
    plane = picture[..., :3].float().mean(-1)
    if tuple(plane.shape) == size:
        return plane
    return F.interpolate(plane[None, None], size, mode="bilinear", antialias=True)[0, 0]
