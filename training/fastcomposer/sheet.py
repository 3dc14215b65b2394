"""Sheets of samples that show, during a run, what it has learned."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from ..data.dataset import SubjectPictures
from ..data.folder import ID_LISTS
from ..shapeland.common import save_sheet
from .batches import collate
from .model import FastComposer

PICTURES, STEPS, GUIDANCE = 8, 25, 5.0
# The share of steps that see the subjects, as published.
ALPHA = 0.7
_SCALED_TO = 128


def open_sheet(root: Path, model: FastComposer, object_types: list[str] | None = None):
    """A function of a path that writes a sheet there; see `draw_sheet`.

    It shows held-out pictures if the data has any, first those with two subjects.
    """
    held_out = Path(root) / ID_LISTS["test"]
    names = "test" if held_out.exists() and held_out.read_text(encoding="utf-8").split() else "train"
    base = model.base
    data = SubjectPictures(
        root,
        names,
        base.resolution,
        base.vision.config.image_size,
        object_types=object_types,
        uncondition=0,
        object_appear=1,
        augment=False,
    )
    counts = [min(2, len(data.folder.matched(image_id)[1])) for image_id in data.ids]
    chosen = sorted(range(len(data)), key=lambda row: -counts[row])[:PICTURES]
    return partial(draw_sheet, model, collate([data[row] for row in chosen], base.vocabularies))


@torch.no_grad()
def draw_sheet(model: FastComposer, batch: dict[str, torch.Tensor], path: Path) -> None:
    """Draws a row for each picture of the batch: its first two subjects, itself, a sample of its caption alone, and one
    whose last steps see the subjects (delayed subject conditioning, arXiv 2305.10431, section 4.3)."""
    device, base = next(model.parameters()).device, model.base
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    given = batch["tokens"], batch["objects"], batch["rows"]
    text = model.states(*given, torch.zeros_like(batch["present"]))
    subjects = model.states(*given, batch["present"])
    empty = torch.tensor([[vocabulary.row("") for vocabulary in base.vocabularies]], device=device)
    unconditional = model.states(empty.expand_as(given[0]), *given[1:], torch.zeros_like(batch["present"]))
    switch, count = round((1 - ALPHA) * STEPS), len(unconditional[0])

    def drawn(late):
        latents = base.sample(unconditional, lambda i, *_: text if i < switch else late, count, STEPS, GUIDANCE, seed=0)
        return model.autoencoder.decode(latents)

    plain, composed = drawn(text), drawn(subjects)
    references = F.interpolate(batch["objects"][:, :2].flatten(0, 1), (base.resolution,) * 2) * 2 - 1
    rows = torch.stack((*references.unflatten(0, (-1, 2)).unbind(1), batch["picture"], plain, composed), 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_sheet(rows.flatten(0, 1), path, columns=rows.shape[1], scale=max(1, _SCALED_TO // base.resolution))
