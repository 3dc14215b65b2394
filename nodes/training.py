"""The node that trains concepts for Concept Weaver."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..host.weaver import studio
from ..training.concepts.augment import AUGMENTATIONS, NONE
from ..training.concepts.learner import Recipe
from .types import ConceptSocket, Node, preview, training_pictures


class TrainConcept(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomTrainConcept",
            display_name="Train Concept",
            category="ConceptLoom/Concept Weaver",
            description="Learns a concept from one to eight pictures (Custom Diffusion): what cross-attention makes of "
            "text, and a new word. Shows its progress; cancelling leaves the models as they were.",
            search_aliases=[
                "Custom Diffusion",
                "LoRA training",
                "fine-tune",
                "dreambooth",
                "textual inversion",
                "train character",
                "train lora",
            ],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model, from a loader. LoRAs on it are part of the base."),
                io.Clip.Input("clip", tooltip="The text encoder of the same checkpoint."),
                io.Vae.Input("vae", tooltip="The VAE of the same checkpoint."),
                io.Image.Input("images", tooltip="Pictures of the concept, as a batch. Their middle square is used."),
                io.String.Input("class_word", default="", tooltip='What kind of thing it is: "dog".'),
                io.String.Input(
                    "placeholder",
                    default="<new1>",
                    tooltip="The concept's new word, in prompts before the class word. Concepts that are drawn "
                    "together need different ones.",
                ),
                io.String.Input(
                    "captions",
                    default="photo of a {}",
                    multiline=True,
                    tooltip="What the pictures show; {} stands for the concept. One line for all pictures, or one "
                    "each.",
                ),
                io.Int.Input("steps", default=400, min=1, max=20000, tooltip="Optimizer steps."),
                io.Float.Input(
                    "learning_rate",
                    default=0.002,
                    min=0.00001,
                    max=0.1,
                    step=0.00001,
                    tooltip="As a share of a weight's typical size per step, which suits models of any width.",
                ),
                io.Int.Input("batch_size", default=2, min=1, max=64, tooltip="Pictures per step."),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=128,
                    tooltip="0 trains whole matrices as Custom Diffusion does; above, factors of this rank as a LoRA "
                    "does, for much smaller files.",
                ),
                io.Int.Input(
                    "class_pictures",
                    default=16,
                    min=0,
                    max=1000,
                    tooltip="Pictures of the class that the model draws for itself beforehand and keeps to while it "
                    "learns (prior preservation). 0 is faster and forgets more.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of the training pictures in pixels; that of the model: 512 for SD 1.5, 64 for "
                    "Shapeland.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, tooltip="Seed of everything that is random."),
                io.Combo.Input(
                    "augmentation",
                    options=list(AUGMENTATIONS),
                    default=NONE,
                    advanced=True,
                    tooltip="How scale and place are varied, for pictures that are all framed alike. none: as they "
                    "are. custom diffusion: smaller or cropped at times, with words that say so. strong: a third to "
                    "the whole of the size, anywhere, as Concept Weaver has it; such a concept needs masks.",
                ),
                io.Boolean.Input(
                    "new_word",
                    default=True,
                    advanced=True,
                    tooltip="Trains the placeholder's embedding too. Off, the class word alone stands for the concept.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=0.25,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Weight of the loss on pictures of the class; 0.25 is the published ratio.",
                ),
                io.Int.Input(
                    "preview_every",
                    default=100,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Steps between two pictures of the concept on the node while it learns; 0 shows none.",
                ),
                io.Boolean.Input(
                    "keep_checkpoint",
                    default=False,
                    advanced=True,
                    tooltip="Keeps a checkpoint in output/concept_training every minute: when this training is "
                    "cancelled or crashes, the same one goes on where it was. It is removed at the end.",
                ),
                io.Mask.Input(
                    "masks", optional=True, tooltip="White on the concept, one per picture; the loss counts there."
                ),
            ],
            outputs=[
                ConceptSocket.Output(display_name="concept", tooltip="For Concept Bank and Save Concept."),
                io.Image.Output(display_name="loss", tooltip="The loss as a curve."),
                io.String.Output(display_name="report", tooltip="Steps and time."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        images,
        class_word,
        placeholder,
        captions,
        size,
        class_pictures,
        preview_every,
        keep_checkpoint,
        masks=None,
        **recipe,
    ) -> io.NodeOutput:
        checkpoints = Path(folder_paths.get_output_directory()) / "concept_training" if keep_checkpoint else None
        concept, loss, report = studio.train_with_progress(
            model,
            clip,
            vae,
            training_pictures(images, masks, captions),
            class_word,
            placeholder,
            Recipe(**recipe),
            size,
            class_pictures,
            preview_every,
            checkpoints,
        )
        return io.NodeOutput(concept, loss[None], report, ui=preview(cls, loss))


NODES: list[type[Node]] = [TrainConcept]
