"""Stage 'fuser': a fuser that adds what a picture shows to a noun's state, to start FastComposer's training from.

The towers were trained on the same things, so mapping a picture of a thing to the words for its looks needs no UNet:
given the state of a noun without attributes and the picture of its thing, the fuser learns to give the state that the
noun has after the words for the thing's colors and pattern.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file

from ...encoders.clip_pixels import normalize
from ...encoders.fastcomposer import FUSER
from ...encoders.files import whole_file
from ...encoders.fuser import Fuser
from ...shapeland import models, world
from ..base import Base, open_base
from ..data.dataset import plain_object, subject_crop
from ..data.folder import Segment, box_of
from ..loop import Run
from ..optimizers import adamw, warmup_cosine
from .common import RUNS, SEED, open_scenes, step_rows
from .scenes import SHARD, Scenes

BATCH, HELD_OUT = 64, 512
_LEAST_PIXELS = 20


def said_and_bare(data: Scenes, rows: np.ndarray, base: Base) -> dict[str, torch.Tensor]:
    """Captions of pictures with the looks of every thing and with none, and each thing that is visible.

    Returns:
        `said` and `bare` (n, towers, 77), tokens; per thing `picture` (m,), the index of its picture; `said_row` and
        `bare_row` (m,), the row of its noun's token; and `object` (m, 3, r, r) in [0, 1], its crop.
    """
    fields = zip(*(data.take(k, rows) for k in ("image", "label", "noun", "color", "background")), strict=True)
    vocabulary, side = base.vocabularies[0], base.vision.config.image_size
    found = {name: [] for name in ("said", "bare", "picture", "said_row", "bare_row", "object")}
    for i, (image, label, nouns, looks, background) in enumerate(fields):
        generator = torch.Generator().manual_seed(SEED + int(rows[i]))
        image, ids = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label.astype(np.int64))
        things = [(int(noun), *map(int, look)) for noun, look in zip(nouns, looks, strict=True) if noun >= 0]
        said, said_at, _ = world.caption_of([world.Mention(t[0], 1, *t[1:]) for t in things], int(background))
        bare, bare_at, _ = world.caption_of([world.Mention(t[0]) for t in things], int(background))
        found["said"].append([vocabulary.row(said)])
        found["bare"].append([vocabulary.row(bare)])
        for number, thing in enumerate(things):
            mask = label == number + 1
            if mask.sum() < _LEAST_PIXELS:
                continue
            segment = Segment(number + 1, box_of(mask), world.NOUNS[thing[0]])
            found["picture"].append(i)
            # Each word is one token, after the start token.
            found["said_row"].append(said_at[number] + 1)
            found["bare_row"].append(bare_at[number] + 1)
            found["object"].append(plain_object(subject_crop(image, ids, segment, generator), side))
    return {name: torch.stack(v) if name == "object" else torch.tensor(v) for name, v in found.items()}


def train_fuser(device: str, steps: int) -> None:
    """Writes fuser.safetensors into the run's folder, and prints how much of what words add to a noun's state the fuser
    finds in held-out pictures."""
    data = open_scenes()
    base = open_base("shapeland")
    for part in (base.towers, base.vision):
        part.requires_grad_(False).to(device)
    torch.manual_seed(SEED)
    fuser = Fuser(models.WIDTH, base.vision.config.projection_dim).to(device)
    run = Run(RUNS / "fuser", fuser, adamw(fuser, 2e-3), steps, SEED, warmup_cosine(50, steps), average=0.98)

    @torch.no_grad()
    def seen(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        batch = {name: tensor.to(device) for name, tensor in said_and_bare(data, rows, base).items()}
        target, own = (base.read(batch[name])[0][batch["picture"], batch[f"{name}_row"]] for name in ("said", "bare"))
        return own, base.vision(normalize(batch["object"])).image_embeds, target

    def loss_of(step: int, _generator: torch.Generator) -> dict[str, torch.Tensor]:
        own, embeds, target = seen(step_rows(step, BATCH, data.count - SHARD))
        return {"squared": (fuser(own, embeds) - target).square().mean()}

    held_out = seen(np.arange(data.count - SHARD, data.count - SHARD + HELD_OUT))

    @torch.no_grad()
    def found() -> float:
        own, embeds, target = held_out
        return 1 - float((fuser(own, embeds) - target).square().sum() / (own - target).square().sum())

    run.train(loss_of, 50, report=lambda _step: {"found": round(found(), 4)}, report_every=250, half=False)
    fuser.load_state_dict(run.best_state())
    file = RUNS / "fuser" / "fuser.safetensors"
    with whole_file(file) as part:
        save_file({FUSER + name: tensor.cpu().contiguous() for name, tensor in fuser.state_dict().items()}, part)
    print(f"{file}: {found():.1%} of what words add to a noun's state")
