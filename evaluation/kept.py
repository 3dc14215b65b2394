"""Pictures that a report has drawn, kept on disk so that an interrupted report goes on where it was."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..encoders.files import read, whole_file
from ..shapeland.models import WEIGHTS

Pictures = dict[str, torch.Tensor]
"""Pictures (n, H, W, 3) in [0, 1] by variant."""
_OF, _ORDER = "weights.txt", "variants"


class Kept:
    """Pictures in a folder, or nowhere.

    A folder belongs to the weights that drew its pictures; a change of the code does not show, and wants a new folder.

    Args:
        folder: where to keep them; None keeps none.

    Raises:
        ValueError: the folder's pictures are of other weights.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        own, mark = weights_sum(), folder / _OF
        if not mark.exists():
            with whole_file(mark) as part:
                part.write_text(own, encoding="utf-8")
        elif mark.read_text(encoding="utf-8") != own:
            raise ValueError(f"--keep: expected a new folder, or one of the same weights, got {folder}")

    def drawn(self, name: str, draw: Callable[[], Pictures]) -> Pictures:
        """The pictures of this name, which `draw` makes if they are not there."""
        if self.folder is None:
            return draw()
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            # safetensors refuses tensors that share memory, as variants may, and such whose rows are not in order.
            drawn = {
                variant: pictures.half().clone(memory_format=torch.contiguous_format)
                for variant, pictures in draw().items()
            }
            with whole_file(file) as part:
                save_file(drawn, part, {_ORDER: "\n".join(drawn)})
        pictures, metadata = read(file)
        return {variant: pictures[variant].float() for variant in metadata[_ORDER].split("\n")}


def weights_sum(folder: Path = WEIGHTS) -> str:
    """A checksum of all weights in a folder."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        total.update(file.relative_to(folder).as_posix().encode())
        total.update(file.read_bytes())
    return total.hexdigest()
