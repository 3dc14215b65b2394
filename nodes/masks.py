"""Nodes that determine where each concept goes: Load Segmenter, Text to Masks and Concept Masks.

A segmenter has its own loader node, like all models: it stays loaded while nouns and pictures change, and Text to Masks
is the same for every segmenter. The partition has its own socket type. Plain masks would fit a mask input too, but they
can overlap, while the weights of a partition add up to 1.
"""

from __future__ import annotations

from pathlib import Path

import folder_paths
import torch
from comfy_api.latest import io

from ..host.segmenting import boxes, segmenters
from ..subjects.instances import ABSENT, ERROR
from ..subjects.partition import OVERLAPS, SMALLER_IN_FRONT, Partition, assemble, picture
from .types import (
    DetectionsSocket,
    Node,
    PartitionSocket,
    SegmenterSocket,
    growing,
    in_order,
    one_picture,
    preview,
    register_folder,
)

CATEGORY = "ConceptLoom/Concept Weaver"
DETECTORS, SAMS = "grounding-dino", "sams"
SAM3, TEXT_BOXES, DRAWN_BOXES, SHAPELAND = "SAM3", "Grounding DINO + SAM", "boxes + SAM", "Shapeland judge"

for _folder in (DETECTORS, SAMS):
    register_folder(_folder, Path(folder_paths.models_dir) / _folder)


def _threshold(default: float) -> io.Float.Input:
    return io.Float.Input(
        "threshold",
        default=default,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Lowest score that counts. Lower it when something is missed; of what is found the best is taken.",
    )


def _sam() -> io.Combo.Input:
    return io.Combo.Input(
        "sam",
        options=folder_paths.get_filename_list(SAMS),
        tooltip="In models/sams: the weights of SAM or SAM 2 in a folder as transformers saves it, or a checkpoint "
        "such as sam_vit_b_01ec64.pth, which needs the package segment-anything.",
    )


class LoadSegmenter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadSegmenter",
            display_name="Load Segmenter",
            category=CATEGORY,
            description="Loads a model that finds things by their nouns, for Text to Masks and Photo to Subject, from "
            "files that you have.",
            search_aliases=["SAM", "SAM3", "Grounding DINO", "segment anything", "lang-sam", "detector"],
            inputs=[
                io.DynamicCombo.Input(
                    "kind",
                    options=[
                        io.DynamicCombo.Option(
                            SAM3,
                            [
                                io.Model.Input("model", tooltip="SAM3 or SAM3.1, from Load Checkpoint."),
                                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
                                _threshold(0.5),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            TEXT_BOXES,
                            [
                                io.Combo.Input(
                                    "detector",
                                    options=folder_paths.get_filename_list(DETECTORS),
                                    tooltip="The weights of Grounding DINO in a folder of models/grounding-dino, with "
                                    "config, tokenizer and preprocessor beside them, as transformers saves it.",
                                ),
                                _sam(),
                                _threshold(0.3),
                            ],
                        ),
                        io.DynamicCombo.Option(
                            DRAWN_BOXES,
                            [
                                io.MultiType.Input(
                                    "boxes",
                                    [io.BoundingBoxes, io.BoundingBox],
                                    tooltip="Around the things, in pixels of the picture: one per noun, in order.",
                                ),
                                _sam(),
                            ],
                        ),
                        io.DynamicCombo.Option(SHAPELAND, []),
                    ],
                    tooltip="SAM3: the best; needs its checkpoint. Grounding DINO + SAM: closest to the paper. boxes "
                    "+ SAM: you say where. Shapeland judge: for pictures of the small model that ships with the pack; "
                    "needs no file.",
                )
            ],
            outputs=[SegmenterSocket.Output("segmenter", tooltip="For Text to Masks and Photo to Subject.")],
        )

    @classmethod
    def execute(cls, kind) -> io.NodeOutput:
        return io.NodeOutput(_LOADERS[kind["kind"]](kind))


def _path(folder: str, file: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(folder, file))


_LOADERS = {
    SAM3: lambda chosen: segmenters.Sam3(chosen["model"], chosen["clip"], chosen["threshold"]),
    TEXT_BOXES: lambda chosen: segmenters.Boxes(
        boxes.GroundingDino(_path(DETECTORS, chosen["detector"]), chosen["threshold"]),
        boxes.load_cutter(_path(SAMS, chosen["sam"])),
    ),
    DRAWN_BOXES: lambda chosen: segmenters.Boxes(
        segmenters.GivenBoxes(chosen["boxes"]), boxes.load_cutter(_path(SAMS, chosen["sam"]))
    ),
    SHAPELAND: lambda chosen: segmenters.ShapelandJudge(),
}


