"""Stage 'unet': the UNet, trained with v-prediction on frozen latents and a frozen text tower."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ...attention.localization import localization_loss
from ...shapeland import models, world
from ...shapeland.autoencoder import CHANNELS
from ...shapeland.judge import Judge
from ...shapeland.score import score_picture, summarize
from ..loop import Lanes, Run, bfloat16_where_fast, replica
from ..open_attention import OpenAttention
from ..optimizers import MuonAdamW
from ..sampling import sample
from .common import (
    RUNS,
    SEED,
    SHARDS,
    frozen_autoencoder,
    frozen_text,
    open_scenes,
    save_sheet,
    step_rows,
    tokens,
    weights_file,
)
from .latents import LatentScenes, SceneBatch, encoded
from .scenes import MAX_WORDS, WORDS

UNCONDITIONAL = 0.1
# A share of the samples has the timesteps at which silhouettes are decided; the others have uniform ones. Measured on a
# half-trained model by finishing true pictures from timestep t: nouns were right in 97% of them from 359, 94% from 559,
# 78% from 719, 64% from 839, 56% from 959. The last hundred timesteps are included: they decide how many things are
# where.
SHAPING, SHAPING_SHARE = (500, 1000), 0.6
# The noise level at which a thing is half hidden.
HIDDEN_FROM = 6.0
# Weight of the reading loss: what the features of the UNet tell about the things that are being drawn. Its gradient is
# nearly orthogonal to the denoising loss's (measured: cosine 0.01 to 0.09) and must stay a small part of the whole.
READ = 0.02
# Weight of the localization loss at the start of the run and after `LOCALIZE_PICTURES` pictures.
LOCALIZE, LOCALIZE_LATER, LOCALIZE_PICTURES = 0.5, 0.1, 320_000
# Learning rate, the share of the steps at the end over which it falls to almost zero, and the share of the average that
# a step keeps: a longer average lags behind the fall (measured: 61.7% of nouns right, 65.6% with the last weights).
LEARNING_RATE, DECAY, AVERAGE = 1e-3, 0.3, 0.99
# Blocks whose cross-attention the localization loss uses: those with 8x8 and 16x16 cells.
OPENED = ("down_blocks.0", "down_blocks.1", "up_blocks.2", "up_blocks.3")
# Timesteps, and number of held-out pictures, at which the report measures what captions contribute.
GAIN_TIMES, GAIN_PICTURES = (150, 500, 700, 850, 970), 128


def noise_levels(device: str) -> torch.Tensor:
    """alpha-bar (1000,) of Stable Diffusion's noise schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**models.SCHEDULE).alphas_cumprod.to(device)


def visibility(alpha: torch.Tensor) -> torch.Tensor:
    """How visible a thing is at alpha-bar `alpha`, 0..1: where noise hides the layout, there is no place to attend to
    yet. A thing covers dozens of cells with 8 channels, so it is visible in far more noise than a single cell is."""
    level = (1 - alpha) / alpha
    return 1 / (1 + level / HIDDEN_FROM**2)


