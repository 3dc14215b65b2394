"""The pack's socket types, and functions that read inputs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..host.advice import withdraw_earlier
from ..subjects.pictures import in_color
from ..subjects.subject import Subject
from ..training.concepts.pictures import Pictures

PREVIEW_SIDE = 256

CUSTOM_BLOCKS = "custom list"
"""Choice of blocks by their numbers."""

SubjectSocket = io.Custom("CONCEPTLOOM_SUBJECT")
FuserSocket = io.Custom("CONCEPTLOOM_FUSER")
PromptNetSocket = io.Custom("CONCEPTLOOM_PROMPTNET")
ShareRecordSocket = io.Custom("CONCEPTLOOM_SHARE_RECORD")
ConceptSocket = io.Custom("CONCEPTLOOM_CONCEPT")
ConceptPromptsSocket = io.Custom("CONCEPTLOOM_CONCEPT_PROMPTS")
PartitionSocket = io.Custom("CONCEPTLOOM_PARTITION")
DetectionsSocket = io.Custom("CONCEPTLOOM_DETECTIONS")
SegmenterSocket = io.Custom("CONCEPTLOOM_SEGMENTER")
CompositionSocket = io.Custom("CONCEPTLOOM_COMPOSITION")
CoAdapterFuserSocket = io.Custom("CONCEPTLOOM_COADAPTER_FUSER")
CoAdapterConditionSocket = io.Custom("CONCEPTLOOM_COADAPTER_CONDITION")
ComposerAdapterSocket = io.Custom("CONCEPTLOOM_COMPOSER_ADAPTER")
PriorSocket = io.Custom("CONCEPTLOOM_CAPTION_PRIOR")
PaletteSocket = io.Custom("CONCEPTLOOM_PALETTE")
InstancesSocket = io.Custom("CONCEPTLOOM_INSTANCES")
TrajectorySocket = io.Custom("CONCEPTLOOM_TRAJECTORY")


class Node(io.ComfyNode):
    """Base class of all nodes. It puts the node's name before the message of a ValueError in `execute`, and removes old
    advice from the node.

    ComfyUI runs `execute` on a locked copy of the class, so the name comes from a new schema.
    """

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        execute = vars(cls)["execute"].__func__
        if not hasattr(execute, "__wrapped__"):  # ComfyUI's copies of a node are subclasses too
            cls.execute = classmethod(_with_name(execute))


def _with_name(execute: Callable[..., io.NodeOutput]) -> Callable[..., io.NodeOutput]:
    @wraps(execute)
    def named(cls, *args, **inputs):
        withdraw_earlier()
        try:
            return execute(cls, *args, **inputs)
        except ValueError as error:
            raise ValueError(f"{cls.define_schema().display_name}: {error}") from error

    return named


ADVISES_LATER = {"not_idempotent": True}
"""For the schema of a node whose MODEL gives advice during sampling. ComfyUI then does not use the cached MODEL of
another node with the same inputs, so that the advice is shown on the right node."""


def growing(id: str, one: io.Input, tooltip: str, maximum: int = 16) -> io.Autogrow.Input:
    """An input that grows with every connection. `in_order` requires at least one.

    `min` is 0, because otherwise ComfyUI would ask for "subjects.subject0", a name that the node does not show, even
    if another one is connected.
    """
    return io.Autogrow.Input(id, io.Autogrow.TemplatePrefix(one, prefix=one.id, min=0, max=maximum), tooltip=tooltip)


def in_order(sockets: io.Autogrow.Type, name: str, source: str) -> list:
    """Returns the values of a growing input from the first to the last, without empty ones.

    Raises:
        ValueError: all are empty. The message contains `name`, the input's, and `source`, what to connect to it.
    """
    names = sorted(sockets, key=lambda socket: int(re.search(r"\d+$", socket)[0]))
    found = [sockets[socket] for socket in names if sockets[socket] is not None]
    if not found:
        raise ValueError(f"{name}: expected at least one, got none; connect {source}")
    return found


def subject_inputs(tooltip: str) -> io.Autogrow.Input:
    """Any number of SUBJECT inputs, each with one or more subjects."""
    one = SubjectSocket.Input("subject", tooltip="A subject from Reference Subject, or several from Concept Collage.")
    return growing("subjects", one, tooltip)


def window_inputs(start: str, end: str) -> list[io.Input]:
    """The inputs start_percent and end_percent, with their tooltips."""
    return [
        io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)
        for name, default, tooltip in (("start_percent", 0.0, start), ("end_percent", 1.0, end))
    ]


def gather_subjects(subjects: io.Autogrow.Type, source: str = "Reference Subject") -> list[Subject]:
    """Returns all subjects in the order of their inputs.

    Raises:
        ValueError: there is none. The message contains `source`, what to connect.
    """
    found = in_order(subjects, "subjects", source)
    return [subject for value in found for subject in ((value,) if isinstance(value, Subject) else value)]


def register_folder(name: str, *places: Path | str) -> None:
    """Registers a model folder with ComfyUI, with its usual file extensions.

    If a user's extra_model_paths.yaml or another pack has already registered the folder, their paths come first.
    """
    known, endings = folder_paths.folder_names_and_paths.get(name, ([], set()))
    folder_paths.folder_names_and_paths[name] = (
        list(dict.fromkeys([*known, *map(str, places)])),
        {*endings, *folder_paths.supported_pt_extensions},
    )


def own_places(name: str) -> tuple[Path, ...]:
    """Paths of one of the pack's model folders: in ComfyUI's models and output, and the files shipped for Shapeland."""
    shipped = Path(__file__).resolve().parents[1] / "shapeland" / "weights"
    return tuple(Path(root) / name for root in (folder_paths.models_dir, folder_paths.get_output_directory(), shipped))


def stamp(path: str | None) -> list[int] | None:
    """What changes when a file is replaced: its time and size; None if there is no file. ComfyUI keeps a node's outputs
    while its inputs, such as a file's name, are the same."""
    if path is None:
        return None
    found = Path(path).stat()
    return [found.st_mtime_ns, found.st_size]


def one_picture(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """Returns the picture (H, W, C) of an IMAGE (1, H, W, C); one channel becomes three.

    Raises:
        ValueError: it is a batch of several.
    """
    if image.ndim != 4 or len(image) != 1:
        given = f"a batch of {len(image)}" if image.ndim == 4 else f"a tensor of shape {tuple(image.shape)}"
        raise ValueError(f"{name}: expected one picture, got {given}")
    return image[0].expand(-1, -1, 3) if image.shape[-1] == 1 else image[0]


def training_pictures(images: torch.Tensor, masks: torch.Tensor | None, captions: str) -> Pictures:
    """The pictures (n, H, W, C) of a training with their masks, and a caption on each line of `captions`.

    Raises:
        ValueError: masks or captions do not fit.
    """
    return Pictures(
        list(in_color(images)),
        [None] * len(images) if masks is None else list(masks),
        [line.strip() for line in captions.splitlines() if line.strip()],
    )


def preview(node: type[io.ComfyNode], picture: torch.Tensor) -> ui.PreviewImage:
    """Shows a picture (H, W, 3) on its node. Small pictures are enlarged without interpolation, because the classic
    renderer shows pixels at their own size."""
    times = max(1, PREVIEW_SIDE // max(picture.shape[:2]))
    # ComfyUI converts it with numpy, which does not support bfloat16.
    enlarged = picture.float().repeat_interleave(times, 0).repeat_interleave(times, 1)
    return ui.PreviewImage(enlarged[None], cls=node)