class TextToMasks(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomTextToMasks",
            display_name="Text to Masks",
            category=CATEGORY,
            description="Finds the things that nouns name in a picture: one mask per noun, in their order.",
            search_aliases=[
                "segment by text",
                "SAM",
                "Grounding DINO",
                "detect",
                "lang-sam",
                "mask by word",
                "mask by text",
                "text to mask",
                "clipseg",
            ],
            has_intermediate_output=True,
            inputs=[
                SegmenterSocket.Input("segmenter", tooltip="From Load Segmenter."),
                io.Image.Input("image", tooltip="The picture to look at, such as the template of Concept Weaver."),
                io.String.Input(
                    "nouns",
                    default="",
                    multiline=True,
                    tooltip='What to find, separated by commas or lines: "dog, cat". Of several dogs the one with the '
                    "highest score is taken; dog#2 is the second from the left, dog#all all of them in one mask.",
                ),
                io.Combo.Input(
                    "absent",
                    options=list(ABSENT),
                    default=ERROR,
                    tooltip="What to do when something is not found: stop with an error, give an empty mask, so that "
                    "its place is background, or a mask of the whole frame.",
                ),
            ],
            outputs=[
                io.Mask.Output("masks", tooltip="One mask per noun."),
                DetectionsSocket.Output("detections", tooltip="The nouns with their scores, for Concept Masks."),
                io.String.Output("report", tooltip="A line per noun with its score from 0 to 1; 0 was not found."),
            ],
        )

    @classmethod
    def execute(cls, segmenter, image, nouns, absent) -> io.NodeOutput:
        masks, detections, seen = segmenters.text_to_masks(segmenter, one_picture(image), nouns, absent)
        return io.NodeOutput(masks, detections, str(detections), ui=preview(cls, seen))


class ConceptMasks(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomConceptMasks",
            display_name="Concept Masks",
            category=CATEGORY,
            description="Divides the picture among concepts and background, so that their weights add up to 1 "
            "everywhere: masks grow a little, and where they meet the original ones decide.",
            search_aliases=["partition", "regional prompt", "mask concepts", "grow mask", "regions", "two characters"],
            has_intermediate_output=True,
            inputs=[
                growing(
                    "masks",
                    io.Mask.Input("mask", tooltip="White on a concept; a batch holds several concepts."),
                    tooltip="The masks of the concepts, in the order of the concepts. An empty one leaves its concept "
                    "out; not all may be empty.",
                ),
                io.Float.Input(
                    "dilation",
                    default=0.03,
                    min=0.0,
                    max=0.25,
                    step=0.005,
                    tooltip="How far masks grow, as a share of the picture's shorter side: room for a shape other than "
                    "the template's. 0 keeps them as they are.",
                ),
                io.Float.Input(
                    "feather",
                    default=0.0,
                    min=0.0,
                    max=0.25,
                    step=0.005,
                    tooltip="Width over which neighbors blend, as a share of the shorter side. 0 gives hard borders, "
                    "which a layer's coarse grid softens by itself.",
                ),
                io.Combo.Input(
                    "overlap",
                    options=list(OVERLAPS),
                    default=SMALLER_IN_FRONT,
                    advanced=True,
                    tooltip="Which mask gets the pixels where two overlap: the smaller one, the one of higher score, "
                    "or the later one.",
                ),
                DetectionsSocket.Input(
                    "detections",
                    optional=True,
                    tooltip="From Text to Masks, where all masks come from it: Multi-Concept Fusion then warns when a "
                    "mask shows another kind of thing than its concept, and the one of higher score can be in front.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="Shown under the colors of the preview; with the masks' aspect ratio.",
                ),
            ],
            outputs=[
                PartitionSocket.Output("partition", tooltip="Where each concept goes, for Concept Weaver."),
                io.Mask.Output("masks", tooltip="The same as masks: one per concept, the background last."),
            ],
        )

    @classmethod
    def execute(cls, masks, dilation, feather, overlap, detections=None, image=None) -> io.NodeOutput:
        scores, names = None, ()
        if detections is not None:
            scores, names = detections.scores, tuple(entry.noun for entry in detections.entries)
        weights = assemble(_gather(masks), dilation, feather, overlap, scores)
        seen = picture(weights, None if image is None else one_picture(image))
        return io.NodeOutput(Partition(weights, names), weights, ui=preview(cls, seen))


def _gather(masks: io.Autogrow.Type) -> list[torch.Tensor]:
    """All masks, (H, W) each, in the order of their inputs; raises ValueError if there are none."""
    batches = in_order(masks, "masks", "Text to Masks or a mask of each concept")
    return [mask for batch in batches for mask in batch.reshape(-1, *batch.shape[-2:])]


NODES: list[type[Node]] = [LoadSegmenter, TextToMasks, ConceptMasks]
