"""Reads files of weights, writes files either whole or not at all, and checks names of files."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open

SAFETENSORS, TORCH = "safetensors", "torch"
Net = TypeVar("Net", bound=torch.nn.Module)

_AGAIN, _CODE = "fetch it again", ", which could run code: get the weights as safetensors"
_TORN = f"a damaged file of torch, or a part of one: {_AGAIN}"
_OBJECTS = ("Unsupported global", "Unsupported class", "Only persistent_load of storage")
"""What torch's error messages say about an intact pickle that holds more than tensors."""
_STARTS = (
    (b"version https://git-lfs", "a git-lfs pointer: fetch the file itself (git lfs pull)"),
    (b"\x1f\x8b", "a gzip archive: unpack it"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it"),
    (b"Rar!", "a rar archive: unpack it"),
    (b"GGUF", "a GGUF file: fetch the model as safetensors"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"RIFF", "a picture or a sound"),
)
_WEB = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<body")
_OLD_TORCH = bytes.fromhex("6cfc9c46f9206aa85019")
"""The number at the start of torch's files from before they were zip archives."""
_MOST_HEADER = 100_000_000


class Contents(NamedTuple):
    """The contents of a file of weights.

    Attributes:
        value: from safetensors, tensors by name; from torch, whatever was saved, with tensors in plain containers.
        metadata: metadata of safetensors.
    """

    value: Any
    metadata: dict[str, str]


def read(path: Path | str, name: str = "file") -> Contents:
    """Reads a file of weights onto the CPU, whatever its extension: safetensors, or a file that torch wrote. No code
    from the file is run.

    Args:
        path: path of the file.
        name: the input that error messages name.

    Raises:
        ValueError: it is not such a file, with what it seems to be instead, or it is damaged.
    """
    path = Path(path)
    if check(path, name) == SAFETENSORS:
        with safe_open(path, framework="pt") as file:
            return Contents({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
    try:
        # The original textual inversion embeddings hold this container.
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            return Contents(torch.load(path, map_location="cpu", weights_only=True), {})
    except Exception as error:  # torch and pickle raise many kinds for damaged files
        objects = isinstance(error, pickle.UnpicklingError) and any(sign in str(error) for sign in _OBJECTS)
        what = f"a pickle of Python objects{_CODE}" if objects else _TORN
        raise _refusal(path, name, what) from None


def read_state(path: Path | str, name: str = "file") -> dict[str, torch.Tensor]:
    """Reads a file that holds tensors by name, at the top level or under "state_dict".

    Raises:
        ValueError: as in `read`, or the file holds anything else.
    """
    return state_of(read(path, name).value, Path(path), name)


def state_of(value: Any, path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors by name in the content of a file, at the top level or under "state_dict".

    Raises:
        ValueError: it holds anything else.
    """
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: expected tensors by name, got {path.name} with a {type(value).__name__}")
    for key, tensor in value.items():
        if not torch.is_tensor(tensor):
            raise ValueError(
                f"{name}: expected tensors by name, got {path.name}, where {key!r} is a {type(tensor).__name__}"
            )
    return dict(value)


def load_exactly(
    make: Callable[..., Net], state: Mapping[str, torch.Tensor], what: str, operations: Any = torch.nn, **settings
) -> Net:
    """A network for inference with weights that must be its own, by name and shape.

    Args:
        make: (operations, **settings) -> the network.
        state: the weights.
        what: what they are to be, for the error message.
        operations, settings: of its layers.

    Raises:
        ValueError: weights are missing, unknown, or of another shape.
    """
    # Asked of torch's layers, because those of ComfyUI may have no weights before they are loaded.
    with torch.device("meta"):
        own = {key: value.shape for key, value in make(torch.nn).state_dict().items()}
    wrong = next((key for key in {**own, **state} if own.get(key) != getattr(state.get(key), "shape", None)), None)
    if wrong is not None:
        given, wanted = _shape(getattr(state.get(wrong), "shape", None)), _shape(own.get(wrong))
        raise ValueError(f"file: expected the weights of {what}, got {given} for {wrong}, where it has {wanted}")
    net = make(operations, **settings)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def _shape(shape: torch.Size | None) -> str:
    if shape is None:
        return "nothing"
    return " x ".join(map(str, shape)) or "a number"


def check(path: Path | str, name: str = "file") -> str:
    """The format of a file of weights, SAFETENSORS or TORCH, from its beginning and its table of contents.

    Raises:
        ValueError: it has neither format, or is damaged.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        what = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise ValueError(f"{name}: expected a file of weights, got {path.name}, which {what}") from error
    # First, because the size at the start of safetensors may look like any other magic number.
    if _header_size(head):
        try:
            with safe_open(path, framework="pt"):
                return SAFETENSORS
        except (SafetensorError, OSError):
            raise _refusal(path, name, _broken_safetensors(path, size)) from None
    if head.startswith(b"PK"):
        return _check_zip(path, name)
    if head.startswith(b"\x80"):
        if size > len(_OLD_TORCH) and _OLD_TORCH not in head[:40]:
            raise _refusal(path, name, f"a pickle that torch did not write{_CODE}")
        return TORCH
    raise _refusal(path, name, _other(head, size))


def check_folder(folder: Path | str, name: str = "file") -> None:
    """Checks the weights in a folder that diffusers or transformers saved, whose own error messages are not for users.

    Raises:
        ValueError: as in `check`, for the first file that is not one of weights or is damaged.
    """
    for pattern in ("*model*.safetensors", "*model*.bin"):
        for file in sorted(Path(folder).glob(pattern)):
            check(file, name)


def _refusal(path: Path, name: str, what: str) -> ValueError:
    return ValueError(f"{name}: expected a file of weights, got {path.name}, which seems to be {what}")


def _other(head: bytes, size: int) -> str:
    """What a file is, from its first bytes, if it is not a file of weights."""
    if not size:
        return f"empty: {_AGAIN}"
    known = next((what for start, what in _STARTS if head.startswith(start)), None)
    if known:
        return known
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_WEB):
        return "a web page: fetch the file itself, not the page about it"
    try:
        text = head[:-3].decode() if len(head) == 512 else head.decode()
    except UnicodeDecodeError:
        text = ""
    if text and all(letter.isprintable() or letter.isspace() for letter in text):
        return f"text that begins with {text.strip()[:20]!r}: fetch the file itself"
    return "of another program than safetensors or torch"


def _header_size(head: bytes) -> int:
    """Size in bytes of the header of safetensors; 0 if these are not its first bytes."""
    size = int.from_bytes(head[:8], "little")
    return size if head[8:9] == b"{" and size <= _MOST_HEADER else 0


def _broken_safetensors(path: Path, size: int) -> str:
    with open(path, "rb") as file:
        header_size = _header_size(file.read(9))
        file.seek(8)
        header = file.read(header_size)
    wanted = 8 + header_size
    if len(header) == header_size:
        try:
            tensors = [about for about in json.loads(header).values() if "data_offsets" in about]
            wanted += max((about["data_offsets"][1] for about in tensors), default=0)
        except (ValueError, TypeError, AttributeError, LookupError):
            wanted = size
    if size < wanted:
        return f"the beginning of a safetensors file, {size} of at least {wanted} bytes: {_AGAIN}"
    return f"a damaged safetensors file: {_AGAIN}"


def _check_zip(path: Path, name: str) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.rpartition("/")[2] for entry in archive.namelist()]
    except (zipfile.BadZipFile, OSError, ValueError):
        raise _refusal(path, name, _TORN) from None
    if "data.pkl" not in names:
        raise _refusal(path, name, "a zip archive: unpack it")
    if "constants.pkl" in names:
        raise _refusal(path, name, f"a TorchScript program{_CODE}")
    return TORCH


LONGEST_NAME = 200
"""Longest name in bytes, which leaves room for a number and an extension: file systems allow 255."""

# What names must not contain on at least one of the systems that ComfyUI runs on.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


def checked_name(name: str) -> str:
    """A file name without whitespace at its ends.

    Raises:
        ValueError: it is blank, too long, or has characters that not every system allows in file names.
    """
    name = name.strip()
    if not name.strip("."):
        raise ValueError("filename: expected a name, got an empty text")
    found = _FORBIDDEN.search(name)
    if found:
        raise ValueError(f'filename: expected a name without folders or any of <>:"|?*, got {found[0]!r} in {name!r}')
    length = len(name.encode())
    if length > LONGEST_NAME:
        raise ValueError(f"filename: expected at most {LONGEST_NAME} bytes, got {length}")
    return name


def checked_folder(folder: Path) -> None:
    """Creates a folder, and checks that it can be written to.

    Raises:
        ValueError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".conceptloom.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"folder: expected one that can be written, got {folder} ({error.strerror})") from error


def free_file(folder: Path, name: str, ending: str = ".safetensors") -> Path:
    """A file in a folder that does not exist yet: `name` with the ending, or with a number in between. The folder is
    created.

    Raises:
        ValueError: the name cannot be used, or the folder cannot be written.
    """
    name = checked_name(name)
    checked_folder(folder)
    names = (f"{name} {number}" if number > 1 else name for number in count(1))
    return next(file for one in names if not (file := folder / f"{one}{ending}").exists())


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """Yields a path to write to. The file is renamed to `path` only when everything is written: an interruption leaves
    the previous file. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
