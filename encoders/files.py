"""Files that are there whole or not at all, their names, and the one reader of files of weights."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

SAFETENSORS, TORCH = "safetensors", "torch"

_AGAIN, _CODE = "fetch it again", ", which could run code: get the weights as safetensors"
_TORN = f"a damaged file of torch, or a part of one: {_AGAIN}"
_OBJECTS = ("Unsupported global", "Unsupported class", "Only persistent_load of storage")
"""What torch's errors say of a whole pickle that holds more than tensors."""
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
"""The number that torch's files began with before they were zip archives."""
_MOST_HEADER = 100_000_000


class Contents(NamedTuple):
    """What a file of weights holds.

    Attributes:
        value: tensors by name from safetensors; from torch whatever was saved, tensors in plain containers.
        metadata: of safetensors.
    """

    value: Any
    metadata: dict[str, str]


def read(path: Path | str, name: str = "file") -> Contents:
    """Reads a file of weights onto the CPU, whatever its ending says: safetensors, or what torch wrote. No code from a
    file is run.

    Args:
        path: of the file.
        name: the input that errors name.

    Raises:
        ValueError: it is no such file, with what it seems to be, or not whole.
    """
    path = Path(path)
    if check(path, name) == SAFETENSORS:
        with safe_open(path, framework="pt") as file:
            return Contents({key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
    try:
        # The first textual inversion embeddings hold this container of torch's.
        with torch.serialization.safe_globals([torch.nn.ParameterDict]):
            return Contents(torch.load(path, map_location="cpu", weights_only=True), {})
    except Exception as error:  # torch and pickle raise all kinds for what is broken
        objects = isinstance(error, pickle.UnpicklingError) and any(sign in str(error) for sign in _OBJECTS)
        what = f"a pickle of Python objects{_CODE}" if objects else _TORN
        raise _refusal(path, name, what) from None


def read_state(path: Path | str, name: str = "file") -> dict[str, torch.Tensor]:
    """Reads a file that holds tensors by name, alone or under "state_dict".

    Raises:
        ValueError: of `read`, or it holds something else.
    """
    return state_of(read(path, name).value, Path(path), name)


def state_of(value: Any, path: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors by name of what was read from a file.

    Raises:
        ValueError: it holds something else.
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


def check(path: Path | str, name: str = "file") -> str:
    """Which format a file of weights has, SAFETENSORS or TORCH, from its beginning and its table of contents.

    Raises:
        ValueError: it has neither, or is not whole.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        what = "is a folder" if path.is_dir() else f"cannot be read ({error.strerror})"
        raise ValueError(f"{name}: expected a file of weights, got {path.name}, which {what}") from error
    # First, for the size that safetensors begin with may look like any other start.
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
    """Checks the weights in a folder that diffusers or transformers saved, whose own errors are not for users.

    Raises:
        ValueError: of `check`, for the first file that is none of weights or not whole.
    """
    for pattern in ("*model*.safetensors", "*model*.bin"):
        for file in sorted(Path(folder).glob(pattern)):
            check(file, name)


def _refusal(path: Path, name: str, what: str) -> ValueError:
    return ValueError(f"{name}: expected a file of weights, got {path.name}, which seems to be {what}")


def _other(head: bytes, size: int) -> str:
    """What a file is by its first bytes, which are not those of a file of weights."""
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
    """Of safetensors' header in bytes; 0 if these are not its first bytes."""
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
"""Bytes of a name that leave room for a number and an ending: file systems hold 255."""

# What no name may hold on one of the systems that the host runs on.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')


def checked_name(name: str) -> str:
    """A name for a file, without blanks at its ends.

    Raises:
        ValueError: it is blank, too long, or has characters that a file's name cannot have everywhere.
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
    """Makes a folder to write to.

    Raises:
        ValueError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".conceptloom.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"folder: expected one that can be written, got {folder} ({error.strerror})") from error


@contextmanager
def whole_file(path: Path) -> Generator[Path]:
    """A path to write to, whose file takes the name `path` only when all is written: an interruption leaves what was
    there before. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
