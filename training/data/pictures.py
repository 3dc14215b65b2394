"""Folders of pictures, in which some files beside a picture are its maps."""

from __future__ import annotations

from pathlib import Path

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAPS = ("sketch", "depth", "instances")
"""A file NAME.KIND.png of one of these kinds is a map of the picture NAME, not a picture to learn from."""


def find_pictures(root: Path) -> list[Path]:
    """The pictures at any depth of a folder, sorted, without the maps beside them.

    Raises:
        FileNotFoundError: there is none.
    """
    beside = tuple(f".{kind}" for kind in MAPS)
    found = sorted(
        file for file in Path(root).rglob("*") if file.suffix.lower() in ENDINGS and not file.stem.endswith(beside)
    )
    if not found:
        raise FileNotFoundError(f"--data: expected a folder with pictures ({', '.join(ENDINGS)}), got {root}")
    return found
