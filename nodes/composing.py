"""Nodes that make new compositions of others: pick, merge, align and interpolate."""

from __future__ import annotations

from comfy_api.latest import io

from ..compositions.composition import (
    CROP,
    FIRST,
    FITS,
    MAX_STRENGTH,
    NAMES,
    POLICIES,
    REFUSE,
    SECOND,
    align,
    interpolate,
    merge,
    pick,
)
from ..compositions.sheet import contact_sheet
from .types import CompositionSocket, Node, preview, window_inputs

CATEGORY = "ConceptLoom/Composer"


class PickRepresentations(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomPickRepresentations",
            display_name="Pick Representations",
            category=CATEGORY,
            description="Some of a composition's representations, with a strength and a part of the schedule for them. "
            "Those that are not picked are absent.",
            search_aliases=["Composer", "select", "filter", "strength"],
            inputs=[
                CompositionSocket.Input("composition", tooltip="From Decompose Image."),
                *(io.Boolean.Input(name, default=False, tooltip=f"Picks the {name}.") for name in NAMES),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How strongly what is picked acts: 1 as trained, 0 picks nothing. The tokens of semantics "
                    "and palette in an adapter act in part at any strength above 0.",
                ),
                *window_inputs("Where in the schedule it begins to act.", "Where in the schedule it stops."),
            ],
            outputs=[CompositionSocket.Output("composition", tooltip="What was picked.")],
        )

    @classmethod
    def execute(cls, composition, strength, start_percent, end_percent, **picked) -> io.NodeOutput:
        names = [name for name in NAMES if picked[name]]
        return io.NodeOutput(pick(composition, names, strength, start_percent, end_percent))


class MergeCompositions(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomMergeCompositions",
            display_name="Merge Compositions",
            category=CATEGORY,
            description="All representations of two compositions: the sketch of one picture, the colors of another.",
            search_aliases=["Composer", "combine", "compose"],
            has_intermediate_output=True,
            inputs=[
                CompositionSocket.Input("composition1", tooltip="A composition."),
                CompositionSocket.Input("composition2", tooltip="Another."),
                io.Combo.Input(
                    "policy",
                    options=list(POLICIES),
                    default=REFUSE,
                    tooltip="Whose representation is taken if both have it. refuse says so instead.",
                ),
            ],
            outputs=[CompositionSocket.Output("composition", tooltip="Both in one.")],
        )

    @classmethod
    def execute(cls, composition1, composition2, policy) -> io.NodeOutput:
        found = merge(composition1, composition2, policy)
        return io.NodeOutput(found, ui=preview(cls, contact_sheet(found)))


class AlignComposition(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomAlignComposition",
            display_name="Align Composition",
            category=CATEGORY,
            description="Brings a composition's maps to another canvas. Caption, semantics and palette have none.",
            search_aliases=["Composer", "resize", "canvas", "crop", "pad"],
            inputs=[
                CompositionSocket.Input("composition", tooltip="A composition."),
                io.Int.Input("width", default=512, min=16, max=8192, step=8, tooltip="Of the canvas, in pixels."),
                io.Int.Input("height", default=512, min=16, max=8192, step=8, tooltip="Of the canvas, in pixels."),
                io.Combo.Input(
                    "fit",
                    options=list(FITS),
                    default=CROP,
                    tooltip="crop fills the canvas, pad shows everything, stretch changes the aspect ratio.",
                ),
            ],
            outputs=[CompositionSocket.Output("composition", tooltip="The same on the new canvas.")],
        )

    @classmethod
    def execute(cls, composition, width, height, fit) -> io.NodeOutput:
        return io.NodeOutput(align(composition, (height, width), fit))


class InterpolateCompositions(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomInterpolateCompositions",
            display_name="Interpolate Compositions",
            category=CATEGORY,
            description="Compositions between two: caption, semantics and palette go over from one to the other; the "
            "maps are those of one of them.",
            search_aliases=["Composer", "slerp", "blend", "mix images", "morph"],
            inputs=[
                CompositionSocket.Input("composition1", tooltip="At 0."),
                CompositionSocket.Input("composition2", tooltip="At 1."),
                io.String.Input(
                    "shares",
                    default="0.5",
                    tooltip='How far on the way: "0.5", or a list such as "0, 0.25, 0.5, 0.75, 1" for a sweep, which '
                    "runs what follows once for each.",
                ),
                io.Combo.Input(
                    "local_from",
                    options=[FIRST, SECOND],
                    default=FIRST,
                    tooltip="Whose sketch, instances, depth, intensity and mask are kept.",
                ),
            ],
            outputs=[
                CompositionSocket.Output("composition", is_output_list=True, tooltip="A composition for each share.")
            ],
        )

    @classmethod
    def execute(cls, composition1, composition2, shares, local_from) -> io.NodeOutput:
        found = [interpolate(composition1, composition2, share, local_from) for share in read_shares(shares)]
        return io.NodeOutput(found)


def read_shares(text: str) -> list[float]:
    """Numbers from 0 to 1, separated by commas or spaces.

    Raises:
        ValueError: there is none, or an entry is no such number.
    """
    entries = text.replace(",", " ").split()
    try:
        shares = [float(entry) for entry in entries]
    except ValueError:
        shares = []
    if not shares or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"shares: expected numbers from 0 to 1 such as 0.5, got {text!r}")
    return shares


NODES: list[type[Node]] = [PickRepresentations, MergeCompositions, AlignComposition, InterpolateCompositions]
