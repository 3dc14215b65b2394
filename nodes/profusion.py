"""Nodes of PromptNet: load it, encode prompts with its words, and fine-tune it on a subject and variants of it."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..host.profusion import finetuning
from ..host.profusion import promptnet as words
from ..host.words import MARKER
from ..subjects.masks import as_mask
from ..subjects.variants import Motion, make_variants
from .types import (
    Node,
    PromptNetSocket,
    gather_subjects,
    one_picture,
    own_places,
    preview,
    register_folder,
    subject_inputs,
    training_pictures,
)

CATEGORY = "ConceptLoom/ProFusion"
FOLDER = "promptnet"

register_folder(FOLDER, *own_places(FOLDER))


class LoadPromptNet(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadPromptNet",
            display_name="Load PromptNet",
            category=CATEGORY,
            description="Loads a PromptNet, which makes a word for a picture (ProFusion), and prepares the model for "
            "its words.",
            search_aliases=["ProFusion", "PromptNet", "encoder", "textual inversion", "E4T", "identity"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the PromptNet was trained with: Stable Diffusion 2 for those "
                    "in the published form.",
                ),
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in models/promptnet, in the published names.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model, which makes the words of PromptNet Encode while it samples."),
                PromptNetSocket.Output("promptnet", tooltip="For PromptNet Encode."),
            ],
        )

    @classmethod
    def execute(cls, model, file) -> io.NodeOutput:
        return io.NodeOutput(words.prepared(model), words.load(folder_paths.get_full_path_or_raise(FOLDER, file)))


class PromptNetEncode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomPromptNetEncode",
            display_name="PromptNet Encode",
            category=CATEGORY,
            description="Encodes a prompt twice: as plain text, and with each subject's word replaced by what "
            "PromptNet makes of its picture, anew while the picture is sampled. One photo is enough; a photo of a "
            "person needs that person's consent.",
            search_aliases=["ProFusion", "photo", "identity", "face", "likeness", "textual inversion", "prompt"],
            inputs=[
                PromptNetSocket.Input("promptnet", tooltip="From Load PromptNet."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The vision tower: CLIP ViT-H/14 for PromptNets in the published form."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                subject_inputs(
                    "The subjects, in the order of their words in the prompt. Their whole pictures are seen."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default=f"a person {MARKER} in Ghibli style",
                    tooltip="Put the marker after each subject's word, which is replaced. Without any, each subject "
                    "replaces the word that is its noun.",
                ),
                io.Combo.Input(
                    "update",
                    options=list(words.UPDATES),
                    default=words.EVERY_EVALUATION,
                    tooltip="When the word is made anew. every evaluation: as published. every step: once for both "
                    "stages of Fusion Sampler. once: at the first evaluation, which costs nothing afterwards.",
                ),
                io.String.Input(
                    "marker",
                    default=MARKER,
                    advanced=True,
                    tooltip="The word that marks subjects. It is taken out before the text is encoded.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("text_only", tooltip="The prompt alone: the text of Fusion Guider."),
                io.Conditioning.Output(
                    "subject",
                    tooltip="The prompt with the subjects, for Fusion Guider or a sampler. Sample with the model of "
                    "Load PromptNet.",
                ),
            ],
        )

    @classmethod
    def execute(cls, promptnet, clip, clip_vision, vae, subjects, prompt, update, marker) -> io.NodeOutput:
        found = gather_subjects(subjects)
        return io.NodeOutput(*words.encode(promptnet, clip, clip_vision, vae, prompt, found, marker, update))


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
                io.Mask.Input("mask", tooltip="White on the subject, in the shape of the photo."),
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
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The variants, black outside of the subject."),
                io.Mask.Output(display_name="hole", tooltip="White where an inpainting model has to paint."),
                io.Mask.Output(display_name="masks", tooltip="White on the subject."),
            ],
        )

    @classmethod
    def execute(cls, image, mask, count, size, seed, smallest, largest, translate, degrees, flip) -> io.NodeOutput:
        motion = Motion(degrees, translate, smallest, largest, flip)
        made = make_variants(one_picture(image)[..., :3], as_mask(mask), count, size, seed, motion)
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
                    tooltip="The changes to the model's attention, for the host's own Load LoRA Model and Save LoRA "
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


class SavePromptNet(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomSavePromptNet",
            display_name="Save PromptNet",
            category=CATEGORY,
            description="Writes a PromptNet as safetensors in half precision, for Load PromptNet. Save the LoRA of its "
            "fine-tuning with the host's Save LoRA Weights.",
            search_aliases=["ProFusion", "export", "safetensors"],
            is_output_node=True,
            inputs=[
                PromptNetSocket.Input("promptnet", tooltip="Usually from Fine-tune PromptNet."),
                io.String.Input(
                    "filename",
                    default="promptnet",
                    tooltip="Name of the new file in output/promptnet, without ending; a number follows where it is "
                    "taken.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="The written file and its size.")],
        )

    @classmethod
    def execute(cls, promptnet, filename) -> io.NodeOutput:
        report = finetuning.save_promptnet(promptnet, Path(folder_paths.get_output_directory()) / FOLDER, filename)
        return io.NodeOutput(report, ui={"text": (report,)})


NODES: list[type[Node]] = [LoadPromptNet, PromptNetEncode, AugmentSubject, FineTunePromptNet, SavePromptNet]
