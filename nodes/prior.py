"""Nodes of the prior, which finds semantics for a caption."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io

from ..compositions.composition import CAPTION, NO_CANVAS, SEMANTICS, Caption, Composition
from ..host.composer import prior as host
from .types import CompositionSocket, Node, PriorSocket, own_places, register_folder, stamp

CATEGORY = "ConceptLoom/Composer"
FOLDER = "caption_priors"

register_folder(FOLDER, *own_places(FOLDER))


class LoadCaptionPrior(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadCaptionPrior",
            display_name="Load Caption Prior",
            category=CATEGORY,
            description="Loads a prior, which finds semantics for a caption (unCLIP), in the format of diffusers.",
            search_aliases=["Composer", "unclip prior", "Karlo", "Kandinsky prior", "dalle 2"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in models/caption_priors or output/caption_priors.",
                )
            ],
            outputs=[PriorSocket.Output("prior", tooltip="For Caption Prior.")],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return stamp(folder_paths.get_full_path(FOLDER, file))

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(host.load(folder_paths.get_full_path_or_raise(FOLDER, file)))


class CaptionPrior(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomCaptionPrior",
            display_name="Caption Prior",
            category=CATEGORY,
            description="Semantics that a picture of a caption may have, others for each seed: more variety than the "
            "caption alone gives.",
            search_aliases=["Composer", "unclip", "text to embedding", "variation"],
            inputs=[
                PriorSocket.Input("prior", tooltip="From Load Caption Prior."),
                io.Clip.Input("clip", tooltip="The text encoder that the prior was trained with, with its projection."),
                io.String.Input(
                    "caption", default="", multiline=True, dynamic_prompts=True, tooltip="What the picture is to show."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the semantics.",
                ),
                io.Int.Input("steps", default=25, min=1, max=1000, tooltip="Of the prior; 100 are published."),
                io.Float.Input(
                    "guidance",
                    default=3.0,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How closely the semantics follow the caption; 1 for no guidance.",
                ),
            ],
            outputs=[
                CompositionSocket.Output(
                    "composition", tooltip="The caption and its semantics, to be merged with what else there is."
                )
            ],
        )

    @classmethod
    def execute(cls, prior, clip, caption, seed, steps, guidance) -> io.NodeOutput:
        if not caption.strip():
            raise ValueError("caption: expected what the picture is to show, got an empty text")
        (semantics,) = host.draw(prior, clip, caption, 1, seed, steps, guidance)
        found = Composition(NO_CANVAS).with_part(CAPTION, Caption(((caption.strip(), 1.0),)))
        return io.NodeOutput(found.with_part(SEMANTICS, semantics))


NODES: list[type[Node]] = [LoadCaptionPrior, CaptionPrior]
