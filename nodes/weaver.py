"""Nodes for sampling with Concept Weaver: Concept Prompts, Plug-and-Play Injection, Multi-Concept Fusion."""

from __future__ import annotations

from comfy_api.latest import io

from ..encoders.concept_texts import KEEP_OTHERS, OTHERS
from ..host.model.window import Window
from ..host.structure import plugandplay
from ..host.weaver import fusion
from ..host.weaver import prompts as concept_prompts
from .concepts import as_concepts, one_concept
from .types import (
    ADVISES_LATER,
    CUSTOM_BLOCKS,
    ConceptPromptsSocket,
    ConceptSocket,
    Node,
    PartitionSocket,
    TrajectorySocket,
    window_inputs,
)

CATEGORY = "ConceptLoom/Concept Weaver"


class ConceptPrompts(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomConceptPrompts",
            display_name="Concept Prompts",
            category=CATEGORY,
            description="Encodes the base prompt, and one prompt per concept with that concept's placeholder alone, "
            "for Multi-Concept Fusion.",
            search_aliases=[
                "Concept Weaver",
                "custom diffusion",
                "placeholder",
                "modifier token",
                "prompt per concept",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                ConceptSocket.Input(
                    "concepts",
                    tooltip="A concept from Load Concept, or several from Concept Bank. Concept Masks needs their "
                    "masks in the same order.",
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The whole picture in plain words, with the class word of each concept: "
                    '"a cat and a dog on the beach".',
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="ugly, blurry, black, low res, unrealistic",
                    tooltip="What the picture should not show. The negative side has no concepts.",
                ),
                io.Combo.Input(
                    "other_concepts",
                    options=list(OTHERS),
                    default=KEEP_OTHERS,
                    tooltip="What a concept's own prompt says of the others: their class words, as published, or "
                    "nothing, which lets less of them in.",
                ),
                io.String.Input(
                    "texts",
                    multiline=True,
                    default="",
                    advanced=True,
                    tooltip="Texts of your own instead of the ones made from the prompt: one line per concept, in "
                    "order, the background's last. An empty line keeps the made one.",
                ),
                ConceptSocket.Input(
                    "background", optional=True, tooltip="One concept for all that lies behind the others."
                ),
            ],
            outputs=[
                ConceptPromptsSocket.Output(display_name="prompts", tooltip="For Multi-Concept Fusion."),
                io.String.Output(display_name="texts", tooltip="What each concept's prompt says, one per line."),
            ],
        )

    @classmethod
    def execute(cls, clip, concepts, prompt, negative_prompt, other_concepts, texts, background=None) -> io.NodeOutput:
        behind = None if background is None else one_concept(background, "background")
        made = concept_prompts.encode_prompts(
            clip, prompt, negative_prompt, as_concepts(concepts), behind, texts, other_concepts
        )
        return io.NodeOutput(made, "\n".join(made.texts))


