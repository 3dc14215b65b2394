"""The pictures that a PromptNet is trained on: any folder, in which a subfolder holds pictures of the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ...subjects.pictures import middle_square
from ..base import LENGTH, Vocabulary
from ..data.dataset import item_generator
from ..data.pictures import find_pictures

PLACE = "{}"
"""Where the thing is in a caption."""


class Things(torch.utils.data.Dataset):
    """Pictures, each with a reference: another picture of the same thing, or itself where it is the only one.

    A subfolder is one thing. Pictures in the folder itself are of a thing each. `dataset[row, epoch]` is a dict of

    - `target`, `reference`: (3, R, R) in [-1, 1], the middle squares
    - `caption`: from the text file of the same name, or the given one, with {} where the thing is

    Args:
        root: the folder.
        caption: for pictures without a text file.
        resolution: R, in pixels.
        seed: of the references.

    Raises:
        FileNotFoundError: there is no picture.
        ValueError: a caption does not have {} exactly once.
    """

    def __init__(self, root: Path, caption: str, resolution: int, seed: int = 0):
        root = Path(root)
        self.files = find_pictures(root)
        self.captions = [_caption(file, caption) for file in self.files]
        groups: dict[Path, list[int]] = {}
        for row, file in enumerate(self.files):
            groups.setdefault(file if file.parent == root else file.parent, []).append(row)
        self.others = {row: [r for r in rows if r != row] or [row] for rows in groups.values() for row in rows}
        self.resolution, self.seed = resolution, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, str | torch.Tensor]:
        row, epoch = key
        others = self.others[row]
        chosen = int(torch.randint(len(others), (), generator=item_generator(self.seed, epoch, row)))
        return {
            "target": read_square(self.files[row], self.resolution),
            "reference": read_square(self.files[others[chosen]], self.resolution),
            "caption": self.captions[row],
        }


def _caption(file: Path, caption: str) -> str:
    beside = file.with_suffix(".txt")
    found = beside.read_text(encoding="utf-8").strip() if beside.exists() else caption
    if found.count(PLACE) != 1:
        where = beside.name if beside.exists() else "--caption"
        raise ValueError(f"{where}: expected {PLACE} exactly once, where the thing is, got {found!r}")
    return found


def read_square(file: Path, side: int) -> torch.Tensor:
    """The middle square of a picture, (3, side, side) in [-1, 1]."""
    with Image.open(file) as opened:
        image = torch.from_numpy(np.array(ImageOps.exif_transpose(opened).convert("RGB")))
    square = middle_square(image).movedim(-1, 0)[None].float()
    return F.interpolate(square, (side, side), mode="bicubic", antialias=True)[0].clamp(0, 255) / 127.5 - 1


def tokens_of(vocabulary: Vocabulary, caption: str) -> tuple[list[int], int]:
    """The 77 token ids of a caption with one token in the place of {}, and the row of that token.

    Raises:
        ValueError: the caption is too long for its thing to be within the 77 tokens.
    """
    before, after = (vocabulary.split(part) for part in caption.split(PLACE))
    place = 1 + len(before)
    if place > LENGTH - 2:
        raise ValueError(f"captions: expected {PLACE} within the first {LENGTH - 2} tokens, got {caption!r}")
    # Whatever token this is, its embedding is replaced. The start token is in every vocabulary.
    return vocabulary.around([*before, vocabulary.start, *after]), place


def collate(items: Sequence[dict], vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    """Items of `Things` as a batch: `target` and `reference` (n, 3, R, R), `tokens` (n, 77) and `place` (n,), int64."""
    rows = [tokens_of(vocabulary, item["caption"]) for item in items]
    return {
        **{name: torch.stack([item[name] for item in items]) for name in ("target", "reference")},
        "tokens": torch.tensor([tokens for tokens, _ in rows]),
        "place": torch.tensor([place for _, place in rows]),
    }
