"""Nodes that fine-tune PromptNet on a subject, and make the variants to do so."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..host.profusion import finetuning
from ..subjects.masks import as_mask
from ..subjects.variants import Motion, make_variants
from .types import Node, PromptNetSocket, one_picture, preview, training_pictures

CATEGORY = "ConceptLoom/ProFusion"


class AugmentSubject(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomAugmentSubject",
            display_name="Augment Subject",
            category=CATEGORY,
            description="Makes variants of a subject's only photo: cut out, moved, turned and made smaller. An "
            "inpainting model fills the hole, and training on them learns the subject without its background "
            "(ProFusion).",
            search_aliases=["ProFusion", "augmentation", "variants", "affine", "cut out", "training data"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("image", tooltip="One photo; its middle square is used."),
                io.Mask.Input("mask", tooltip="White on the subject, with the photo's aspect ratio."),
                io.Int.Input("count", default=8, min=1, max=256, tooltip="Number of variants."),
                io.Int.Input("size", default=512, min=64, max=2048, step=8, tooltip="Side of the variants in pixels."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the variants.",
                ),
                io.Float.Input(
                    "smallest", default=0.6, min=0.1, max=2.0, step=0.05, tooltip="Smallest size of the subject."
                ),
                io.Float.Input(
                    "largest", default=1.0, min=0.1, max=2.0, step=0.05, tooltip="Largest size of the subject."
                ),
                io.Float.Input(
                    "translate",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Largest shift, as a share of the side.",
                ),
                io.Float.Input(
                    "degrees", default=10.0, min=0.0, max=180.0, step=1.0, tooltip="Largest angle, to both sides."
                ),
                io.Boolean.Input(
                    "flip", default=True, tooltip="Mirrors half of them; off for what has a left and a right."
                ),
                io.Boolean.Input(
                    "with_photo", default=True, tooltip="Puts the photo itself before the variants, as published."
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="The photo, and the variants, which are black outside of the subject.",
                ),
                io.Mask.Output(display_name="hole", tooltip="White where an inpainting model has to paint."),
                io.Mask.Output(display_name="masks", tooltip="White on the subject."),
            ],
        )

    @classmethod
    def execute(
        cls, image, mask, count, size, seed, smallest, largest, translate, degrees, flip, with_photo
    ) -> io.NodeOutput:
        motion = Motion(degrees, translate, smallest, largest, flip)
        made = make_variants(one_picture(image)[..., :3], as_mask(mask), count, size, seed, motion, with_photo)
        return io.NodeOutput(*made, ui=preview(cls, made.images[0]))


class FineTunePromptNet(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomFineTunePromptNet",
            display_name="Fine-tune PromptNet",
            category=CATEGORY,
            description="Trains a PromptNet further on one subject, together with the model's attention (ProFusion): "
            "some 50 steps on a photo and its variants. Cancelling leaves the models as they were. Photos of a person "
            "need that person's consent.",
            search_aliases=["ProFusion", "fine-tune", "LoRA training", "dreambooth", "personalization", "E4T"],
            has_intermediate_output=True,
            inputs=[
                io.Model.Input("model", tooltip="The model of Load PromptNet. LoRAs on it are part of the base."),
                PromptNetSocket.Input("promptnet", tooltip="From Load PromptNet. It stays as it is."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.ClipVision.Input("clip_vision", tooltip="The vision tower that PromptNet Encode uses too."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Image.Input(
                    "images",
                    tooltip="The photo and its variants, or several photos of the subject, as a batch. Their middle "
                    "square is used.",
                ),
                io.String.Input(
                    "captions",
                    default="a photo of {}",
                    multiline=True,
                    tooltip="What the pictures show; {} stands for the subject's word. One line for all pictures, or "
                    "one each.",
                ),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip="Optimizer steps."),
                io.Float.Input(
                    "learning_rate",
                    default=0.0005,
                    min=0.000001,
                    max=0.1,
                    step=0.000001,
                    tooltip="As a share of a weight's typical size per step, which suits models of any width.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Pictures per step. With fewer, more steps are needed.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=128,
                    tooltip="Of the changes to the model's attention: 0 trains whole matrices, as published; above, "
                    "factors of this rank, which need less memory and make a small file.",
                ),
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=2048,
                    step=64,
                    tooltip="Side of the training pictures in pixels; that of the model: 512 for Stable Diffusion 2 "
                    "base, 64 for Shapeland.",
                ),
                io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFF, tooltip="Seed of everything that is random."),
                io.Int.Input(
                    "preview_every",
                    default=25,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="Steps between two pictures of the subject on the node while it learns; 0 shows none.",
                ),
                io.Boolean.Input(
                    "keep_checkpoint",
                    default=False,
                    advanced=True,
                    tooltip="Keeps a checkpoint in output/promptnet_training every minute: when this training is "
                    "cancelled or crashes, the same one goes on where it was. It is removed at the end. Whole matrices "
                    "of a large model make large checkpoints.",
                ),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="White on the subject, one per picture; the loss counts there. With those of Augment "
                    "Subject, its variants need no inpainting.",
                ),
            ],
            outputs=[
                PromptNetSocket.Output("promptnet", tooltip="For PromptNet Encode and Save PromptNet."),
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="The changes to the model's attention, for ComfyUI's own Load LoRA Model and Save LoRA "
                    "Weights. Sample with a model that has them.",
                ),
                io.Image.Output(display_name="loss", tooltip="The loss as a curve."),
                io.String.Output(display_name="report", tooltip="Steps and time."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        promptnet,
        clip,
        clip_vision,
        vae,
        images,
        captions,
        size,
        preview_every,
        keep_checkpoint,
        masks=None,
        **recipe,
    ) -> io.NodeOutput:
        checkpoints = Path(folder_paths.get_output_directory()) / "promptnet_training" if keep_checkpoint else None
        found = finetuning.fine_tune(
            model,
            promptnet,
            clip,
            clip_vision,
            vae,
            training_pictures(images, masks, captions),
            finetuning.FineTuning(**recipe),
            size,
            preview_every,
            checkpoints,
        )
        return io.NodeOutput(found.promptnet, found.lora, found.loss[None], found.report, ui=preview(cls, found.loss))


NODES: list[type[Node]] = [AugmentSubject, FineTunePromptNet]
