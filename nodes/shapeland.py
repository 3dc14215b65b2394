"""Nodes of Shapeland: load its models, draw a scene from a description, and read a picture with the judge."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io

from ..host import shapeland as host
from ..shapeland import report, world
from .types import Node, growing

CATEGORY = "ConceptLoom/Shapeland"


class LoadShapeland(Node):
    """Loads Shapeland's MODEL, CLIP, VAE and CLIP_VISION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadShapeland",
            display_name="Load Shapeland",
            category=CATEGORY,
            description="The tiny model that ships with ConceptLoom. It draws 64x64 pictures of one to three patterned "
            "things, in seconds and without a graphics card, so that every system of this pack can be tried at once.",
            search_aliases=["shapeland", "tiny model", "test model", "checkpoint", "load checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="A UNet with the block layout of Stable Diffusion 1.5, at 64 channels."),
                io.Clip.Output(tooltip="A small CLIP text tower behind CLIP's own tokenizer."),
                io.Vae.Output(tooltip="An autoencoder: 8 channels at a quarter of the picture's size."),
                io.ClipVision.Output(tooltip="The vision tower that was trained with the text tower."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(
            host.load_model(),
            host.load_clip(embedding_directory=folder_paths.get_folder_paths("embeddings")),
            host.load_vae(),
            host.load_clip_vision(),
        )


class DrawScene(Node):
    """Draws a picture of Shapeland from a description."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomDrawScene",
            display_name="Draw Scene (Shapeland)",
            category=CATEGORY,
            description="Draws a Shapeland picture from a sentence, together with the exact mask of each thing: a "
            "reference subject that needs no file.",
            search_aliases=["shapeland", "reference picture", "example image", "test image", "draw"],
            inputs=[
                io.String.Input(
                    "description",
                    default="a red striped fish on a mint background",
                    tooltip="One to five things and a background. Things: "
                    + ", ".join(world.NOUNS)
                    + ". Colors: "
                    + ", ".join(world.COLORS)
                    + ". Patterns: "
                    + ", ".join(world.PATTERNS)
                    + ". Backgrounds: "
                    + ", ".join(world.BACKGROUNDS)
                    + ". What the sentence leaves open is random.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Decides places, sizes, and the background where the sentence names none.",
                ),
                io.Int.Input(
                    "identity_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Decides each thing's exact colors and pattern. The same number gives the same "
                    "appearance in another place, and on another thing.",
                ),
                io.Int.Input(
                    "size",
                    default=world.SIZE,
                    min=world.SIZE,
                    max=16 * world.SIZE,
                    step=world.SIZE,
                    tooltip="Side of the picture in pixels. 64 is what Shapeland's model draws; 512 and 1024 make "
                    "references for Stable Diffusion 1.5 and XL.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The picture, a square."),
                io.Mask.Output(tooltip="One mask per thing, in the order of the sentence."),
                io.Image.Output(id="depth", display_name="depth", tooltip="Near is white; the background is black."),
            ],
        )

    @classmethod
    def validate_inputs(cls, description: str) -> bool | str:
        try:
            world.parse_caption(description)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, description: str, seed: int, identity_seed: int, size: int) -> io.NodeOutput:
        picture, masks = world.draw_description(description, seed, identity_seed, size // world.SIZE)
        depth = torch.from_numpy(picture.depth)[None, ..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(torch.from_numpy(picture.image)[None], torch.from_numpy(masks), depth)


class ReadPicture(Node):
    """Finds and describes the objects in a picture with the judge."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomReadPicture",
            display_name="Read Picture (Shapeland Judge)",
            category=CATEGORY,
            description="Names the things in a Shapeland picture with their colors, pattern and mask, and measures "
            "how much each looks like a reference. A workflow can measure itself with it.",
            search_aliases=["shapeland", "judge", "evaluate", "segment", "mask by word", "identity similarity"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to read. Other sizes than 64x64 are scaled for reading."),
                io.Combo.Input(
                    "noun",
                    options=["any", *world.NOUNS],
                    default="any",
                    tooltip="Which things the mask output covers.",
                ),
                growing(
                    "references",
                    io.Image.Input("reference", tooltip="A picture whose largest thing stands for a subject."),
                    "Pictures of the subjects, one each. The report says how much the thing of the same noun looks "
                    "like it: 1 is the same identity, about 0 another one.",
                ),
                io.Image.Input(
                    "plain",
                    optional=True,
                    tooltip="A picture of the same prompt without the subjects, whose likeness the report gives "
                    "beside.",
                ),
            ],
            outputs=[
                io.Mask.Output(tooltip="The chosen things of each picture as one mask."),
                io.String.Output(
                    display_name="report",
                    tooltip="One line per reference: how much its subject looks like it. Then one per thing: what it "
                    "is.",
                ),
            ],
        )

    @classmethod
    def execute(cls, image: torch.Tensor, noun: str, references=None, plain=None) -> io.NodeOutput:
        readings = host.read_pictures(image)
        compared = [host.read_pictures(picture[:1])[0] for picture in (references or {}).values()]
        beside = None if plain is None else host.read_pictures(plain[:1])[0]
        mask = report.union_mask(readings, noun, image.shape[1:3])
        return io.NodeOutput(mask, report.describe(readings, compared, beside))


NODES: list[type[Node]] = [LoadShapeland, DrawScene, ReadPicture]
