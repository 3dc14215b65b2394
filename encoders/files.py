"""Files that are there whole or not at all, and their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, whose file takes the name `path` only when all is written: an interruption leaves what was
    there before. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
