"""Socket types of the pack, and how nodes read what comes through them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from comfy_api.latest import io, ui

from ..attention.subject import Subject

PREVIEW_SIDE = 256

SubjectSocket = io.Custom("CONCEPTLOOM_SUBJECT")
FuserSocket = io.Custom("CONCEPTLOOM_FUSER")
ShareRecordSocket = io.Custom("CONCEPTLOOM_SHARE_RECORD")
ConceptSocket = io.Custom("CONCEPTLOOM_CONCEPT")
ConceptPromptsSocket = io.Custom("CONCEPTLOOM_CONCEPT_PROMPTS")
PartitionSocket = io.Custom("CONCEPTLOOM_PARTITION")
SegmenterSocket = io.Custom("CONCEPTLOOM_SEGMENTER")
TrajectorySocket = io.Custom("CONCEPTLOOM_TRAJECTORY")


@contextmanager
def speaking_for(node: type[io.ComfyNode]) -> Iterator[None]:
    """Puts the node's name before the sentence of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{node.GET_SCHEMA().display_name}: {error}") from error


def subject_inputs(tooltip: str, minimum: int = 1, maximum: int = 16) -> io.Autogrow.Input:
    """Any number of SUBJECT inputs; a wire may carry several subjects."""
    one = SubjectSocket.Input("subject", tooltip="A subject from Reference Subject, or several from Concept Collage.")
    template = io.Autogrow.TemplatePrefix(one, prefix="subject", min=minimum, max=maximum)
    return io.Autogrow.Input("subjects", template=template, tooltip=tooltip)


def gather_subjects(subjects: io.Autogrow.Type) -> list[Subject]:
    """All subjects in the order of their sockets."""
    gathered: list[Subject] = []
    for name in sorted(subjects, key=lambda name: int(name.removeprefix("subject"))):
        value = subjects[name]
        if value is not None:
            gathered.extend((value,) if isinstance(value, Subject) else value)
    return gathered


def one_picture(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """The picture (H, W, C) of an IMAGE (1, H, W, C).

    Raises:
        ValueError: it is a batch of several.
    """
    if image.ndim != 4 or len(image) != 1:
        given = f"a batch of {len(image)}" if image.ndim == 4 else f"a tensor of shape {tuple(image.shape)}"
        raise ValueError(f"{name}: one picture is wanted, not {given}")
    return image[0]


def preview(node: type[io.ComfyNode], picture: torch.Tensor) -> ui.PreviewImage:
    """A picture (H, W, 3) shown on its node; small ones enlarged without blur, for the classic renderer shows pixels
    at their own size."""
    times = max(1, PREVIEW_SIDE // max(picture.shape[:2]))
    enlarged = picture.repeat_interleave(times, 0).repeat_interleave(times, 1)
    return ui.PreviewImage(enlarged[None], cls=node)
