"""Stage 5: the UNet, by v-prediction on frozen latents and a frozen text tower."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ...shapeland import models, world
from ...shapeland.autoencoder import CHANNELS, Autoencoder
from ...shapeland.judge import Judge
from ...shapeland.score import score_picture, summarise
from ..loop import MuonAdamW, Run, bfloat16_where_fast
from .common import (
    RUNS,
    SEED,
    SHARDS,
    compact_text,
    open_scenes,
    pixels,
    rows_of,
    save_sheet,
    tokens,
    weights_file,
)
from .scenes import MAX_WORDS, SHARD, WORDS, Scenes

UNCONDITIONAL = 0.1
# A share of the training on top of even noise levels goes to the steps at which silhouettes are decided. Measured on a
# half-trained model by finishing true pictures from step t: nouns were right in 97% of them from 359, 94% from 559, 78%
# from 719, 64% from 839, 56% from 959.
SHAPING, SHAPING_SHARE = (500, 900), 0.6
# The noise level at which a thing is half hidden.
HIDDEN_FROM = 6.0
# Weight of the reading loss: what the features of the UNet know about the things that are being drawn. Its gradient is
# nearly orthogonal to the denoising loss's (measured: cosine 0.01 to 0.09) and must stay a small part of the whole.
READ = 0.02
# Weight of the localization loss at the start of the run and after `LOCALIZE_PICTURES` pictures.
LOCALIZE, LOCALIZE_LATER, LOCALIZE_PICTURES = 0.5, 0.1, 320_000


def frozen_autoencoder(device: str, path: Path | None = None) -> Autoencoder:
    """The shipped autoencoder, or that of the file `path`, for evaluation."""
    model = Autoencoder()
    model.load_state_dict(models.load("autoencoder", path))
    return model.eval().requires_grad_(False).to(device)


def frozen_text(device: str, path: Path | None = None):
    """The shipped text tower, or that of the file `path`, over compact tokens (see `common.tokens`)."""
    return compact_text(path).eval().requires_grad_(False).to(device)


@torch.no_grad()
def latents_of(data: Scenes, folder: Path, shards: int, device: str) -> np.ndarray:
    """Latents (pictures, 8, 16, 16) of all shards as fp16, encoded once and kept in a file per shard."""
    folder.mkdir(parents=True, exist_ok=True)
    model, parts = frozen_autoencoder(device, weights_file("autoencoder")), []
    for shard in range(shards):
        path = folder / f"{shard:04d}.npy"
        if not path.exists():
            rows = np.arange(shard * SHARD, (shard + 1) * SHARD)
            with bfloat16_where_fast(device):
                chunks = [
                    model.encode(pixels(data.take("image", r), device)).half().cpu()
                    for r in np.split(rows, SHARD // 32)
                ]
            np.save(path, torch.cat(chunks).numpy())
        parts.append(np.load(path))
    return np.concatenate(parts)


def noise_levels(device: str) -> torch.Tensor:
    """alpha-bar (1000,) of Stable Diffusion's schedule."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(**models.SCHEDULE).alphas_cumprod.to(device)


class _OpenAttention:
    """A diffusers attention processor that computes probabilities openly and keeps their mean over heads in `kept`.

    At the few tokens of these pictures this is also a fifth faster on a CPU than the fused kernel's backward pass.
    """

    def __init__(self, kept: list[torch.Tensor] | None):
        self.kept = kept

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, source), (attn.to_v, source))
        )
        # The scale goes to the query: on the probabilities it would be the costlier half of a pass over them.
        probabilities = (query * attn.scale @ key.transpose(-1, -2)).softmax(-1)
        if self.kept is not None:
            self.kept.append(probabilities.mean(1))
        return attn.to_out[0]((probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2))


def open_attention(unet) -> list[torch.Tensor]:
    """Open all attention of `unet`; the returned list receives the probabilities (n, tokens, 77) of the
    cross-attentions at 8x8 and 16x16 in each forward pass."""
    kept: list[torch.Tensor] = []
    for name, module in unet.named_modules():
        if name.endswith(("attn1", "attn2")):
            fine = name.startswith(("down_blocks.0", "down_blocks.1", "up_blocks.2", "up_blocks.3"))
            module.set_processor(_OpenAttention(kept if fine and name.endswith("attn2") else None))
    return kept


def visibility(alpha: torch.Tensor) -> torch.Tensor:
    """How well a thing can be made out at alpha-bar `alpha`, 0..1: where noise hides the layout there is no place to
    point at yet. A thing covers some tens of cells of 8 channels, so it stands out far beyond its cells' own noise."""
    level = (1 - alpha) / alpha
    return 1 / (1 + level / HIDDEN_FROM**2)


