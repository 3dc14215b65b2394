"""Nodes of compositions: take pictures and subjects apart, look at what was found, and keep it."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..compositions import files
from ..compositions.decompose import decompose, decompose_subject, subject_of
from ..compositions.intensity import DEFAULT_WEIGHTS, WEIGHTS
from ..compositions.palette import palette_of_picture
from ..compositions.semantics import Semantics
from ..compositions.sheet import contact_sheet
from ..compositions.sketch import AUTO, POLARITIES, WHITE_ON_BLACK, contours
from ..encoders.files import free_file
from ..subjects.masks import as_mask
from ..subjects.subject import MAX_WEIGHT
from .types import (
    CompositionSocket,
    InstancesSocket,
    Node,
    PaletteSocket,
    SubjectSocket,
    one_picture,
    own_places,
    preview,
    register_folder,
    stamp,
)

CATEGORY = "ConceptLoom/Composer"
FOLDER = "compositions"

register_folder(FOLDER, *own_places(FOLDER))


def look(clip_vision, image) -> Semantics | None:
    """The semantics of a picture (H, W, 3), if there is a vision tower."""
    if clip_vision is None:
        return None
    seen = clip_vision.encode_image(image[None, ..., :3])
    return Semantics(seen["image_embeds"][0], seen["last_hidden_state"][0])


class DecomposeImage(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomDecomposeImage",
            display_name="Decompose Image",
            category=CATEGORY,
            description="Takes a picture apart into up to eight representations: caption, semantics, palette, sketch, "
            "instances, depth, intensity and mask (Composer). Apart from the connected CLIP vision model, no network "
            "runs.",
            search_aliases=["Composer", "decomposition", "representations", "sketch", "palette", "depth", "style"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("image", tooltip="One picture."),
                io.String.Input(
                    "caption",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What it shows; empty for none.",
                ),
                io.Boolean.Input(
                    "take_palette", default=True, tooltip="Takes the picture's palette, unless one is connected."
                ),
                io.Boolean.Input(
                    "take_sketch", default=True, tooltip="Takes the picture's contours, unless a sketch is connected."
                ),
                io.Boolean.Input("take_intensity", default=True, tooltip="Takes the picture in gray."),
                io.Combo.Input(
                    "intensity_weights",
                    options=list(WEIGHTS),
                    default=DEFAULT_WEIGHTS,
                    advanced=True,
                    tooltip="Of red, green and blue in the intensity.",
                ),
                io.Boolean.Input(
                    "depth_is_distance",
                    default=False,
                    advanced=True,
                    tooltip="The connected depth is a distance in any unit, above 0: larger where it is far.",
                ),
                io.Combo.Input(
                    "sketch_polarity",
                    options=list(POLARITIES),
                    default=AUTO,
                    advanced=True,
                    tooltip="Of the connected sketch. auto takes the rarer of black and white for the strokes; choose "
                    "white on black for one from Sketch with more strokes than ground.",
                ),
                io.ClipVision.Input(
                    "clip_vision", optional=True, tooltip="A vision tower, for the semantics (meaning and style)."
                ),
                PaletteSocket.Input("palette", optional=True, tooltip="From Palette, in place of the picture's own."),
                io.Image.Input("sketch", optional=True, tooltip="From Sketch, or any picture of edges."),
                InstancesSocket.Input("instances", optional=True, tooltip="From Instance Map."),
                io.Image.Input("depth", optional=True, tooltip="From any depth node; near is white."),
                io.Mask.Input("mask", optional=True, tooltip="White where the picture is to be drawn anew."),
            ],
            outputs=[
                CompositionSocket.Output("composition", tooltip="All that was found, for the nodes of Composer."),
                io.String.Output(display_name="report", tooltip="What was found."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image,
        caption,
        take_palette,
        take_sketch,
        take_intensity,
        intensity_weights,
        depth_is_distance,
        sketch_polarity,
        clip_vision=None,
        palette=None,
        sketch=None,
        instances=None,
        depth=None,
        mask=None,
    ) -> io.NodeOutput:
        picture = one_picture(image)
        if palette is None and take_palette:
            palette = palette_of_picture(picture)
        drawn, polarity = None if sketch is None else one_picture(sketch, "sketch"), sketch_polarity
        if drawn is None and take_sketch and (own := contours(picture)).any():
            drawn, polarity = own[..., None].expand(-1, -1, 3), WHITE_ON_BLACK
        found = decompose(
            picture,
            caption,
            look(clip_vision, picture),
            palette,
            drawn,
            polarity,
            instances,
            None if depth is None else one_picture(depth, "depth"),
            intensity_weights if take_intensity else None,
            None if mask is None else as_mask(mask),
            depth_is_distance,
        )
        return io.NodeOutput(found, str(found), ui=preview(cls, contact_sheet(found)))


class DecomposeSubject(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomDecomposeSubject",
            display_name="Decompose Subject",
            category=CATEGORY,
            description="The composition of a subject: its prompt, its shape, its colors, and with a vision tower its "
            "semantics.",
            search_aliases=["Composer", "subject to composition", "try-on"],
            has_intermediate_output=True,
            inputs=[
                SubjectSocket.Input("subject", tooltip="One subject."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="A vision tower, for the semantics."),
            ],
            outputs=[CompositionSocket.Output("composition", tooltip="What is known of the subject.")],
        )

    @classmethod
    def execute(cls, subject, clip_vision=None) -> io.NodeOutput:
        if isinstance(subject, (list, tuple)):
            if len(subject) != 1:
                raise ValueError(f"subject: expected one subject, got {len(subject)}")
            (subject,) = subject
        found = decompose_subject(subject, look(clip_vision, subject.image))
        return io.NodeOutput(found, ui=preview(cls, contact_sheet(found)))


class CompositionSubject(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomCompositionSubject",
            display_name="Composition Subject",
            category=CATEGORY,
            description="A thing of a composition as a subject, for the other systems.",
            search_aliases=["Composer", "composition to subject", "reference subject"],
            inputs=[
                CompositionSocket.Input("composition", tooltip="One with instances, from Decompose Image."),
                io.String.Input("noun", default="", tooltip="Which thing; empty for the first."),
                io.Float.Input(
                    "weight",
                    default=3.0,
                    min=0.0,
                    max=MAX_WEIGHT,
                    step=0.1,
                    tooltip="How strongly the subject is used, as in Reference Subject.",
                ),
            ],
            outputs=[SubjectSocket.Output("subject", tooltip="The thing with its picture, mask and noun.")],
        )

    @classmethod
    def execute(cls, composition, noun, weight) -> io.NodeOutput:
        return io.NodeOutput(subject_of(composition, noun, weight))


class InspectComposition(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomInspectComposition",
            display_name="Inspect Composition",
            category=CATEGORY,
            description="Shows all representations of a composition on one sheet, and says what they are.",
            search_aliases=["Composer", "contact sheet", "preview", "debug"],
            is_output_node=True,
            inputs=[CompositionSocket.Input("composition", tooltip="A composition.")],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The representations side by side."),
                io.String.Output(display_name="report", tooltip="A line for each."),
            ],
        )

    @classmethod
    def execute(cls, composition) -> io.NodeOutput:
        sheet = contact_sheet(composition)
        return io.NodeOutput(sheet[None], str(composition), ui=preview(cls, sheet))


class SaveComposition(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomSaveComposition",
            display_name="Save Composition",
            category=CATEGORY,
            description="Writes a composition as safetensors, for Load Composition.",
            search_aliases=["Composer", "export", "safetensors"],
            is_output_node=True,
            inputs=[
                CompositionSocket.Input("composition", tooltip="A composition, with the picture it was taken from."),
                io.String.Input(
                    "filename",
                    default="composition",
                    tooltip="Name of the new file in output/compositions, without extension; a number follows where "
                    "it is taken.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The written file and its size.")],
        )

    @classmethod
    def execute(cls, composition, filename) -> io.NodeOutput:
        file = free_file(Path(folder_paths.get_output_directory()) / FOLDER, filename)
        files.save(composition, file)
        report = f"{FOLDER}/{file.name}: {file.stat().st_size / 2**20:.1f} MiB\n{composition}"
        return io.NodeOutput(report, ui={"text": (report,)})


class LoadComposition(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadComposition",
            display_name="Load Composition",
            category=CATEGORY,
            description="Reads a composition that Save Composition wrote.",
            search_aliases=["Composer", "import", "safetensors"],
            has_intermediate_output=True,
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in models/compositions or output/compositions.",
                )
            ],
            outputs=[
                CompositionSocket.Output("composition", tooltip="The composition."),
                io.String.Output(display_name="report", tooltip="What is in it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return stamp(folder_paths.get_full_path(FOLDER, file))

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        found = files.load(folder_paths.get_full_path_or_raise(FOLDER, file))
        return io.NodeOutput(found, str(found), ui=preview(cls, contact_sheet(found)))


NODES: list[type[Node]] = [
    DecomposeImage,
    DecomposeSubject,
    CompositionSubject,
    InspectComposition,
    SaveComposition,
    LoadComposition,
]
