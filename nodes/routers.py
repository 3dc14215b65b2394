"""Nodes that bring single representations to what consumes them today."""

from __future__ import annotations

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..compositions.composition import MASK
from ..encoders.coadapter import KINDS, STYLE
from ..host.composer import coadapter, consumers
from .types import (
    CoAdapterConditionSocket,
    CoAdapterFuserSocket,
    CompositionSocket,
    Node,
    growing,
    in_order,
    one_picture,
    window_inputs,
)

CATEGORY = "ConceptLoom/Composer"
CONTROLNETS = "controlnet"


class ApplyRepresentation(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomApplyRepresentation",
            display_name="Apply Representation (ControlNet)",
            category=CATEGORY,
            description="Gives one representation of a composition to a ControlNet or T2I-Adapter, in its convention, "
            "with the strength and the part of the schedule that the composition says. Chain it for several.",
            search_aliases=["Composer", "controlnet", "t2i adapter", "apply controlnet", "depth", "scribble"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                CompositionSocket.Input("composition", tooltip="From Decompose Image."),
                io.ControlNet.Input("control_net", tooltip="One for the chosen representation."),
                io.Combo.Input(
                    "representation",
                    options=list(consumers.HINTS),
                    tooltip="For which ControlNets. sketch: scribble, lineart and sketch. depth: depth. instances: "
                    "segmentation with the colors of ADE20K. intensity: recoloring and brightness. mask: inpainting. "
                    "palette: color and shuffle.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="For ControlNets that need one."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the ControlNet."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the ControlNet."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, composition, control_net, representation, vae=None) -> io.NodeOutput:
        made = consumers.apply_control(positive, negative, composition, representation, control_net, vae)
        return io.NodeOutput(*made)


class CompositionSemantics(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomCompositionSemantics",
            display_name="Composition Semantics",
            category=CATEGORY,
            description="The semantics of a composition, interpolated ones too, for unCLIPConditioning and Apply Style "
            "Model.",
            search_aliases=["Composer", "unclip", "style model", "image variation", "clip vision"],
            inputs=[CompositionSocket.Input("composition", tooltip="One with semantics.")],
            outputs=[io.ClipVisionOutput.Output(tooltip="As CLIP Vision Encode gives it.")],
        )

    @classmethod
    def execute(cls, composition) -> io.NodeOutput:
        return io.NodeOutput(consumers.vision_output(composition))


class CompositionImages(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomCompositionImages",
            display_name="Composition Images",
            category=CATEGORY,
            description="The representations of a composition as pictures, in the conventions of ControlNets, for any "
            "node. Nodes connected to an absent one do not run.",
            search_aliases=["Composer", "hints", "preprocessor", "composition to images"],
            inputs=[CompositionSocket.Input("composition", tooltip="From Decompose Image.")],
            outputs=[
                *(
                    io.Image.Output(id=name, display_name=name, tooltip=tooltip)
                    for name, tooltip in (
                        ("sketch", "White strokes on black."),
                        ("depth", "Near is white."),
                        ("instances", "Segments in the colors of ADE20K."),
                        ("intensity", "The picture in gray."),
                        ("palette", "Its main colors as tiles in random places."),
                    )
                ),
                io.Image.Output(
                    id="picture",
                    display_name="picture",
                    tooltip="With a mask, the picture that is drawn anew in parts.",
                ),
                io.Mask.Output(id="mask", display_name="mask", tooltip="White where it is drawn anew."),
            ],
        )

    @classmethod
    def execute(cls, composition) -> io.NodeOutput:
        def hint(name: str):
            return consumers.hint_of(composition, name) if name in composition else ExecutionBlocker(None)

        region = composition.get(MASK)
        parts = [ExecutionBlocker(None)] * 2 if region is None else [region.image[None], region.mask[None]]
        return io.NodeOutput(*map(hint, ("sketch", "depth", "instances", "intensity", "palette")), *parts)


class LoadCoAdapterFuser(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadCoAdapterFuser",
            display_name="Load CoAdapter Fuser",
            category=CATEGORY,
            description="Loads the fuser of CoAdapter (coadapter-fuser-sd15v1), through which T2I-Adapters that are "
            "used together see one another.",
            search_aliases=["CoAdapter", "t2i adapter", "fuser", "multi adapter"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(CONTROLNETS),
                    tooltip="A file in models/controlnet or models/t2i_adapter.",
                )
            ],
            outputs=[CoAdapterFuserSocket.Output("fuser", tooltip="For Apply CoAdapter.")],
        )

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(coadapter.load(folder_paths.get_full_path_or_raise(CONTROLNETS, file)))


class CoAdapterCondition(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomCoAdapterCondition",
            display_name="CoAdapter Condition",
            category=CATEGORY,
            description="One adapter with its hint, for Apply CoAdapter.",
            search_aliases=["CoAdapter", "t2i adapter"],
            inputs=[
                io.ControlNet.Input("control_net", tooltip="A CoAdapter or T2I-Adapter for Stable Diffusion 1.5."),
                io.Image.Input("image", tooltip="Its hint: a sketch with white strokes, a depth map, colors."),
                io.Combo.Input(
                    "kind",
                    options=[kind for kind in KINDS if kind != STYLE],
                    tooltip="What the adapter was trained on.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="How strongly it acts; 0.5 to 1.5 is recommended. Add conditions one at a time.",
                ),
            ],
            outputs=[CoAdapterConditionSocket.Output("condition", tooltip="For Apply CoAdapter.")],
        )

    @classmethod
    def execute(cls, control_net, image, kind, weight) -> io.NodeOutput:
        return io.NodeOutput(coadapter.Condition(kind, control_net, one_picture(image)[None, ..., :3], weight))


class ApplyCoAdapter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomApplyCoAdapter",
            display_name="Apply CoAdapter",
            category=CATEGORY,
            description="Several T2I-Adapters, and a style, as one control: the fuser weighs each of them by all.",
            search_aliases=["CoAdapter", "t2i adapter", "multi control", "Composer", "style adapter"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Conditioning.Input("negative", tooltip="The negative prompt."),
                CoAdapterFuserSocket.Input("fuser", tooltip="From Load CoAdapter Fuser."),
                growing(
                    "conditions",
                    CoAdapterConditionSocket.Input("condition", tooltip="From CoAdapter Condition."),
                    tooltip="The adapters with their hints, each of another kind.",
                    maximum=8,
                ),
                *window_inputs("Where in the schedule the control begins.", "Where in the schedule it stops."),
                io.Float.Input(
                    "style_weight", default=1.0, min=0.0, max=2.0, step=0.05, tooltip="How strongly the style acts."
                ),
                io.StyleModel.Input("style_model", optional=True, tooltip="The style CoAdapter."),
                io.ClipVisionOutput.Input(
                    "style",
                    optional=True,
                    tooltip="The style picture, from CLIP Vision Encode or Composition Semantics.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The prompt with the control."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the control."),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        fuser,
        conditions,
        start_percent,
        end_percent,
        style_weight,
        style_model=None,
        style=None,
    ) -> io.NodeOutput:
        if (style_model is None) != (style is None):
            name = "style" if style is None else "style_model"
            raise ValueError(f"{name}: expected both style_model and style, or neither, got one of them")
        tokens = None
        if style is not None and getattr(style, "last_hidden_state", None) is None:
            raise ValueError("style: expected one with the tokens of a vision tower, got semantics without them")
        if style_model is not None and style_weight:
            tokens = style_model.get_cond(style).flatten(0, 1)[None] * style_weight
        given = in_order(conditions, "conditions", "CoAdapter Condition") if tokens is None or conditions else []
        made = coadapter.apply(fuser, given, positive, negative, tokens, start_percent, end_percent)
        return io.NodeOutput(*made)


NODES: list[type[Node]] = [
    ApplyRepresentation,
    CompositionSemantics,
    CompositionImages,
    LoadCoAdapterFuser,
    CoAdapterCondition,
    ApplyCoAdapter,
]
