"""Nodes of FastComposer: load and convert its weights, encode subjects, fuse them into a prompt, and delay them."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..encoders.reference import BACKGROUNDS, KEEP
from ..host.fastcomposer import conditioning, delay, files
from ..host.words import MARKER
from ..samplers.switching import COUNTINGS, NEAREST
from .types import (
    FuserSocket,
    Node,
    SubjectSocket,
    gather_subjects,
    own_places,
    register_folder,
    stamp,
    subject_inputs,
)

CATEGORY = "ConceptLoom/FastComposer"
FOLDER = "fastcomposer"

register_folder(FOLDER, *own_places(FOLDER))


class LoadFastComposer(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadFastComposer",
            display_name="Load FastComposer",
            category=CATEGORY,
            description="Loads FastComposer's weights: the published checkpoint as it is, or any part of it as "
            "safetensors. What the file lacks passes through from the inputs.",
            search_aliases=["FastComposer", "checkpoint", "fuser", "postfuse", "load", "multi subject"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in models/fastcomposer or output/fastcomposer. The published pytorch_model.bin "
                    "holds everything; Convert FastComposer Checkpoint makes smaller files of it.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model: needed if the file holds a LoRA, passed through if it holds no UNet.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Passed through if the file holds no text encoder."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="CLIP ViT-L/14: needed if the file holds only its trained last layers.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    tooltip="The UNet that was trained with the fuser, or the model on the input; delayed "
                    "conditionings need the model of this output."
                ),
                io.Clip.Output(tooltip="The text encoder, Stable Diffusion's own."),
                io.ClipVision.Output(tooltip="The vision tower of the subject encoder."),
                io.Vae.Output(tooltip="The file's autoencoder, where it has one; any of Stable Diffusion 1.5 will do."),
                FuserSocket.Output("fuser", tooltip="The MLP fuser, for Fuse Subjects."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return stamp(folder_paths.get_full_path(FOLDER, file))

    @classmethod
    def execute(cls, file, model=None, clip=None, clip_vision=None) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        parts = files.load(path, model, clip, clip_vision, folder_paths.get_folder_paths("embeddings"))
        outputs = {
            "MODEL": parts.model,
            "CLIP": parts.clip,
            "CLIP_VISION": parts.clip_vision,
            "VAE": parts.vae,
            "fuser": parts.fuser,
        }
        return io.NodeOutput(*(_absent(name, file) if v is None else v for name, v in outputs.items()))


def _absent(output: str, file: str) -> ExecutionBlocker:
    """Takes the place of a missing output. It stops only the nodes that use the output, with this message."""
    return ExecutionBlocker(f"Load FastComposer: {output}: expected one in {file} or from an input, got neither.")


class ConvertFastComposer(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomConvertFastComposer",
            display_name="Convert FastComposer Checkpoint",
            category=CATEGORY,
            description="Writes the published checkpoint as safetensors: fuser and trained vision layers as one small "
            "file in output/fastcomposer, and the UNet as a LoRA in it or as a file in output/diffusion_models.",
            search_aliases=["FastComposer", "convert", "extract", "safetensors", "lora"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "file", options=folder_paths.get_filename_list(FOLDER), tooltip="The published checkpoint."
                ),
                io.String.Input(
                    "filename", default="fastcomposer", tooltip="Name of the new files, without extension."
                ),
                io.Combo.Input(
                    "unet",
                    options=list(files.UNET_FORMS),
                    default=files.AS_LORA,
                    tooltip="LoRA: the difference to the model on the input, for use on it and models near it. File: "
                    "the whole UNet, for Load Diffusion Model. None: fuser and vision layers alone.",
                ),
                io.Int.Input("rank", default=64, min=1, max=768, tooltip="Of the LoRA: more is closer and larger."),
                io.Model.Input(
                    "model", optional=True, tooltip="Stable Diffusion 1.5 as it was before FastComposer's training."
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The written files and their sizes.")],
        )

    @classmethod
    def execute(cls, file, filename, unet, rank, model=None) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, file)
        report = files.convert(path, Path(folder_paths.get_output_directory()), filename, unet, rank, model)
        return io.NodeOutput(report, ui={"text": (report,)})


class SubjectEncoder(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomSubjectEncoder",
            display_name="Subject Encoder (FastComposer)",
            category=CATEGORY,
            description="Encodes each subject's picture as the image embedding that FastComposer's fuser needs.",
            search_aliases=[
                "FastComposer",
                "image encoder",
                "embed",
                "face",
                "identity",
                "subject",
                "person",
                "ip adapter",
            ],
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="The vision tower from Load FastComposer."),
                subject_inputs("The subjects: one picture each."),
                io.Combo.Input(
                    "background",
                    options=list(BACKGROUNDS),
                    default=KEEP,
                    tooltip="What becomes of the picture outside a subject's mask. keep: stays, as in the published "
                    "demo. noise: as in training. Subjects without a mask keep theirs.",
                ),
                io.Boolean.Input(
                    "crop",
                    default=False,
                    tooltip="Cuts the picture to the subject's mask first, as in training: for a small subject in a "
                    "large picture.",
                ),
                io.Combo.Input(
                    "pictures",
                    options=[conditioning.SEPARATE, conditioning.AVERAGED],
                    default=conditioning.SEPARATE,
                    tooltip="Whether the inputs are different subjects, or several photos of one, which are averaged.",
                ),
            ],
            outputs=[SubjectSocket.Output("subject", tooltip="The subjects with their embeddings, for Fuse Subjects.")],
        )

    @classmethod
    def execute(cls, clip_vision, subjects, background, crop, pictures) -> io.NodeOutput:
        encoded = conditioning.encode_subjects(clip_vision, gather_subjects(subjects), background, crop, pictures)
        return io.NodeOutput(encoded)


class FuseSubjects(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomFuseSubjects",
            display_name="Fuse Subjects (MLP)",
            category=CATEGORY,
            description="Encodes a prompt twice: as plain text, and with each subject fused into the word that names "
            "it (FastComposer, equation 3).",
            search_aliases=[
                "FastComposer",
                "prompt",
                "text encode",
                "placeholder",
                "marker",
                "fuser",
                "multi subject",
                "face",
                "person",
                "two people",
            ],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder; its last layer, as in training."),
                FuserSocket.Input("fuser", tooltip="From Load FastComposer."),
                subject_inputs("The subjects from Subject Encoder, in the order of their words in the prompt."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default=f"a man {MARKER} and a woman {MARKER} in a garden",
                    tooltip="Put the marker after each subject's word. Without any, each subject takes the word "
                    "that is its noun, the second subject of a noun its second occurrence.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 fuses as published, 0 leaves the text, more exaggerates.",
                ),
                io.String.Input(
                    "marker",
                    default=MARKER,
                    advanced=True,
                    tooltip="The word that marks subjects. It is taken out before the text is encoded; img of the "
                    "published demo works too, as a whole word.",
                ),
            ],
            outputs=[
                io.Conditioning.Output("text_only", tooltip="The prompt alone, for the first steps."),
                io.Conditioning.Output("subject", tooltip="The prompt with the subjects."),
                io.String.Output("report", tooltip="The token that each subject landed on, and warnings."),
            ],
        )

    @classmethod
    def execute(cls, clip, fuser, subjects, prompt, strength, marker) -> io.NodeOutput:
        fused = conditioning.fuse(clip, fuser, prompt, gather_subjects(subjects, "Subject Encoder"), marker, strength)
        return io.NodeOutput(*fused)


class DelayedSubjectConditioning(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomDelayedSubjectConditioning",
            display_name="Delayed Subject Conditioning",
            category=CATEGORY,
            description="Text alone for the first steps, subjects from then on: the prompt keeps its layout and the "
            "subjects their faces (FastComposer, section 4.3). Switches at exactly that step with every scheduler. "
            "Sample with the model of Load FastComposer, which tells it the schedule. Regions of attention couples see "
            "the subjects from the first step on.",
            search_aliases=["FastComposer", "timestep range", "prompt scheduling", "alpha", "switch", "delay"],
            inputs=[
                io.Conditioning.Input("text_only", tooltip="Holds before the switch."),
                io.Conditioning.Input("subject", tooltip="Holds from the switch on."),
                io.Float.Input(
                    "alpha",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that see the subjects. More is more likeness, less follows the prompt "
                    "better; 0.6 to 0.8 is published.",
                ),
                io.Int.Input(
                    "switch_step",
                    default=-1,
                    min=-1,
                    max=10000,
                    advanced=True,
                    tooltip="First step with the subjects, counted from 0, in place of alpha. -1 goes by alpha.",
                ),
                io.Int.Input(
                    "start_at_step",
                    default=0,
                    min=0,
                    max=10000,
                    advanced=True,
                    tooltip="With switch_step on a KSampler (Advanced): its start_at_step, so that steps count from "
                    "the beginning of the schedule and not of this sampler.",
                ),
                io.Combo.Input(
                    "counting",
                    options=list(COUNTINGS),
                    default=NEAREST,
                    advanced=True,
                    tooltip="How alpha becomes a step. The published code's own counting differs by up to one step.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the sampler's positive input.")],
        )

    @classmethod
    def execute(cls, text_only, subject, alpha, switch_step, start_at_step, counting) -> io.NodeOutput:
        plan = delay.Delay(alpha, None if switch_step < 0 else switch_step, start_at_step, counting)
        return io.NodeOutput(delay.delayed(text_only, subject, plan))


NODES: list[type[Node]] = [
    LoadFastComposer,
    SubjectEncoder,
    FuseSubjects,
    DelayedSubjectConditioning,
    ConvertFastComposer,
]
