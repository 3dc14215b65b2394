"""Trains a prior, in one process or many."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from ...encoders.caption_prior import HEADS
from ...encoders.files import whole_file
from ..base import Vocabulary, open_base
from ..data.dataset import item_generator
from ..data.pictures import find_pictures
from ..draws import Shares, load_batches
from ..on_pictures import accelerator_of, train_on_pictures
from ..options import RUN_LEAST, check_run
from ..promptnet.pictures import read_square
from .model import UNCONDITIONAL, PriorTraining

MEASURED = 1024
"""Pictures whose embeddings decide how embeddings are scaled."""
_LEAST = {**RUN_LEAST, "learning_rate": 0, "inner": 2, "heads": 1, "layers": 1}
_PREFIX = "prior."


class Captioned(torch.utils.data.Dataset):
    """Pictures with captions: `dataset[row, epoch]` is a dict of `target` (3, R, R) in [-1, 1], `caption`, which is
    empty in a tenth of the cases, and the draws `noise` (width,) and `t`.

    Raises:
        FileNotFoundError: there is no picture with a caption.
    """

    def __init__(self, root: Path, resolution: int, width: int, seed: int = 0):
        self.files = [file for file in find_pictures(root) if file.with_suffix(".txt").exists()]
        if not self.files:
            raise FileNotFoundError(f"--data: expected a folder with pictures and their captions (.txt), got {root}")
        self.resolution, self.width, self.seed = resolution, width, seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        row, epoch = key
        generator = item_generator(self.seed, epoch, row)
        said = float(torch.rand((), generator=generator)) >= UNCONDITIONAL
        text = self.files[row].with_suffix(".txt").read_text(encoding="utf-8").strip()
        return {
            "target": read_square(self.files[row], self.resolution),
            "caption": text if said else "",
            "noise": torch.randn(self.width, generator=generator),
            "t": torch.randint(1000, (), generator=generator),
        }


def collate(items: Sequence[dict], vocabulary: Vocabulary) -> dict[str, torch.Tensor]:
    """Items of `Captioned` as a batch, with `tokens` (n, 77)."""
    batch = {name: torch.stack([item[name] for item in items]) for name in ("target", "noise", "t")}
    return {**batch, "tokens": torch.tensor([vocabulary.row(item["caption"]) for item in items])}


def train(options: Namespace, file: Path) -> None:
    """Runs the training of `options` (see the package) and writes its result to `file`.

    Raises:
        ValueError, FileNotFoundError: an option cannot be used; the message says which and why.
    """
    check_run(options, _LEAST)
    if options.inner % (2 * options.heads):
        raise ValueError(f"--inner: expected a multiple of twice the heads ({2 * options.heads}), got {options.inner}")
    base = open_base(options.base, options.vision, options.resolution)
    model = PriorTraining(base, options.inner, options.heads, options.layers, options.seed)
    data = Captioned(options.data, base.resolution, model.prior.config.width, options.seed)
    accelerator = accelerator_of(options)
    # Of the same pictures whenever the run continues.
    rows = range(0, len(data), max(1, len(data) // MEASURED))
    pictures = (torch.stack([data[row, 0]["target"] for row in rows[i : i + 64]]) for i in range(0, len(rows), 64))
    model.measure(torch.cat([model.see(some) for some in pictures]))
    kind = {"inner": options.inner, "heads": options.heads, "layers": options.layers}
    weights = [p for p in model.prior.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, options.learning_rate, weight_decay=1e-2)

    def batches(shares: Shares):
        for batch in load_batches(data, shares, options.workers, partial(collate, vocabulary=model.vocabulary)):
            yield {name: tensor.to(accelerator.device) for name, tensor in batch.items()}

    run = train_on_pictures(options, accelerator, model, optimizer, len(data), batches, kind)
    if run:
        state = {key.removeprefix(_PREFIX): v for key, v in run.best_state().items() if key.startswith(_PREFIX)}
        with whole_file(file) as part:
            save_file(
                {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()},
                part,
                {HEADS: str(options.heads)},
            )
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")
