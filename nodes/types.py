"""Socket types of the pack, and how nodes read what comes through them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import folder_paths
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


def in_order(sockets: io.Autogrow.Type) -> list:
    """What is on the sockets of a growing input, from the first to the last; empty ones are left out."""
    names = sorted(sockets, key=lambda name: int(re.search(r"\d+$", name)[0]))
    return [sockets[name] for name in names if sockets[name] is not None]


def gather_subjects(subjects: io.Autogrow.Type) -> list[Subject]:
    """All subjects in the order of their sockets."""
    return [s for value in in_order(subjects) for s in ((value,) if isinstance(value, Subject) else value)]


def register_folder(name: str, *places: Path | str) -> None:
    """Makes a folder of models known to the host, with its usual endings, at these places.

    A user's extra_model_paths.yaml or another pack may have named the folder already; theirs comes first.
    """
    known, endings = folder_paths.folder_names_and_paths.get(name, ([], set()))
    folder_paths.folder_names_and_paths[name] = (
        list(dict.fromkeys([*known, *map(str, places)])),
        {*endings, *folder_paths.supported_pt_extensions},
    )


def own_places(name: str) -> tuple[Path, ...]:
    """Where models of a kind of ours lie: the host's models and output, and what the pack brings for Shapeland."""
    shipped = Path(__file__).resolve().parents[1] / "shapeland" / "weights"
    return tuple(Path(root) / name for root in (folder_paths.models_dir, folder_paths.get_output_directory(), shipped))


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
    # The host makes bytes of it by numpy, which knows no bfloat16.
    enlarged = picture.float().repeat_interleave(times, 0).repeat_interleave(times, 1)
    return ui.PreviewImage(enlarged[None], cls=node)
