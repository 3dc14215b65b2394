"""Stage 'images': copies pictures into the layout that all other stages read."""

from __future__ import annotations

import shutil
from pathlib import Path

from PIL import Image, ImageOps

from ...encoders.files import whole_file
from .folder import IMAGE, Folder, work_through

SOURCES = "image_sources.txt"
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_ORIENTATION = 0x0112


def collect_images(root: Path, source: Path) -> None:
    """Puts every picture under `source` into `root` as `<id[:5]>/<id>.jpg`, with ids of eight digits.

    An upright RGB JPEG is copied byte by byte; any other picture is turned upright and saved at quality 95.
    `image_sources.txt` records which file became which id; files that it already lists are skipped, so that a second
    call adds what is new.

    Raises FileNotFoundError or ValueError if `source` is not a folder or holds no picture.
    """
    source = Path(source).resolve()
    if not source.is_dir():
        raise FileNotFoundError(f"--from: expected a folder with pictures, got {source}")
    found = sorted(p for p in source.rglob("*") if p.suffix.lower() in _ENDINGS)
    if not found:
        raise ValueError(f"--from: expected a folder with pictures ({', '.join(_ENDINGS)}), got {source} without any")
    Path(root).mkdir(parents=True, exist_ok=True)
    folder, ledger = Folder(root), Path(root) / SOURCES
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else []
    known = dict(reversed(line.split("\t", 1)) for line in lines)
    new = [p for p in found if str(p) not in known]
    first = _first_free(Path(root), set(known.values()))
    with ledger.open("a", encoding="utf-8") as file:

        def put(paths: list[Path]) -> None:
            nonlocal number
            for path in paths:
                _put(path, folder.path(f"{number:08d}", IMAGE))
                # Listed only once the picture is written: after an interruption it is written again, under the same id.
                file.write(f"{number:08d}\t{path}\n")
                file.flush()
                number += 1

        number = first
        work_through("images", ([p] for p in new), len(new), put)


def _first_free(root: Path, listed: set[str]) -> int:
    """The number after those of all pictures in a folder, of which others than the `listed` may be of another stage or
    put there by hand."""
    others = {p.stem for p in root.glob(f"*/*{IMAGE}") if p.stem.isdigit()} - listed
    after = 1 + max((int(name) for name in listed), default=-1)
    # Written by an interrupted call, which had not listed it yet: it is written again.
    if others == {f"{after:08d}"} and len(list(root.glob(f"*/{after:08d}.*"))) == 1:
        return after
    return max(after, 1 + max((int(name) for name in others), default=-1))


def _put(source: Path, target: Path) -> None:
    with Image.open(source) as picture, whole_file(target) as part:
        if picture.format == "JPEG" and picture.mode == "RGB" and picture.getexif().get(_ORIENTATION, 1) == 1:
            shutil.copyfile(source, part)
        else:
            ImageOps.exif_transpose(picture).convert("RGB").save(part, "JPEG", quality=95, subsampling=0)