class PlugAndPlayInjection(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomPlugAndPlayInjection",
            display_name="Plug-and-Play Injection",
            category=CATEGORY,
            description="Keeps the structure of an inverted picture while the prompt or concepts change what is in it "
            "(Plug-and-Play, CVPR 2023). Works alone for editing a picture. For SD 1.x, SD 2.x, SDXL and Shapeland.",
            **ADVISES_LATER,
            search_aliases=["PnP", "plug and play", "structure", "image editing", "prompt to prompt", "Concept Weaver"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the picture was inverted with; LoRAs may come after."),
                TrajectorySocket.Input("trajectory", tooltip="From DDIM Inversion."),
                io.Float.Input(
                    "residual_until",
                    default=0.8,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The picture's features are injected up to this part of the steps, which holds the shapes. "
                    "Lower it to let a concept change the silhouette.",
                ),
                io.Float.Input(
                    "attention_until",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="The same for queries and keys of self-attention: holds the layout.",
                ),
                io.DynamicCombo.Input(
                    "blocks",
                    options=[
                        *(io.DynamicCombo.Option(preset, []) for preset in plugandplay.PRESETS),
                        io.DynamicCombo.Option(
                            CUSTOM_BLOCKS,
                            [
                                io.String.Input(
                                    "numbers", default="4-11", tooltip='Decoder blocks by number, such as "4, 7-9".'
                                )
                            ],
                        ),
                    ],
                    extra_dict={"advanced": True},
                    tooltip="Whose self-attention is injected. Concept Weaver's paper names decoder blocks 4, 7 and 9, "
                    "the code of Plug-and-Play takes 4 to 11; of SDXL these are 1, 4 and 1 to 5.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="Sample it from the inversion's noise, along its sigmas.")],
        )

    @classmethod
    def execute(cls, model, trajectory, residual_until, attention_until, blocks) -> io.NodeOutput:
        chosen = blocks.get("numbers", blocks["blocks"])
        settings = plugandplay.InjectionSettings(residual_until, attention_until, chosen)
        return io.NodeOutput(plugandplay.apply(model, trajectory, settings))


class MultiConceptFusion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomMultiConceptFusion",
            display_name="Multi-Concept Fusion (Concept Weaver)",
            category=CATEGORY,
            description="Draws each concept in its own part of one picture: cross-attention uses a concept's own "
            "weights and prompt where its mask is (Concept Weaver, CVPR 2024). The model is evaluated no more often, "
            "however many there are. For SD 1.x, SD 2.x, SDXL and Shapeland.",
            **ADVISES_LATER,
            search_aliases=[
                "Concept Weaver",
                "multi LoRA",
                "regional LoRA",
                "custom diffusion",
                "multi concept",
                "two characters",
                "multiple loras",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The base model, best with Plug-and-Play Injection on it."),
                ConceptPromptsSocket.Input("prompts", tooltip="From Concept Prompts."),
                PartitionSocket.Input("partition", tooltip="From Concept Masks, in the order of the concepts."),
                io.Float.Input(
                    "suppression",
                    default=0.3,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="Lambda: how far to move away from what the base model alone would draw. 0 is off; much of "
                    "it burns colors.",
                ),
                *window_inputs(
                    "Concepts are seen from this part of sampling on; before, the plain prompt draws.",
                    "Concepts are seen up to this part of sampling.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(fusion.MODES),
                    default=fusion.FEATURES,
                    advanced=True,
                    tooltip="features: concepts are mixed in cross-attention, in one evaluation for all. scores: "
                    "every concept draws the whole picture and what they give is mixed by the masks, which costs one "
                    "more evaluation for each and has seams; there suppression has no part.",
                ),
                io.Combo.Input(
                    "layers",
                    options=list(fusion.LAYERS),
                    default=fusion.ALL_LAYERS,
                    advanced=True,
                    tooltip="Cross-attention layers in which concepts are seen: all, as published, or the decoder's.",
                ),
                io.Combo.Input(
                    "elsewhere",
                    options=list(fusion.ELSEWHERE),
                    default=fusion.IN_PLACE,
                    advanced=True,
                    tooltip="What a LoRA changes outside keys and values: applied inside its concept's mask, which "
                    "keeps its full effect there, or left out, as the paper has it.",
                ),
                io.Float.Input(
                    "norm_cap",
                    default=0.0,
                    min=0.0,
                    max=5.0,
                    step=0.1,
                    advanced=True,
                    tooltip="The most by which suppression may lengthen a feature; 1.5 tames a strong one, 0 sets no "
                    "bound.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model that draws the concepts."),
                io.Conditioning.Output(display_name="positive", tooltip="The plain prompt, for the sampler."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, for the sampler."),
            ],
        )

    @classmethod
    def execute(cls, model, prompts, partition, start_percent, end_percent, **settings) -> io.NodeOutput:
        settings = fusion.FusionSettings(window=Window(start_percent, end_percent), **settings)
        fused, positive = fusion.apply(
            model, prompts.positive, prompts.concepts, partition, settings, prompts.background
        )
        return io.NodeOutput(fused, positive, prompts.negative)


NODES: list[type[Node]] = [ConceptPrompts, PlugAndPlayInjection, MultiConceptFusion]
