"""Nodes of the concept bank: load concepts, combine them, and save them."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..encoders.concepts import Concept
from ..host.weaver import concepts
from ..host.weaver.concepts import join
from .types import ConceptSocket, Node, growing, in_order, own_places, register_folder, stamp

CATEGORY = "ConceptLoom/Concept Weaver"
FOLDER, LORAS, EMBEDDINGS = "concepts", "loras", "embeddings"
NO_FILE = "none"

register_folder(FOLDER, *own_places(FOLDER))


def gather_concepts(found: io.Autogrow.Type) -> list[Concept]:
    """Returns all concepts in the order of their inputs.

    Raises:
        ValueError: there is none.
    """
    return [concept for value in in_order(found, "concepts", "Load Concept") for concept in as_concepts(value)]


def as_concepts(value: Concept | list[Concept]) -> list[Concept]:
    """The concepts of an input, which is a single concept or a bank."""
    return [value] if isinstance(value, Concept) else list(value)


def one_concept(value: Concept | list[Concept], name: str = "concept") -> Concept:
    """The concept of an input that must contain only one; `name` is the input's, for the error message.

    Raises:
        ValueError: it contains several.
    """
    concepts = as_concepts(value)
    if len(concepts) != 1:
        raise ValueError(f"{name}: expected one concept, got a bank of {len(concepts)}")
    return concepts[0]


def _files(*folders: str) -> list[str]:
    """File names, with "folder/" in front for folders other than the concept folder. Files in the concept folder have
    it in front too if their path begins with one of the folder names, so that entries are unique."""
    own = [
        f"{FOLDER}/{name}" if re.split(r"[\\/]", name)[0] in (FOLDER, *folders) else name
        for name in folder_paths.get_filename_list(FOLDER)
    ]
    return [*own, *(f"{folder}/{name}" for folder in folders for name in folder_paths.get_filename_list(folder))]


def _path(entry: str, *folders: str) -> str:
    """The path for an entry of `_files`."""
    folder = next((folder for folder in (FOLDER, *folders) if entry.startswith(f"{folder}/")), None)
    if folder is None:
        return folder_paths.get_full_path_or_raise(FOLDER, entry)
    return folder_paths.get_full_path_or_raise(folder, entry.removeprefix(f"{folder}/"))


class LoadConcept(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadConcept",
            display_name="Load Concept",
            category=CATEGORY,
            description="One concept for Concept Weaver, from a Custom Diffusion or TweedieMix file, a file of Save "
            "Concept, or any LoRA that changes cross-attention. The model itself is not changed.",
            search_aliases=["Custom Diffusion", "delta.bin", "TweedieMix", "lora", "concept bank", "multi concept"],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the concept is for; its LoRAs do not matter."),
                io.Combo.Input(
                    "file",
                    options=_files(LORAS),
                    tooltip="A file in models/concepts or output/concepts (Shapeland's are there by themselves), or a "
                    "LoRA in models/loras.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip='What kind of thing the concept is, such as "dog"; for a LoRA with its trigger word before '
                    "it. Empty keeps what the file says.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Of the concept's weights: 1 as trained, 0 leaves the concept out.",
                ),
                io.Combo.Input(
                    "token_file",
                    options=[NO_FILE, *_files(EMBEDDINGS)],
                    default=NO_FILE,
                    advanced=True,
                    tooltip="The file with the concept's word, where it is kept apart, as diffusers does "
                    "(<new1>.bin); an embedding will do too.",
                ),
                io.String.Input(
                    "placeholder",
                    default="",
                    advanced=True,
                    tooltip="The concept's word in prompts. Empty keeps the file's, mostly <new1>; two concepts in one "
                    "picture need different ones. In a file with several words it says which.",
                ),
            ],
            outputs=[
                ConceptSocket.Output("concept", tooltip="The concept, for Concept Bank and whatever draws concepts."),
                io.String.Output("report", tooltip="What was found in the file."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, token_file, **_):
        return stamp(_path(file, LORAS)), None if token_file == NO_FILE else stamp(_path(token_file, EMBEDDINGS))

    @classmethod
    def execute(cls, model, file, class_word, strength, token_file, placeholder) -> io.NodeOutput:
        path = _path(file, LORAS)
        token_path = None if token_file == NO_FILE else _path(token_file, EMBEDDINGS)
        concept = concepts.load_concept(model, path, token_path, class_word, placeholder, strength)
        return io.NodeOutput(concept, concepts.describe(concept))


class ConceptBank(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomConceptBank",
            display_name="Concept Bank",
            category=CATEGORY,
            description="Several concepts on one wire, in order. Goes wherever a concept goes, into further banks too.",
            search_aliases=["concepts", "list", "combine", "multi concept", "Concept Weaver"],
            inputs=[
                growing(
                    "concepts",
                    ConceptSocket.Input(
                        "concept", tooltip="A concept from Load Concept, or several from Concept Bank."
                    ),
                    tooltip="The concepts, for one kind of model and with a placeholder of their own each.",
                )
            ],
            outputs=[ConceptSocket.Output("concept", tooltip="All concepts.")],
        )

    @classmethod
    def execute(cls, concepts) -> io.NodeOutput:
        return io.NodeOutput(join(gather_concepts(concepts)))


class SaveConcept(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomSaveConcept",
            display_name="Save Concept",
            category=CATEGORY,
            description="Writes a concept as safetensors, small if a rank is given: for Load Concept, or as a plain "
            "LoRA and embedding for any other node.",
            search_aliases=["convert", "extract", "compress", "svd", "lora", "Custom Diffusion", "safetensors"],
            is_output_node=True,
            inputs=[
                ConceptSocket.Input("concept", tooltip="One concept. Its strength is not written."),
                io.String.Input(
                    "filename",
                    default="concept",
                    tooltip="Name of the new files, without extension; a number follows where it is taken.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(concepts.FORMATS),
                    default=concepts.AS_CONCEPT,
                    tooltip="concept: one file in output/concepts, for Load Concept. LoRA: a plain LoRA in "
                    "output/loras for ComfyUI's own loaders, and the concept's word in output/embeddings, to be moved "
                    "to models/embeddings.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1280,
                    tooltip="Compresses each difference to its nearest of this rank (SVD): more is closer and larger. "
                    "0 keeps them as they are.",
                ),
            ],
            outputs=[io.String.Output("report", tooltip="The written files, their sizes, and what was left out.")],
        )

    @classmethod
    def execute(cls, concept, filename, format, rank) -> io.NodeOutput:
        report = concepts.save(one_concept(concept), Path(folder_paths.get_output_directory()), filename, format, rank)
        return io.NodeOutput(report, ui={"text": (report,)})


NODES: list[type[Node]] = [LoadConcept, ConceptBank, SaveConcept]
