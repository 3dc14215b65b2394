"""Files of compositions: safetensors, with everything that is no tensor in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..encoders.files import read, whole_file
from .composition import CAPTION, INSTANCES, MASK, NAMES, PALETTE, SEMANTICS, Caption, Composition, Part
from .instance_map import InstanceMap
from .palette import Palette
from .region import Region
from .semantics import Semantics

FORMAT, VERSION = "conceptloom_composition", 1
_PICTURE = "picture"


def save(composition: Composition, file: Path) -> None:
    """Writes a composition, whole or not at all."""
    tensors: dict[str, torch.Tensor] = {}
    about: dict[str, dict] = {}
    for name, part in composition.parts.items():
        value = part.value
        how = {"strength": part.strength, "start_percent": part.start_percent, "end_percent": part.end_percent}
        if isinstance(value, Caption):
            how["texts"] = value.texts
        elif isinstance(value, Semantics):
            tensors[f"{name}.embedding"] = value.embedding
            how["norm"] = value.norm
            if value.tokens is not None:
                tensors[f"{name}.tokens"] = value.tokens
        elif isinstance(value, Palette):
            tensors[f"{name}.histogram"] = value.histogram
            how |= {"table": value.table, "sigma": value.sigma}
        elif isinstance(value, InstanceMap):
            tensors[f"{name}.labels"] = value.labels
            how["names"] = value.names
        elif isinstance(value, Region):
            tensors[f"{name}.image"], tensors[f"{name}.mask"] = value.image, value.mask
        else:
            tensors[name] = value
        about[name] = how
    if composition.picture is not None:
        tensors[_PICTURE] = composition.picture
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "size": json.dumps(composition.size),
        "parts": json.dumps(about),
    }
    with whole_file(file) as part:
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, part, metadata
        )


def load(path: Path | str, name: str = "file") -> Composition:
    """Reads a composition.

    Args:
        path: of the file.
        name: the input that error messages name.

    Raises:
        ValueError: the file holds something else, is damaged, or is of a newer version.
    """
    tensors, metadata = read(path, name)
    shown = Path(path).name
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{name}: expected a file of Save Composition, got {shown}, which is another kind of file")
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{name}: expected version {VERSION} of the format, got {shown} with version {metadata.get('version')}"
        )
    try:
        size, about = tuple(json.loads(metadata["size"])), json.loads(metadata["parts"])
        parts = {
            kind: Part(_value(kind, tensors, how), how["strength"], how["start_percent"], how["end_percent"])
            for kind, how in about.items()
            if kind in NAMES
        }
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name}: expected a whole file of Save Composition, got {shown} without {error}") from error
    return Composition(size, parts, tensors.get(_PICTURE))


def _value(kind: str, tensors: dict[str, torch.Tensor], how: dict):
    if kind == CAPTION:
        return Caption(tuple((str(text), float(share)) for text, share in how["texts"]))
    if kind == SEMANTICS:
        return Semantics(tensors[f"{kind}.embedding"], tensors.get(f"{kind}.tokens"), how["norm"])
    if kind == PALETTE:
        return Palette(tensors[f"{kind}.histogram"], how["table"], how["sigma"])
    if kind == INSTANCES:
        return InstanceMap(tensors[f"{kind}.labels"], tuple(how["names"]))
    if kind == MASK:
        return Region(tensors[f"{kind}.image"], tensors[f"{kind}.mask"])
    return tensors[kind]
