"""The UNet's training data, on the device that trains: latents, captions and the truth about each thing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...shapeland import models
from ...shapeland.autoencoder import FACTOR, Autoencoder
from ..loop import bfloat16_where_fast
from .common import pixels, tokens
from .scenes import SHARD, Scenes

_PIXELS = FACTOR**2


@dataclass(frozen=True)
class SceneBatch:
    """A batch of n pictures.

    Attributes:
        latents: (n, 8, 16, 16), of unit variance.
        words: (n, MAX_WORDS) int64, see `scenes.WORDS`.
        cells: (n, 3, 16, 16), the share of each latent cell that each thing covers.
        classes: (n, 3, 4) int64, noun, color, second color and pattern of each thing, -1 if there is none.
        describes: (n, 3, 77), 1 where a token describes the thing.
        named: (n, 3, 16, 16), like `cells`, for all things together that the caption names with the thing's noun.
        present: (n, 3), 1 if there is a thing.
    """

    latents: torch.Tensor
    words: torch.Tensor
    cells: torch.Tensor
    classes: torch.Tensor
    describes: torch.Tensor
    named: torch.Tensor
    present: torch.Tensor

    def tokens(self, unconditional: torch.Tensor) -> torch.Tensor:
        """Compact tokens (n, 77) of the captions, empty for the `unconditional` (n,)."""
        return tokens(torch.where(unconditional[:, None], 0, self.words), self.words.device)


def covered(label: torch.Tensor) -> torch.Tensor:
    """How many pixels of each latent cell each thing of `label` (n, H, W) covers: (n, 3, h, w), uint8."""
    blocks = label.unflatten(2, (-1, FACTOR)).unflatten(1, (-1, FACTOR))
    return torch.stack([(blocks == i + 1).sum((2, 4), dtype=torch.uint8) for i in range(3)], 1)


@torch.no_grad()
def encoded(data: Scenes, autoencoder: Autoencoder, folder: Path, device: str) -> torch.Tensor:
    """Latents (pictures, 8, 16, 16) of all shards in fp16, encoded once and stored in `folder`, one file per shard."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for shard, images in enumerate(data.shards("image")):
        path = folder / f"{shard:04d}.npy"
        if not path.exists():
            with bfloat16_where_fast(device):
                parted = np.split(images, SHARD // 32)
                chunks = [autoencoder.encode(pixels(some, device)).half().cpu() for some in parted]
            np.save(path, torch.cat(chunks).numpy())
        parts.append(torch.from_numpy(np.load(path)))
    return torch.cat(parts)


class LatentScenes:
    """The pictures of all shards, held in memory in compact form.

    `trained` is the number of pictures to train on; the last shard is held out.
    """

    def __init__(self, data: Scenes, latents: torch.Tensor, device: str):
        fields = {name: data.whole(name) for name in ("words", "noun", "color", "noun_word", "describes")}
        self._fields = {name: torch.from_numpy(field).to(device) for name, field in fields.items()}
        labels = (torch.from_numpy(np.array(label)).to(device) for label in data.shards("label"))
        self._cells = torch.cat([covered(label) for label in labels])
        self._latents = latents.to(device)
        self.device, self.trained = device, len(latents) - SHARD

    def take(self, rows: np.ndarray) -> SceneBatch:
        """The pictures `rows` (n,)."""
        rows = torch.from_numpy(rows).to(self._latents.device)
        words, noun, color, noun_word, describes = (field[rows] for field in self._fields.values())
        present = noun >= 0
        cells = self._cells[rows].float() / _PIXELS
        shared = (noun_word[:, :, None] == noun_word[:, None]) & present[:, None]
        marks = torch.zeros(len(rows), 3, models.TOKENS, device=rows.device)
        # The start token comes before the first word.
        marks[:, :, 1 : 1 + describes.shape[2]] = describes.float()
        return SceneBatch(
            self._latents[rows].float(),
            words.long(),
            cells,
            torch.cat((noun[..., None], color), -1).long(),
            marks,
            torch.einsum("nij,njhw->nihw", shared.float(), cells).clamp(max=1),
            present.float(),
        )
