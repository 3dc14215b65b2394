"""Concepts of a bank on the host: read against a MODEL, put into its keys and values, written again.

A concept is what a fine-tuned model changes in the MODEL's own cross-attention (Concept Weaver, arXiv 2404.03913, and
Custom Diffusion, arXiv 2212.04488). The model is never changed: its layers are asked for keys and values, and the
concept's share is added, so LoRAs on the model, quantised weights and the host's memory management stay in force.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch

from ..encoders import concept_files, concept_formats
from ..encoders.concept_formats import Tokens
from ..encoders.concepts import PARTS, Concept, Key, layer_name
from ..encoders.files import checked_folder, checked_name
from .concept_weights import check_fit, difference, is_whole, lora_patches, read_weights, unpatched
from .sites import Site

log = logging.getLogger("conceptloom")

AS_CONCEPT, AS_LORA = "concept", "LoRA"
FORMS = (AS_CONCEPT, AS_LORA)


def load_concept(
    model,
    source: str | Path | Mapping[str, Any],
    tokens: str | Path | Mapping[str, Any] | None = None,
    class_word: str = "",
    placeholder: str = "",
    strength: float = 1.0,
    name: str = "",
) -> Concept:
    """A concept from a file of any known format, as differences to a MODEL's own weights.

    Args:
        model: the host's MODEL that the concept is to be used on; its LoRAs do not matter.
        source: path or loaded state of the concept's file.
        tokens: the same of a file with its token, where that is kept apart.
        class_word: what kind of thing it is; empty keeps what the file says.
        placeholder: which of the file's tokens it is; the name that a single token shall have; empty keeps its own.
        strength: factor of the differences.
        name: what reports call it; empty means the file's name.

    Raises:
        ValueError: the file is none of a concept, is for another model, is not whole or holds numbers that are not
            finite, or the placeholder is not there.
    """
    from_path = not isinstance(source, Mapping)
    name = name or (Path(source).stem if from_path else "concept")
    if from_path and concept_files.is_concept_file(source):
        concept = concept_files.load(source)
        check_fit(concept, model)
        found = {concept.placeholder: concept.tokens} if concept.tokens else {}
    else:
        file = concept_formats.read(_state(source, "file"))
        concept, found = read_weights(file, model, name), file.tokens
    if tokens is not None:
        if found:
            raise ValueError(f"token_file: none is wanted, for the file itself holds the token {next(iter(found))}")
        found = concept_formats.read_tokens(_state(tokens, "token_file"))
    placeholder, token = _choose(found, placeholder.strip())
    return replace(
        concept,
        name=name,
        class_word=class_word.strip() or concept.class_word,
        placeholder=placeholder,
        tokens=token,
        strength=strength,
    )


def describe(concept: Concept) -> str:
    """What was found in a concept's file, and what of it is not the business of cross-attention."""
    parts = [part for parts in concept.deltas.values() for part in parts]
    counts = ", ".join(f"{parts.count(part)} {name}" for part, name in PARTS.items() if part in parts)
    lines = [f"{concept.name}: {concept.source_format}", f"cross-attention: {len(concept.deltas)} layers ({counts})"]
    for encoder, token in concept.tokens.items():
        lines.append(f"token {concept.placeholder}: {len(token)} of width {token.shape[1]} for text encoder {encoder}")
    if concept.text_patches:
        lines.append(f"text encoder: {sum(map(len, concept.text_patches.values()))} tensors, for its own prompt")
    if concept.others:
        lines.append(f"elsewhere in the model: {len(concept.others)} patches, for its own part of the picture")
    return "\n".join(lines)


