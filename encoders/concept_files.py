"""Files of concepts: the pack's own format, and formats that other programs read.

The pack's own format is safetensors with the keys <part>.<layer>.d for a difference, .u and .v for its factors, .b for
a bias, and emb.<encoder> for a token, and with JSON under `FORMAT` in the metadata. A layer has its name in
`Concept.deltas`, such as output.6.0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .concepts import ENCODERS, PARTS, Concept, Delta
from .files import read, whole_file

FORMAT, VERSION = "conceptloom_concept", 1

_DELTA_NAME = re.compile(rf"({'|'.join(PARTS)})\.(.+)\.(d|u|v|b)")
_TOKEN_NAME = re.compile(rf"emb\.({'|'.join(ENCODERS)})")


def save(concept: Concept, path: Path) -> None:
    """Writes a concept's deltas and tokens as safetensors. The strength is the user's choice and is not stored, nor are
    changes outside cross-attention (`text_patches`, `others`)."""
    state = {f"emb.{encoder}": token.contiguous() for encoder, token in concept.tokens.items()}
    for key, parts in concept.deltas.items():
        for part, delta in parts.items():
            name = f"{part}.{key}"
            ends = ("d",) if len(delta.factors) == 1 else ("u", "v")
            state |= {f"{name}.{end}": matrix for end, matrix in zip(ends, delta.factors, strict=True)}
            if delta.bias is not None:
                state[f"{name}.b"] = delta.bias
    about = {name: getattr(concept, name) for name in ("name", "class_word", "placeholder", "source_format", "base")}
    with whole_file(path) as part_file:
        save_file(state, part_file, metadata={FORMAT: json.dumps({"version": VERSION, **about})})


def is_concept_file(path: Path) -> bool:
    """Whether `save` wrote a file, in any version of the format."""
    try:
        with safe_open(path, framework="pt") as file:
            return FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def load(path: Path) -> Concept:
    """Reads a concept that `save` wrote, at strength 1.

    Raises:
        ValueError: the file has another format or version, or is damaged.
    """
    path = Path(path)
    state, metadata = read(path)
    if FORMAT not in metadata:
        raise ValueError(f"file: expected a concept written by Save Concept, got {path.name}, which is none")
    try:
        about = dict(json.loads(metadata[FORMAT]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"file: expected a whole concept, got {path.name} with a damaged description") from error
    version = about.pop("version", None)
    if version != VERSION:
        raise ValueError(f"file: expected version {VERSION} of the concept format, got {path.name} with {version}")
    tokens, found = {}, {}
    for name, tensor in state.items():
        if match := _TOKEN_NAME.fullmatch(name):
            tokens[match[1]] = tensor
        elif match := _DELTA_NAME.fullmatch(name):
            part, key, end = match.groups()
            found.setdefault(key, {}).setdefault(part, {})[end] = tensor
        else:
            raise ValueError(f"file: expected parts of a concept, got {path.name} with {name!r}")
    try:
        deltas = {
            key: {part: Delta(_factors(ends), ends.get("b")) for part, ends in parts.items()}
            for key, parts in found.items()
        }
        return Concept(deltas=deltas, tokens=tokens, **about)
    except (ValueError, TypeError) as error:
        raise ValueError(f"file: expected a whole concept, got {path.name}: {error}") from error


def _factors(ends: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if set(ends) - {"b"} not in ({"d"}, {"u", "v"}):
        raise ValueError(f"expected a difference or both its factors, got {', '.join(sorted(ends))}")
    return tuple(ends[end] for end in ("d", "u", "v") if end in ends)


def save_as_lora(concept: Concept, path: Path, layer: Callable[[str, str], str]) -> None:
    """Writes a concept's deltas under the names that every LoRA loader reads; factors as such, others in full.

    Args:
        concept: what to write.
        path: path of the file.
        layer: (layer, part) of a delta -> name of the linear layer in the model.
    """
    lora = {}
    for key, parts in concept.deltas.items():
        for part, delta in parts.items():
            name = f"diffusion_model.{layer(key, part)}"
            ends = ("diff",) if len(delta.factors) == 1 else ("lora_up.weight", "lora_down.weight")
            lora |= {f"{name}.{end}": matrix for end, matrix in zip(ends, delta.factors, strict=True)}
            if delta.bias is not None:
                lora[f"{name}.diff_b"] = delta.bias
    with whole_file(path) as part_file:
        save_file(lora, part_file)


def save_as_embedding(concept: Concept, path: Path) -> None:
    """Writes a concept's tokens as a textual inversion embedding, which ComfyUI's prompts name as embedding:name."""
    alone = len(concept.tokens) == 1
    state = {"emb_params" if alone else f"clip_{name}": token.contiguous() for name, token in concept.tokens.items()}
    with whole_file(path) as part_file:
        save_file(state, part_file)
