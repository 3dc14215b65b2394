"""Nodes of PromptNet: load it, encode prompts with its words, and save it."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..host.profusion import finetuning
from ..host.profusion import promptnet as words
from ..host.words import MARKER
from .types import (
    Node,
    PromptNetSocket,
    gather_subjects,
    own_places,
    register_folder,
    stamp,
    subject_inputs,
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
                    tooltip="A file in models/promptnet or output/promptnet, with the tensor names of the published "
                    "code.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model, which makes the words of PromptNet Encode while it samples."),
                PromptNetSocket.Output("promptnet", tooltip="For PromptNet Encode."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return stamp(folder_paths.get_full_path(FOLDER, file))

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
            search_aliases=[
                "ProFusion",
                "photo",
                "identity",
                "face",
                "likeness",
                "textual inversion",
                "prompt",
                "person",
            ],
            inputs=[
                PromptNetSocket.Input("promptnet", tooltip="From Load PromptNet."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The vision tower: CLIP ViT-H/14 for PromptNets in the published form."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                subject_inputs(
                    "The subjects, in the order of their words in the prompt. Their whole pictures are seen, "
                    "without masks."
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


class SavePromptNet(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomSavePromptNet",
            display_name="Save PromptNet",
            category=CATEGORY,
            description="Writes a PromptNet as safetensors in half precision, for Load PromptNet. Save the LoRA of its "
            "fine-tuning with ComfyUI's Save LoRA Weights.",
            search_aliases=["ProFusion", "export", "safetensors"],
            is_output_node=True,
            inputs=[
                PromptNetSocket.Input("promptnet", tooltip="Usually from Fine-tune PromptNet."),
                io.String.Input(
                    "filename",
                    default="promptnet",
                    tooltip="Name of the new file in output/promptnet, without extension; a number follows where it is "
                    "taken.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="The written file and its size.")],
        )

    @classmethod
    def execute(cls, promptnet, filename) -> io.NodeOutput:
        report = finetuning.save_promptnet(promptnet, Path(folder_paths.get_output_directory()) / FOLDER, filename)
        return io.NodeOutput(report, ui={"text": (report,)})


NODES: list[type[Node]] = [LoadPromptNet, PromptNetEncode, SavePromptNet]