def localization_loss(
    kept: list[torch.Tensor], describes: torch.Tensor, masks: torch.Tensor, present: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """FastComposer's balanced L1 (arXiv 2305.10431, eq. 5) for words and the things they describe.

    `describes` (n, 3, 77) marks the tokens that describe each thing, `masks` (n, 3, 16, 16) where the things of these
    tokens are, `present` (n, 3) which things exist, `weight` (n,) per picture. For each thing: mean attention to its
    tokens outside its mask minus the mean inside, averaged over layers.
    """
    total = torch.zeros((), device=weight.device)
    for probabilities in kept:
        side = math.isqrt(probabilities.shape[1])
        inside = F.adaptive_avg_pool2d(masks, side).flatten(2)
        attention = torch.einsum("npt,nkt->nkp", probabilities, describes)
        outside = 1 - inside
        gap = (attention * outside).sum(2) / outside.sum(2).clamp(min=1e-3)
        gap = gap - (attention * inside).sum(2) / inside.sum(2).clamp(min=1e-3)
        total = total + (gap * present * weight[:, None]).sum() / present.sum().clamp(min=1)
    return total / len(kept)


def thing_cells(data: Scenes, rows: np.ndarray, device: str) -> torch.Tensor:
    """The share (n, 3, 16, 16) of each latent cell that each thing covers."""
    label = data.take("label", rows)
    cells = np.stack([label == i + 1 for i in range(3)], 1).reshape(-1, 3, 16, 4, 16, 4).mean((3, 5), np.float32)
    return torch.from_numpy(cells).to(device)


def word_supervision(
    data: Scenes, rows: np.ndarray, cells: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`describes`, `masks` and `present` of `localization_loss` from `thing_cells`; things named by one noun share
    their masks."""
    noun_word, device = data.take("noun_word", rows), cells.device
    present = data.take("noun", rows) >= 0
    shared = (noun_word[:, :, None] == noun_word[:, None]) & present[:, None]
    masks = torch.einsum("nij,njhw->nihw", torch.from_numpy(shared).to(device).float(), cells).clamp(0, 1)
    describes = np.zeros((len(rows), 3, models.TOKENS), np.float32)
    describes[:, :, 1 : 1 + data.take("describes", rows).shape[2]] = data.take("describes", rows)
    return torch.from_numpy(describes).to(device), masks, torch.from_numpy(present).to(device).float()


class Readers(torch.nn.Module):
    """Linear maps that read nouns, colours and patterns off the UNet's features while it is trained.

    After REPA (arXiv 2410.06940), which asks features for what a pretrained encoder says of the picture; here the world
    itself knows. The maps are dropped after training.
    """

    CLASSES = (len(world.NOUNS) + 1, len(world.COLORS), len(world.COLORS), len(world.PATTERNS))

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Conv2d(c, sum(self.CLASSES), 1) for c in channels)

    def loss(self, features: list[torch.Tensor], cells: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the four readings.

        `features` (n, c, h, w) one per map; `cells` (n, 3, 16, 16) the share of each cell that a thing covers;
        `classes` (n, 3, 4) noun, colour, second colour and pattern of each thing, -1 where there is none.
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


class _Taught(torch.nn.Module):
    """The UNet and its readers as one module, so that one run keeps and updates both."""

    def __init__(self):
        super().__init__()
        self.unet = models.build_unet(models.NEXT_UNET_CONFIG)
        tapped = self.unet.up_blocks[1], self.unet.up_blocks[2]
        self.features: list[torch.Tensor] = []
        for block in tapped:
            block.register_forward_hook(lambda _module, _inputs, output: self.features.append(output))
        self.readers = Readers(tuple(block.upsamplers[0].conv.out_channels for block in tapped))


def unet_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The UNet's part of a taught module's weights."""
    return {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}


def train_unet(device: str, steps: int, batch: int, compiled: bool = False, shipped: bool = False) -> None:
    """v-prediction with localization and reading; keeps averaged weights, judges samples on the way. A run without a
    checkpoint starts from the shipped weights if so wished, else from nothing."""
    data = open_scenes()
    latents = latents_of(data, RUNS / "latents", SHARDS, device)
    trained = (SHARDS - 1) * SHARD
    torch.manual_seed(SEED)
    taught, text = _Taught(), frozen_text(device, weights_file("text"))
    unet = taught.unet
    if shipped:
        unet.load_state_dict(models.load("unet"))
    decay = max(1, steps // 2)

    def rate(step):
        # Constant, then linear to nothing over the second half: a run can be continued by doubling its steps.
        return 1e-3 * min(1.0, (step + 1) / 100, max(0.02, (steps - step) / decay))

    optimizer = MuonAdamW(taught, 0.02, ("unet.conv_in", "unet.conv_out", "unet.time_embedding", "readers"))
    # A short average, for the rate's fall to nothing averages too: one ten times as long lags behind it (measured:
    # 61.7% of nouns where the last weights have 65.6%).
    run = Run(RUNS / "unet", taught, rate, steps, SEED, average=0.99, device=device, optimizer=optimizer)
    kept = open_attention(unet)
    unet.to(memory_format=torch.channels_last)
    predict = torch.compile(unet) if compiled else unet
    alphas = noise_levels(device)

    def loss_of(step, generator):
        rows = rows_of(step, batch, trained)
        x = torch.from_numpy(latents[rows]).to(device).float()
        silent = torch.rand(batch, generator=generator) < UNCONDITIONAL
        spoken = np.where(silent.numpy()[:, None], 0, data.take("words", rows))
        with torch.no_grad():
            context = text(tokens(spoken, device)).last_hidden_state
        shaping = torch.rand(batch, generator=generator) < SHAPING_SHARE
        low, high = (torch.where(shaping, edge, bound) for edge, bound in zip(SHAPING, (0, 1000), strict=True))
        t = (low + torch.rand(batch, generator=generator) * (high - low)).long().to(device)
        noise = torch.randn(x.shape, generator=generator).to(device)
        alpha = alphas[t]
        a, s = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
        kept.clear()
        taught.features.clear()
        v = predict(a * x + s * noise, t, context).sample.float()
        error = (v - (a * noise - s * x)).square().mean()
        progress = 1.0 if shipped else min(1.0, step * batch / LOCALIZE_PICTURES)
        localize = LOCALIZE + (LOCALIZE_LATER - LOCALIZE) * progress
        spoken_weight = visibility(alpha) * (~silent).float().to(device)
        cells = thing_cells(data, rows, device)
        located = localization_loss(kept, *word_supervision(data, rows, cells), spoken_weight)
        classes = np.concatenate((data.take("noun", rows)[:, :, None], data.take("color", rows)), 2)
        read = taught.readers.loss(taught.features, cells, torch.from_numpy(classes).to(device).long())
        return {"noise": error, "localization": localize * located, "reading": READ * read}

    def report(step):
        sheet = run.folder / f"samples_{step:06d}.png"
        return evaluate(unet_state(run.best_state()), sheet, device, pictures=64, steps=25)

    run.train(loss_of, 100, report, 1000)
    models.save("unet", unet_state(run.best_state()))


def check_unet(device: str) -> None:
    """Prints what the judge says of 512 held-out captions that the shipped UNet draws, and keeps it in `check.json`."""
    RUNS.mkdir(parents=True, exist_ok=True)
    found = evaluate(models.load("unet"), RUNS / "check.png", device, pictures=512, steps=50)
    (RUNS / "check.json").write_text(json.dumps(found))
    print(found)


@torch.no_grad()
def sample(unet, context: torch.Tensor, empty: torch.Tensor, steps: int, guidance: float, seed: int) -> torch.Tensor:
    """DDIM latents (n, 8, 16, 16) for text states `context` (n, 77, d) against `empty` (1, 77, d)."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**models.SCHEDULE, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(context), CHANNELS, 16, 16, generator=generator).to(context.device)
    both = torch.cat((context, empty.expand_as(context)))
    for t in scheduler.timesteps:
        spoken, silent = unet(torch.cat((x, x)), t, both).sample.float().chunk(2)
        x = scheduler.step(silent + guidance * (spoken - silent), t, x).prev_sample
    return x


def held_out_scenes(count: int) -> list[tuple[list[world.Mention], str]]:
    """Captions of scenes that no training picture shows: what they mention, and the text."""
    scenes = [world.random_scene(np.random.default_rng((SEED, 10_000, i)), recipe=world.NEXT) for i in range(count)]
    return [(world.parse_caption(s.caption)[0], s.caption) for s in scenes]


@torch.no_grad()
def evaluate(
    state: dict[str, torch.Tensor], sheet: Path, device: str, pictures: int, steps: int, guidance: float = 4.0
) -> dict[str, float]:
    """Draw held-out captions with the UNet `state`, let the judge read them, save a sheet of the first 64."""
    unet = models.build_unet(models.NEXT_UNET_CONFIG).to(device)
    unet.load_state_dict(state)
    unet.eval().to(memory_format=torch.channels_last)
    text, autoencoder = frozen_text(device, weights_file("text")), frozen_autoencoder(device, weights_file("autoencoder"))
    judge = Judge().to(device)
    judge.load_state_dict(models.load("judge", weights_file("judge")))
    asked = held_out_scenes(pictures)
    index = {word: i for i, word in enumerate(WORDS)}
    spoken = np.zeros((pictures, MAX_WORDS), np.int64)
    for row, (_, caption) in enumerate(asked):
        spoken[row, : len(caption.split())] = [index[w] for w in caption.split()]
    empty = text(tokens(spoken[:1] * 0, device)).last_hidden_state
    scores, sheets = [], []
    for start in range(0, pictures, 64):
        chunk = slice(start, min(pictures, start + 64))
        context = text(tokens(spoken[chunk], device)).last_hidden_state
        with bfloat16_where_fast(device):
            x = sample(unet, context, empty, steps, guidance, seed=start)
        drawn = autoencoder.decode(x).clamp(-1, 1)
        sheets.append(drawn)
        readings = judge.read((drawn + 1) / 2)
        scores += [score_picture(m, r) for (m, _), r in zip(asked[chunk], readings, strict=True)]
    save_sheet(sheets[0], sheet)
    return {k: round(v, 4) for k, v in summarise(scores).items()}
