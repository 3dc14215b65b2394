"""Concepts in ComfyUI: loads them for a MODEL, adds them to its keys and values, and saves them.

A concept is what a fine-tuned model changes in the MODEL's own cross-attention (Concept Weaver, arXiv 2404.03913, and
Custom Diffusion, arXiv 2212.04488). The model is never changed: its layers compute keys and values, to which the
concept's part is added. So LoRAs on the model, quantized weights and ComfyUI's memory management remain effective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import torch

from ...encoders import concept_files, concept_formats
from ...encoders.adapter_names import TEXT, TEXT_2, Layer
from ...encoders.adapters import Adapter
from ...encoders.concept_formats import Tokens
from ...encoders.concepts import PARTS, Concept
from ...encoders.files import checked_folder, checked_name, read
from ..advice import advise
from ..model.families import family_of, family_of_concept, network_of
from ..model.sites import Site
from .weights import adapters_by_weight, check_fit, host_patch, is_whole, key_patches, read_weights

PEFT_FILE, PEFT_CONFIG = "adapter_model", "adapter_config.json"
AS_CONCEPT, AS_LORA = "concept", "LoRA"
FORMATS = (AS_CONCEPT, AS_LORA)


def load_concept(
    model,
    source: str | Path | Mapping[str, Any] | list,
    tokens: str | Path | Mapping[str, Any] | list | None = None,
    class_word: str = "",
    placeholder: str = "",
    strength: float = 1.0,
    name: str = "",
) -> Concept:
    """Loads a concept from a file of any known format, as differences to a MODEL's own weights.

    Args:
        model: the MODEL that the concept is used with; LoRAs on it make no difference.
        source: path or loaded contents of the concept's file.
        tokens: path or loaded contents of a separate file with its token, if there is one.
        class_word: class of the concept, such as "dog"; empty keeps the file's.
        placeholder: chooses one of several tokens in the file, or renames a single one; empty keeps its name.
        strength: factor of the differences.
        name: name for reports; empty means the file's name.

    Raises:
        ValueError: the file is not a concept's, is for another model, is incomplete, contains tensors that cannot be
            used or numbers that are not finite, or does not contain the placeholder.
    """
    from_path = isinstance(source, (str, Path))
    name = name or (Path(source).stem if from_path else "concept")
    if from_path and concept_files.is_concept_file(source):
        concept = concept_files.load(source)
        check_fit(concept, model)
        found = {concept.placeholder: concept.tokens} if concept.tokens else {}
    else:
        file = concept_formats.read(*_contents(source, "file"))
        concept, found = read_weights(file, model, name), file.tokens
    if tokens is not None:
        if found:
            raise ValueError(f"token_file: expected none, for the file itself holds the token {next(iter(found))}")
        content, _ = _contents(tokens, "token_file")
        try:
            found = concept_formats.read_tokens(content)
        except ValueError as error:
            raise ValueError(f"token_file: {str(error).partition(': ')[2]}") from error
    placeholder, token = _choose(found, placeholder.strip())
    return replace(
        concept,
        name=name,
        class_word=class_word.strip() or concept.class_word,
        placeholder=placeholder,
        tokens=token,
        strength=strength,
    )


def join(concepts: Sequence[Concept]) -> list[Concept]:
    """Makes a bank of concepts that can be used together.

    Raises:
        ValueError: the concepts are for different models, or two share a placeholder.
    """
    widths = {concept.text_width: concept for concept in concepts if concept.text_width is not None}
    if len(widths) > 1:
        given = " and ".join(
            f"{one.name} for {family_of_concept(one.deltas).architecture(width)}" for width, one in widths.items()
        )
        raise ValueError(f"concepts: expected all for one kind of model, got {given}")
    owners: dict[str, str] = {}
    for concept in concepts:
        if concept.placeholder and concept.placeholder in owners:
            raise ValueError(
                f"concepts: expected a placeholder of its own for each, got {concept.placeholder} for both "
                f"{owners[concept.placeholder]} and {concept.name}; Load Concept can give it another"
            )
        owners[concept.placeholder] = concept.name
    return list(concepts)


def describe(concept: Concept) -> str:
    """Describes the contents of a concept's file, inside and outside cross-attention."""
    parts = [part for parts in concept.deltas.values() for part in parts]
    counts = ", ".join(f"{parts.count(part)} {name}" for part, name in PARTS.items() if part in parts)
    lines = [f"{concept.name}: {concept.source_format}", f"cross-attention: {len(concept.deltas)} layers ({counts})"]
    for encoder, token in concept.tokens.items():
        lines.append(f"token {concept.placeholder}: {len(token)} of width {token.shape[1]} for text encoder {encoder}")
    if concept.text_patches:
        changes = [change for state in concept.text_patches.values() for change in state.values()]
        count = sum(len(change.group) if isinstance(change, Adapter) else 1 for change in changes)
        lines.append(f"text encoder: {count} tensors, for its own prompt")
    if concept.others:
        lines.append(f"elsewhere in the model: {len(concept.others)} patches, for its own part of the picture")
    return "\n".join(lines)


