"""Stage 'promptnet': a PromptNet whose word says what a picture shows, to start PromptNet's training from.

From random weights, the loss of a small UNet teaches a word's looks slowly. The two towers were trained on the same
things, so this stage needs no UNet: the caption with a thing's noun alone, whose word is replaced by S*, shall give the
text states that the caption has with the words for the thing's colors and pattern.
"""

from __future__ import annotations

import numpy as np
import torch

from ...encoders.promptnet import save
from ..base import Base, open_base
from ..loop import Run
from ..optimizers import adamw, warmup_cosine
from ..promptnet.model import PromptNetTraining
from ..promptnet.script import config_of
from .common import RUNS, SEED, open_scenes, pixels, step_rows
from .fuser import said_and_bare
from .scenes import SHARD, Scenes

BATCH, HELD_OUT = 32, 256
CHANNELS, REGION_CHANNELS = [32, 64, 64, 64], 32
"""Of a PromptNet of less than 4 MB in half precision."""


def single_things(data: Scenes, first: int, last: int) -> np.ndarray:
    """The rows from `first` to `last` (exclusive) whose pictures show one thing."""
    rows = np.arange(first, last)
    return rows[(data.take("noun", rows) >= 0).sum(1) == 1]


class Said:
    """What a batch asks of PromptNet.

    Args:
        data: pictures and their captions.
        rows: of pictures of one thing.
        base: the world's models.
        device: of the tensors.

    Attributes:
        pictures: (n, 3, H, W) in [-1, 1].
        bare, place: tokens (n, 77) of the captions without looks, and the row of the noun (n,).
        rows_said, rows_bare: index pairs of the rows of the noun and of all tokens after it up to the end token.
        states: (m, D), the states of these rows in the captions with looks.
    """

    def __init__(self, data: Scenes, rows: np.ndarray, base: Base, device: str):
        found = said_and_bare(data, rows, base)
        # A thing that is hardly visible is left out.
        kept = found["picture"]
        self.pictures = pixels(data.take("image", rows), device)[kept]
        said, self.bare = (found[name][kept, 0].to(device) for name in ("said", "bare"))
        self.place = found["bare_row"].to(device)
        # Both end alike: the end token is the first 0 after the start.
        length = (self.bare == 0).int().argmax(1) - self.place + 1
        offsets = torch.arange(int(length.max()), device=device)
        index, offset = (offsets[None] < length[:, None]).nonzero(as_tuple=True)
        self.rows_bare = index, self.place[index] + offset
        self.rows_said = index, found["said_row"].to(device)[index] + offset
        with torch.no_grad():
            self.states = base.read(said[:, None])[0][self.rows_said]
            self.own = base.read(self.bare[:, None])[0][self.rows_bare]


def train_promptnet(device: str, steps: int) -> None:
    """Writes promptnet.safetensors into the run's folder, and prints how much of what words for looks change in the
    text states the word finds in held-out pictures."""
    data, base = open_scenes(), open_base("shapeland")
    model = PromptNetTraining(base, config_of(base, CHANNELS, REGION_CHANNELS), seed=SEED).to(device)
    rows = single_things(data, 0, data.count - SHARD)
    optimizer = adamw(model.promptnet, 2e-3)
    run = Run(RUNS / "promptnet", model, optimizer, steps, SEED, warmup_cosine(50, steps), average=0.98)

    def found_states(asked: Said, generator: torch.Generator) -> torch.Tensor:
        count, shape = len(asked.pictures), base.latent_shape
        noise = torch.randn((count, *shape), generator=generator).to(device)
        t = torch.randint(base.times, (count,), generator=generator).to(device)
        latents, tokens = model.see(asked.pictures, noise)
        noisy, _ = base.noised(latents, noise, t)
        words = model.words((latents, tokens), noisy, t)
        return model.read(asked.bare, asked.place, words)[0][asked.rows_bare]

    def loss_of(step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        asked = Said(data, rows[step_rows(step, BATCH, len(rows))], base, device)
        return {"squared": (found_states(asked, generator) - asked.states).square().mean()}

    unseen = single_things(data, data.count - SHARD, data.count)[:HELD_OUT]
    held_out = Said(data, unseen, base, device)

    @torch.no_grad()
    def found() -> float:
        error = found_states(held_out, torch.Generator().manual_seed(SEED)) - held_out.states
        return 1 - float(error.square().sum() / (held_out.own - held_out.states).square().sum())

    run.train(loss_of, 50, report=lambda _step: {"found": round(found(), 4)}, report_every=250, half=False)
    model.load_state_dict(run.best_state())
    file = RUNS / "promptnet" / "promptnet.safetensors"
    save(model.promptnet, file)
    print(f"{file}: {found():.1%} of what words for looks change in the text states")
