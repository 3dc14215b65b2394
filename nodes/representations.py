"""Nodes of representations that are maps: sketch, instance map, intensity and region."""

from __future__ import annotations

from comfy_api.latest import io

from ..compositions import sketch as sketches
from ..compositions.instance_map import CODINGS, OWN, coded, instance_map
from ..compositions.intensity import DEFAULT_WEIGHTS, WEIGHTS, intensity
from ..compositions.region import Region, grown
from ..subjects.instances import read_nouns
from ..subjects.masks import as_mask, fit_mask
from .types import DetectionsSocket, InstancesSocket, Node, one_picture, preview

CATEGORY = "ConceptLoom/Composer"
CONTOURS, CANNY, PROVIDED = "contours", "canny", "provided"


class Sketch(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomSketch",
            display_name="Sketch",
            category=CATEGORY,
            description="A sketch with white strokes on black, found in a picture without a network, or from any edge "
            "picture.",
            search_aliases=["Composer", "edges", "canny", "scribble", "lineart", "contours", "invert sketch"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("image", tooltip="One picture, or one of edges from any detector."),
                io.Combo.Input(
                    "method",
                    options=[CONTOURS, CANNY, PROVIDED],
                    default=CONTOURS,
                    tooltip="contours: the dark side of edges. canny: thin edges. provided: the picture is a sketch "
                    "already.",
                ),
                io.Combo.Input(
                    "polarity",
                    options=list(sketches.POLARITIES),
                    default=sketches.AUTO,
                    tooltip="Of a provided sketch. auto takes the rarer of black and white for the strokes.",
                ),
                io.Boolean.Input(
                    "simplify", default=False, tooltip="Removes specks, closes small gaps and thins the strokes."
                ),
                io.Int.Input(
                    "stroke",
                    default=1,
                    min=1,
                    max=8,
                    advanced=True,
                    tooltip="Width of simplified strokes: 2 n - 1 pixels.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="White strokes on black."),
                io.Mask.Output(display_name="mask", tooltip="The same as a mask."),
            ],
        )

    @classmethod
    def execute(cls, image, method, polarity, simplify, stroke) -> io.NodeOutput:
        picture = one_picture(image)
        if method == PROVIDED:
            found = sketches.as_sketch(picture, polarity)
        else:
            found = sketches.canny(picture) if method == CANNY else sketches.contours(picture)
        if simplify:
            found = sketches.simplified(found, width=stroke)
        shown = found[..., None].expand(-1, -1, 3)
        return io.NodeOutput(shown[None], found[None], ui=preview(cls, shown))


class InstanceMap(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomInstanceMap",
            display_name="Instance Map",
            category=CATEGORY,
            description="Which thing is where, from masks and their nouns; and the map as a picture in the colors of "
            "a model.",
            search_aliases=["Composer", "segmentation", "ADE20K", "seg map", "instances", "controlnet seg"],
            has_intermediate_output=True,
            inputs=[
                io.Mask.Input("masks", tooltip="A batch, white on one thing each. Smaller things are in front."),
                io.String.Input(
                    "nouns",
                    default="",
                    tooltip='What they show, in their order: "cup, table". Leave it empty with detections.',
                ),
                io.Combo.Input(
                    "coding",
                    options=list(CODINGS),
                    default=OWN,
                    tooltip="Colors of the picture. composition: a hue for each noun. ADE20K: for ControlNets of "
                    "segments. grays: a level for each thing.",
                ),
                DetectionsSocket.Input(
                    "detections", optional=True, tooltip="From Text to Masks, where the masks come from it."
                ),
            ],
            outputs=[
                InstancesSocket.Output("instances", tooltip="For Decompose Image."),
                io.Image.Output(display_name="image", tooltip="The map in the chosen colors."),
            ],
        )

    @classmethod
    def execute(cls, masks, nouns, coding, detections=None) -> io.NodeOutput:
        if nouns.strip() and detections is not None:
            raise ValueError(f"nouns: expected none with detections, which say them, got {nouns.strip()!r}")
        wanted = read_nouns(nouns) if nouns.strip() else []
        name = "nouns" if detections is None else "detections"
        if detections is not None:
            wanted = list(detections.entries)
        given = masks if masks.ndim == 3 else masks[None]
        if len(wanted) not in (0, len(given)):
            raise ValueError(f"{name}: expected one for each of {len(given)} masks, got {len(wanted)}")
        found = instance_map(given, [one.noun for one in wanted] or [""] * len(given))
        shown = coded(found, coding)
        return io.NodeOutput(found, shown[None], ui=preview(cls, shown))


class Intensity(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomIntensity",
            display_name="Intensity",
            category=CATEGORY,
            description="A picture in gray, with a choice of weights for red, green and blue.",
            search_aliases=["Composer", "grayscale", "greyscale", "luminance", "recolor", "colorize"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("image", tooltip="Pictures."),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHTS),
                    default=DEFAULT_WEIGHTS,
                    tooltip="Of red, green and blue. Rec. 601 is what most models for recoloring were trained with.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The pictures in gray.")],
        )

    @classmethod
    def execute(cls, image, weights) -> io.NodeOutput:
        gray = intensity(image, WEIGHTS[weights])[..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(gray, ui=preview(cls, gray[0]))


class RegionMask(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomRegionMask",
            display_name="Region Mask",
            category=CATEGORY,
            description="The part of a picture that stays, with a gray hole where it is to be drawn anew.",
            search_aliases=["Composer", "inpaint", "hole", "masked image", "grow mask"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("image", tooltip="One picture."),
                io.Mask.Input("mask", tooltip="White where it is to be drawn anew."),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=-256,
                    max=256,
                    tooltip="How far the mask reaches further, in pixels; less far, if negative.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture with its hole."),
                io.Mask.Output(display_name="mask", tooltip="The mask, black or white, for Decompose Image."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, grow) -> io.NodeOutput:
        picture = one_picture(image)[..., :3]
        found = Region(picture, grown(fit_mask(as_mask(mask), picture.shape[:2]), grow))
        return io.NodeOutput(found.shown[None], found.mask[None], ui=preview(cls, found.shown))


NODES: list[type[Node]] = [Sketch, InstanceMap, Intensity, RegionMask]