class Readers(torch.nn.Module):
    """Linear maps that read nouns, colors and patterns from the UNet's features during training.

    As in REPA (arXiv 2410.06940), which trains features to tell what a pretrained encoder sees in the picture; here the
    world itself knows. The maps are dropped after training.
    """

    CLASSES = (len(world.NOUNS) + 1, len(world.COLORS), len(world.COLORS), len(world.PATTERNS))

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Conv2d(c, sum(self.CLASSES), 1) for c in channels)

    def loss(self, features: list[torch.Tensor], cells: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the four readings.

        `features` (n, c, h, w), one per map; `cells` (n, 3, 16, 16), the share of each cell that a thing covers;
        `classes` (n, 3, 4), noun, color, second color and pattern of each thing, -1 if there is none.
        """
        total = torch.zeros((), device=cells.device)
        for layer, feature in zip(self.maps, features, strict=True):
            shares = F.adaptive_avg_pool2d(cells, feature.shape[-1])
            readings = layer(feature).float().split(self.CLASSES, 1)
            for kind, reading in enumerate(readings):
                one_hot = F.one_hot(classes[:, :, kind].clamp(min=0), reading.shape[1]).float()
                target = torch.einsum("nkhw,nkc->nchw", shares, one_hot)
                if kind == 0:
                    target[:, -1] = 1 - shares.sum(1)
                entropy = -(target * reading.log_softmax(1)).sum()
                total = total + entropy / target.sum()
        return total / len(features)


class _UNetWithReaders(torch.nn.Module):
    """The UNet and its readers as one module, so that one run stores and updates both."""

    def __init__(self):
        super().__init__()
        self.unet = models.build_unet()
        self.readers = Readers(tuple(block.upsamplers[0].conv.out_channels for block in self.read_blocks))

    @property
    def read_blocks(self) -> tuple[torch.nn.Module, ...]:
        """The blocks whose output the readers read."""
        return self.unet.up_blocks[1], self.unet.up_blocks[2]


def unet_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The UNet's part of the weights of `_UNetWithReaders`."""
    return {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}


class _Objective:
    """The losses of a training step.

    With several objectives, each takes its `part` (index, count) of a step's batch and has a replica of the model.
    """

    def __init__(
        self,
        model: _UNetWithReaders,
        data: LatentScenes,
        text,
        batch_size: int,
        compiled: bool,
        part: tuple[int, int],
    ):
        self.model, self.data, self.text, self.batch_size, self.part = model, data, text, batch_size, part
        self.alphas = noise_levels(data.device)
        self.attention, self.features = OpenAttention(model.unet, OPENED), []
        for block in model.read_blocks:
            block.register_forward_hook(lambda _module, _inputs, output: self.features.append(output))
        self.predict = torch.compile(model.unet) if compiled else model.unet

    def noised(
        self, batch: SceneBatch, t: torch.Tensor, unconditional: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The latents with the noise of timesteps t (n,), the v to predict, and the text states of the captions, which
        are empty for the `unconditional` (n,)."""
        x = batch.latents
        # Drawn on the device: a large batch's noise would take longer to copy than a step takes.
        own = torch.Generator(x.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        noise = torch.randn(x.shape, generator=own, device=x.device)
        a, s = (part.sqrt()[:, None, None, None] for part in (self.alphas[t], 1 - self.alphas[t]))
        with torch.no_grad():
            context = self.text(batch.tokens(unconditional)).last_hidden_state
        return a * x + s * noise, a * noise - s * x, context

    def losses(self, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """The losses of one step, by name."""
        first, parts = self.part
        rows = step_rows(step, self.batch_size, self.data.trained)[first::parts]
        batch = self.data.take(rows)
        unconditional, shaping, level = torch.rand(3, len(rows), generator=generator)
        unconditional = (unconditional < UNCONDITIONAL).to(self.alphas.device)
        low, high = (torch.where(shaping < SHAPING_SHARE, *ends) for ends in zip(SHAPING, (0, 1000), strict=True))
        t = (low + level * (high - low)).long().to(self.alphas.device)
        noisy, target, context = self.noised(batch, t, unconditional, generator)
        self.features.clear()
        with self.attention.collecting() as maps:
            error = (self.predict(noisy, t, context).sample.float() - target).square().mean()
        progress = min(1.0, step * self.batch_size / LOCALIZE_PICTURES)
        localize = LOCALIZE + (LOCALIZE_LATER - LOCALIZE) * progress
        visible = visibility(self.alphas[t]) * ~unconditional
        weights = batch.present * visible[:, None] / batch.present.sum().clamp(min=1)
        located = localization_loss(maps, batch.describes, batch.named, weights, F.adaptive_avg_pool2d)
        read = self.model.readers.loss(self.features, batch.cells, batch.classes)
        return {"noise": error, "localization": localize * located, "reading": READ * read}

    @torch.no_grad()
    def gains(self, unet) -> dict[str, float]:
        """The share by which captions lower the loss of held-out pictures, at each of GAIN_TIMES."""
        batch = self.data.take(self.data.trained + np.arange(GAIN_PICTURES))
        found = {}
        for time in GAIN_TIMES:
            t, loss = torch.full((GAIN_PICTURES,), time, device=self.alphas.device), []
            for empty in (False, True):
                unconditional = torch.full_like(t, empty, dtype=torch.bool)
                noisy, target, context = self.noised(batch, t, unconditional, torch.Generator().manual_seed(time))
                loss.append(float((unet(noisy, t, context).sample.float() - target).square().mean()))
            found[f"gain_{time}"] = round(1 - loss[0] / loss[1], 4)
        return found


def train_unet(
    device: str,
    steps: int,
    batch_size: int,
    lanes: int = 1,
    compiled: bool = False,
    shipped: bool = False,
    seconds: float = float("inf"),
    learning_rate: float = LEARNING_RATE,
    shards: int = SHARDS,
) -> None:
    """Trains with v-prediction, localization and reading losses; keeps averaged weights and has the judge score samples
    during the run. A run without a checkpoint starts from the shipped weights if `shipped`, else from random ones."""
    torch.manual_seed(SEED)
    model, text = _UNetWithReaders(), frozen_text(device, weights_file("text"))
    unet = model.unet
    if shipped:
        unet.load_state_dict(models.load("unet"))
    model.to(device)
    if torch.device(device).type != "cpu":
        # On a CPU the other layout is faster (measured: 2.25 s a step instead of 2.55 s).
        unet.to(memory_format=torch.channels_last)
    decay = max(1, int(DECAY * steps))

    def schedule(step):
        # Constant, then linear to almost zero: a run can be extended from any step before its fall by taking more
        # steps.
        return min(1.0, (step + 1) / 100, max(0.02, (steps - step) / decay))

    outside = "unet.conv_in", "unet.conv_out", "unet.time_embedding", "readers"
    optimizer = MuonAdamW(model, learning_rate, 0.02, outside)
    run = Run(RUNS / "unet", model, optimizer, steps, SEED, schedule, AVERAGE)
    data = open_scenes(shards)
    autoencoder = frozen_autoencoder(device, weights_file("autoencoder"))
    scenes = LatentScenes(data, encoded(data, autoencoder, RUNS / "latents", device), device)
    objectives = [
        _Objective(replica(model), scenes, text, batch_size, compiled, (part, lanes)) for part in range(lanes)
    ]

    def report(step):
        state, sheet = unet.state_dict(), run.folder / f"samples_{step:06d}.png"
        return {**objectives[0].gains(_ready(state, device)), **evaluate(state, sheet, device, pictures=128, steps=25)}

    losses = Lanes([objective.losses for objective in objectives])
    run.train(losses, 100, report=report, report_every=2000, seconds=seconds)
    models.save("unet", unet_state(run.best_state()), weights_file("unet"))


def check_unet(device: str) -> None:
    """Has the trained UNet draw 512 held-out captions, prints the judge's scores, and writes them to `check.json`."""
    found = evaluate(models.load("unet", weights_file("unet")), RUNS / "check.png", device, pictures=512, steps=50)
    (RUNS / "check.json").write_text(json.dumps(found))
    print(found)


def held_out_scenes(count: int) -> list[tuple[list[world.Mention], str]]:
    """Mentions and captions of scenes that no training picture shows."""
    scenes = [world.random_scene(np.random.default_rng((SEED, 10_000, i))) for i in range(count)]
    return [(world.parse_caption(s.caption)[0], s.caption) for s in scenes]


def _ready(state: dict[str, torch.Tensor], device: str):
    """A UNet with these weights, for inference."""
    unet = models.build_unet().to(device)
    unet.load_state_dict(state)
    return unet.eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(
    state: dict[str, torch.Tensor], sheet: Path, device: str, pictures: int, steps: int, guidance: float = 4.0
) -> dict[str, float]:
    """Draws held-out captions with the UNet weights `state`, saves a sheet of the first 64, returns their scores."""
    unet = _ready(state, device)
    text = frozen_text(device, weights_file("text"))
    autoencoder = frozen_autoencoder(device, weights_file("autoencoder"))
    judge = Judge().to(device)
    judge.load_state_dict(models.load("judge", weights_file("judge")))
    asked = held_out_scenes(pictures)
    index = {word: i for i, word in enumerate(WORDS)}
    words = np.zeros((pictures, MAX_WORDS), np.int64)
    for row, (_, caption) in enumerate(asked):
        words[row, : len(caption.split())] = [index[w] for w in caption.split()]
    empty = text(tokens(words[:1] * 0, device)).last_hidden_state

    def predict(x, t, states):
        return unet(x, t, states[0]).sample.float()

    scores, sheets = [], []
    for start in range(0, pictures, 64):
        chunk = slice(start, min(pictures, start + 64))
        context = text(tokens(words[chunk], device)).last_hidden_state
        shape, unconditional = (len(context), CHANNELS, 16, 16), (empty.expand_as(context), None)
        with bfloat16_where_fast(device):
            x = sample(
                predict, models.SCHEDULE, shape, unconditional, lambda *_, c=context: (c, None), steps, guidance, start
            )
        drawn = autoencoder.decode(x).clamp(-1, 1)
        sheets.append(drawn)
        readings = judge.read((drawn + 1) / 2)
        scores += [score_picture(m, r) for (m, _), r in zip(asked[chunk], readings, strict=True)]
    save_sheet(sheets[0], sheet)
    return {k: round(v, 4) for k, v in summarize(scores).items()}