def keys_and_values(concept: Concept, model, site: Site, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A concept's keys and values at a cross-attention site, for text states: K = to_k(p) + strength p delta_k^T, and V
    likewise.

    Args:
        concept: of this model's architecture.
        model: the host's BaseModel, loaded.
        site: of kind CROSS.
        context: (B, L, text width) states of the concept's prompt, on the device and in the dtype of the model.

    Returns:
        Keys and values, (B, L, C).
    """
    deltas = concept.deltas.get(site.key, {})
    outputs = []
    for part in ("k", "v"):
        out = layer_module(model, site.key, part)(context)
        if part in deltas and concept.strength:
            out = out + concept.strength * deltas[part].apply(context)
        outputs.append(out)
    return outputs[0], outputs[1]


def layer_module(model, key: Key, part: str) -> torch.nn.Module:
    """The linear layer of a BaseModel's cross-attention that a part of a concept is a difference to."""
    return model.diffusion_model.get_submodule(f"{layer_name(key)}.{PARTS[part]}")


def check_tokens(concept: Concept, clip) -> None:
    """Raises ValueError where a concept's tokens do not fit a CLIP's text encoders; the host would drop them without a
    word."""
    if not concept.tokens:
        return
    names = list(clip.tokenize(""))
    widths = {name: getattr(getattr(clip.tokenizer, f"clip_{name}", None), "embedding_size", None) for name in names}
    given = {encoder: token.shape[1] for encoder, token in concept.tokens.items()}
    if given != widths:
        says = [", ".join(f"{name} {width}" for name, width in side.items()) for side in (widths, given)]
        raise ValueError(f"clip: one of the width of {concept.name}'s token ({says[1]}) is wanted, not {says[0]}")


def with_text(concept: Concept, clip):
    """A clone of a CLIP with what the concept changes in text encoders, for the concept's own prompt alone; the CLIP
    itself if that is nothing.

    Raises:
        ValueError: the CLIP is of another architecture.
    """
    if not concept.text_patches or not concept.strength:
        return clip
    own = clip.get_key_patches()
    patches: dict[str, Any] = {}
    for encoder, state in concept.text_patches.items():
        if encoder == "lora":
            found, unknown = lora_patches(state, comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
            foreign = None if found else next(iter(unknown), None)
            if found and unknown:
                log.warning("%s: %d tensors are for no layer of this CLIP", concept.name, len(unknown))
        else:
            found = {f"clip_{encoder}.transformer.{key}": ("set", (tensor,)) for key, tensor in state.items()}
            found = {key: patch for key, patch in found.items() if not key.endswith("position_ids")}
            foreign = next((key for key in found if key not in own), None)
        if foreign:
            raise ValueError(f"clip: the one that {concept.name} was trained on is wanted, not one without {foreign}")
        patches |= found
    scalable = {key: _scalable(patch, own, key) for key, patch in patches.items()}
    clip = clip.clone()
    clip.add_patches({key: patch for key, patch in scalable.items() if patch is not None}, concept.strength)
    return clip


def _scalable(patch: Any, own: Mapping[str, list], key: str) -> Any:
    """A patch of a text encoder, made sure to fit, in a form that a strength can scale; None if it changes nothing."""
    base = unpatched(own, key)
    whole = is_whole(patch)
    if whole and key.endswith("token_embedding.weight"):
        # Rows behind the vocabulary are the placeholders', which come as tokens.
        patch = ("set", (patch[1][0][: len(base)],))
    changed = difference(patch, base, key)
    if not whole:
        return patch
    return ("diff", changed) if changed[0].any() else None


def save(concept: Concept, folder: Path, filename: str, form: str = AS_CONCEPT, rank: int = 0) -> str:
    """Writes a concept and returns a report of the files.

    AS_CONCEPT makes `folder`/concepts/`filename`.safetensors. AS_LORA makes `folder`/loras/`filename`.safetensors, a
    plain LoRA for the host's own nodes, and `folder`/embeddings/`filename`.safetensors with the token if there is one.

    Args:
        concept: what to write; its strength, its text encoder and its patches elsewhere are not written.
        folder: see above.
        filename: without folders and ending; where a file of the name exists, a number is put after it.
        form: one of FORMS.
        rank: of the factors that the differences are compressed to; 0 leaves them as they are.

    Raises:
        ValueError: the filename or the rank cannot be used, or the folder cannot be written.
    """
    filename = checked_name(filename)
    if form not in FORMS:
        raise ValueError(f"form: one of {', '.join(FORMS)} is wanted, not {form!r}")
    if form == AS_CONCEPT:
        writers = {"concepts": concept_files.save}
    else:
        writers = {"loras": concept_files.save_as_lora}
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


def _state(source: str | Path | Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    try:
        return comfy.utils.load_torch_file(str(source), safe_load=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name}: a file of tensors is wanted, but {Path(source).name} holds Python objects, which could run code"
        ) from error


def _choose(found: Tokens, placeholder: str) -> tuple[str, Mapping[str, torch.Tensor]]:
    """The placeholder and its tokens."""
    if len(found) > 1 and placeholder not in found:
        raise ValueError(f"placeholder: one of the file's tokens {', '.join(found)} is wanted, not {placeholder!r}")
    if len(found) > 1:
        return placeholder, found[placeholder]
    for own, token in found.items():
        return placeholder or own, token
    return placeholder, {}