def keys_and_values(concept: Concept, model, site: Site, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes a concept's keys and values at a cross-attention site.

    For text states p the keys are to_k(p) + strength p delta_k^T, and the values likewise.

    Args:
        concept: for this model's architecture.
        model: ComfyUI's BaseModel, loaded.
        site: of kind CROSS.
        context: (B, L, text width), states of the concept's prompt, on the device and in the dtype of the model.

    Returns:
        Keys and values, (B, L, C) each.
    """
    deltas = concept.deltas.get(site.key, {})
    outputs = []
    for part in ("k", "v"):
        out = layer_module(model, site.key, part)(context)
        if part in deltas and concept.strength:
            out = out + concept.strength * deltas[part].apply(context)
        outputs.append(out)
    return outputs[0], outputs[1]


def layer_module(model, key: str, part: str) -> torch.nn.Module:
    """The linear layer of a BaseModel's cross-attention that a part of a concept changes."""
    network = network_of(model)
    return network.get_submodule(family_of(network).layer(key, part))


def check_tokens(concept: Concept, clip) -> None:
    """Raises ValueError if a concept's tokens do not fit a CLIP's text encoders, because ComfyUI would drop them
    silently."""
    if not concept.tokens:
        return
    names = list(clip.tokenize(""))
    widths = {name: getattr(getattr(clip.tokenizer, f"clip_{name}", None), "embedding_size", None) for name in names}
    given = {encoder: token.shape[1] for encoder, token in concept.tokens.items()}
    if given != widths:
        says = [", ".join(f"{name} {width}" for name, width in side.items()) for side in (widths, given)]
        raise ValueError(f"clip: expected one of the width of {concept.name}'s token ({says[1]}), got {says[0]}")


def with_text(concept: Concept, clip):
    """Returns a clone of a CLIP with the concept's changes to text encoders, for the concept's own prompt only. Without
    changes it is the CLIP itself.

    Raises:
        ValueError: the CLIP is of another architecture.
    """
    if not concept.text_patches or not concept.strength:
        return clip
    own = key_patches(clip.patcher)
    changes: dict[str, Any] = {}
    for encoder, state in concept.text_patches.items():
        if encoder == "lora":
            changes |= _spoken(concept, state, own)
        else:
            found = {f"clip_{encoder}.transformer.{key}": ("set", (tensor,)) for key, tensor in state.items()}
            changes |= {key: change for key, change in found.items() if not key.endswith("position_ids")}
    foreign = next((key for key in changes if key not in own), None)
    if foreign:
        raise _other_clip(concept, foreign)
    patches = {key: _scalable(change, own, key) for key, change in changes.items()}
    clip = clip.clone()
    clip.add_patches({key: patch for key, patch in patches.items() if patch is not None}, concept.strength)
    return clip


def _spoken(concept: Concept, adapters: Mapping[Layer, Adapter], own: Mapping[str, list]) -> dict[str, Adapter]:
    """A LoRA's changes to text encoders, by ComfyUI's weight names."""
    encoders = sorted({key.partition(".")[0] for key in own if key.startswith("clip_")} - {"clip_g"})
    second = ["clip_g"] if any(key.startswith("clip_g.") for key in own) else []
    places = dict(zip((TEXT, TEXT_2), [*encoders, *second], strict=False))
    layers = {}
    for key in own:
        if key.endswith(".weight"):
            encoder, _, name = key.removesuffix(".weight").partition(".transformer.")
            layers[encoder, name.removeprefix("text_model.").replace(".", "_")] = key.removesuffix(".weight")
    found, unknown = {}, []
    for layer, adapter in adapters.items():
        name = layers.get((places.get(layer.place), layer.name))
        if name is None:
            unknown += [named.name for named in adapter.group.values()]
        else:
            found |= adapters_by_weight(adapter, name)
    if unknown and not found:
        raise _other_clip(concept, unknown[0])
    if unknown:
        sentence = f"of {concept.name}, {len(unknown)} tensors are for no layer of this CLIP and are not used"
        advise("Concept Prompts", sentence)
    return found


def _other_clip(concept: Concept, lacking: str) -> ValueError:
    return ValueError(f"clip: expected the one that {concept.name} was trained on, got one without {lacking}")


def _scalable(change: Any, own: Mapping[str, list], key: str) -> Any:
    """A change to a text encoder as a ComfyUI patch; None if it changes nothing."""
    if is_whole(change) and key.endswith("token_embedding.weight"):
        # Rows after the vocabulary belong to placeholders, whose embeddings are given as tokens.
        change = ("set", (change[1][0][: len(own[key][0][0])],))
    return host_patch(change, own, key)


def save(concept: Concept, folder: Path, filename: str, format: str = AS_CONCEPT, rank: int = 0) -> str:
    """Saves a concept, and returns a report of the files.

    AS_CONCEPT writes `folder`/concepts/`filename`.safetensors. AS_LORA writes `folder`/loras/`filename`.safetensors, a
    plain LoRA for ComfyUI's own nodes, and if there is a token `folder`/embeddings/`filename`.safetensors.

    Args:
        concept: its strength, and its changes to text encoders and outside cross-attention, are not saved.
        folder: see above.
        filename: without folders and extension; if a file of this name exists, a number is appended.
        format: one of FORMATS.
        rank: rank to which the differences are compressed; 0 keeps them as they are.

    Raises:
        ValueError: the filename, the rank or, for a LoRA, a layer cannot be used, or the folder cannot be written.
    """
    filename = checked_name(filename)
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if format == AS_CONCEPT:
        writers = {"concepts": concept_files.save}
    else:
        writers = {"loras": partial(concept_files.save_as_lora, layer=family_of_concept(concept.deltas).layer)}
        if concept.tokens:
            writers["embeddings"] = concept_files.save_as_embedding
    for number in count(1):
        name = f"{filename} {number}" if number > 1 else filename
        files = {Path(folder) / kind / f"{name}.safetensors": write for kind, write in writers.items()}
        if not any(file.exists() for file in files):
            break
    for file in files:
        checked_folder(file.parent)
    if rank:
        progress = comfy.utils.ProgressBar(sum(map(len, concept.deltas.values())))

        def after_each():
            comfy.model_management.throw_exception_if_processing_interrupted()
            progress.update(1)

        concept = concept.compressed(rank, after_each)
    for file, write in files.items():
        write(concept, file)
    lines = [f"{file.parent.name}/{file.name}: {file.stat().st_size / 2**20:.1f} MiB" for file in files]
    left_out = {"the text encoder": concept.text_patches, "patches outside cross-attention": concept.others}
    return "\n".join([*lines, *(f"left out: {what}" for what, there in left_out.items() if there)])


def _contents(source: str | Path | Mapping[str, Any] | list, name: str) -> tuple[Any, dict[str, str]]:
    """The contents of a file, and its metadata."""
    if not isinstance(source, (str, Path)):
        return source, {}
    content, about = read(source, name)
    path = Path(source)
    config = path.with_name(PEFT_CONFIG)
    if path.stem == PEFT_FILE and config.is_file():
        about = {**about, "adapter_config": config.read_text(encoding="utf-8", errors="replace")}
    return content, about


def _choose(found: Tokens, placeholder: str) -> tuple[str, Mapping[str, torch.Tensor]]:
    """The chosen placeholder and its tokens."""
    if len(found) > 1 and placeholder not in found:
        raise ValueError(f"placeholder: expected one of the file's tokens {', '.join(found)}, got {placeholder!r}")
    if len(found) > 1:
        return placeholder, found[placeholder]
    for own, token in found.items():
        return placeholder or own, token
    return placeholder, {}
