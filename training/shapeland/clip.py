"""Stage 'clip': CLIP's two towers, trained on pictures with captions and on things with phrases, then frozen."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ...encoders.clip_pixels import normalize
from ...shapeland import models, world
from ..loop import Run
from ..optimizers import adamw, warmup_cosine
from .common import (
    RUNS,
    SEED,
    build_compact_text,
    compact_text,
    open_scenes,
    pixels,
    step_rows,
    tokens,
    weights_file,
    word_tokens,
)
from .scenes import MAX_WORDS, SHARD, WORDS, Scenes

KINDS = ("noun", "color", "second", "pattern", "size", "across", "down")
CLASSES = (len(world.NOUNS), len(world.COLORS), len(world.COLORS), len(world.PATTERNS), 2, 2, 2)
# Weight of the loss over pairs, whose sum over a batch is larger than all other losses.
PAIRS = 0.3


class Clip(torch.nn.Module):
    """Both towers, trained together on whole pictures and on single things.

    Pictures and captions are compared in CLIP's contrastive loss. Things and phrases are compared in a sigmoid loss
    over all pairs of the batch, with the world's truth as target (a phrase is true of every thing that has what it
    says); this makes the state of a noun's token carry the colors and pattern of that noun, not of its neighbor.

    Both losses are low as soon as most pairs can be told apart: a linear map read the pattern from the noun's state in
    only 48% of the phrases that give it. So linear maps, which are dropped after training, also read everything that is
    said about a thing from the states of its noun and of its phrase's last word, and everything that it has from its
    region of the picture.
    """

    def __init__(self):
        super().__init__()
        self.text, self.vision = build_compact_text(), models.build_vision()
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.pair_scale, self.pair_bias = torch.nn.Parameter(torch.tensor(2.0)), torch.nn.Parameter(torch.tensor(-4.0))
        self.noun_map, self.last_map, self.region_map = (torch.nn.Linear(models.WIDTH, sum(CLASSES)) for _ in range(3))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        text = self.text(batch["tokens"])
        vision = self.vision(batch["pixels"])
        a, b = F.normalize(text.text_embeds, dim=-1), F.normalize(vision.image_embeds, dim=-1)
        logits = self.scale.exp() * a @ b.T
        # Equal captions are equally right for each other's pictures.
        same = (batch["tokens"][:, None] == batch["tokens"]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        contrast = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))

        noun, last = (
            text.last_hidden_state.gather(1, batch[at][..., None].expand(-1, -1, models.WIDTH))[batch["present"]]
            for at in ("noun_at", "last_at")
        )
        said, have = batch["said"][batch["present"]], batch["have"][batch["present"]]
        phrase = F.normalize(self.text.text_projection(noun), dim=-1)
        weight = batch["regions"][batch["present"]]
        picture = batch["present"].nonzero()[:, 0]
        region = torch.einsum("np,npc->nc", weight, vision.last_hidden_state[:, 1:][picture])
        region = self.vision.vision_model.post_layernorm(region)
        # A thing's position is named after its noun, where the noun's token cannot attend.
        before = torch.where(torch.arange(len(KINDS), device=said.device) < KINDS.index("across"), said, -1)
        read = {
            "noun_state": reading_loss(self.noun_map(noun), before),
            "last_state": reading_loss(self.last_map(last), said),
            "region": reading_loss(self.region_map(region), have),
        }
        region = F.normalize(self.vision.visual_projection(region), dim=-1)
        pairs = self.pair_scale.exp() * phrase @ region.T + self.pair_bias
        truth = phrase_is_true(said, have)
        pair_loss = F.binary_cross_entropy_with_logits(pairs, truth.float(), reduction="sum") / len(pairs)
        return {"contrast": contrast, "pairs": PAIRS * pair_loss, **read}


def reading_loss(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Sum over `KINDS` of the mean cross-entropy between logits (n, sum of `CLASSES`) and truth (n, 7), where the truth
    is not negative."""
    total = torch.zeros((), device=logits.device)
    for part, target in zip(logits.float().split(CLASSES, 1), truth.unbind(1), strict=True):
        known = target >= 0
        loss = F.cross_entropy(part, target.clamp(min=0), reduction="none")
        total = total + (loss * known).sum() / known.sum().clamp(min=1)
    return total


def phrase_is_true(said: torch.Tensor, have: torch.Tensor) -> torch.Tensor:
    """(n, m): whether phrase i (`said` (n, 7), -1 if unsaid) is true of thing j (`have` (m, 7), -2 if no word is)."""
    return ((said[:, None] == have[None]) | (said[:, None] < 0)).all(-1)


_COLOR_WORDS = np.array([w in world.COLORS for w in WORDS])
# By index in KINDS, for everything but noun and colors.
_OTHER_WORDS = {
    kind: np.array([w in words for w in WORDS])
    for kind, words in enumerate((world.PATTERNS, world.SIZES, world.ACROSS, world.DOWN), KINDS.index("pattern"))
}


def last_words(describes: np.ndarray) -> np.ndarray:
    """Index (n, 3) of the last word that describes each thing; 0 if there is none."""
    return np.where(describes > 0, np.arange(describes.shape[2]), 0).max(2).astype(np.int64)


def places_of(data: Scenes, rows: np.ndarray) -> np.ndarray:
    """Indices (n, 3, 3) of the words that are true of each thing's size and position, -2 if none is."""
    place, counts = data.take("place", rows), (data.take("noun", rows) >= 0).sum(1)
    found = np.full(place.shape, -2, np.int64)
    for row, count in enumerate(counts):
        for i, (x, y, radius) in enumerate(place[row, :count].tolist()):
            words = world.size_of(radius, int(count)), world.edge_of(x), world.edge_of(y)
            found[row, i] = [-2 if word is None else word for word in words]
    return found


def clip_batch(data: Scenes, rows: np.ndarray, device: str) -> dict[str, torch.Tensor]:
    """Pictures, tokens and the truth about each thing: what its phrase says, and what it has."""
    words, noun, describes = (data.take(k, rows) for k in ("words", "noun", "describes"))
    have = np.concatenate([noun[..., None], data.take("color", rows), places_of(data, rows)], -1).astype(np.int64)
    described = np.where(describes > 0, words[:, None], 0)
    colors = _COLOR_WORDS[described].sum(-1)
    said = have.copy()
    said[..., 1][colors < 1] = -1
    said[..., 2][colors < 2] = -1
    for kind, is_said in _OTHER_WORDS.items():
        said[..., kind][~is_said[described].any(-1)] = -1
    cells = data.take("label", rows).reshape(-1, 8, 8, 8, 8)
    regions = np.stack([(cells == i + 1).mean((2, 4)).reshape(-1, 64) for i in range(3)], 1)
    covered = regions.sum(-1, keepdims=True)
    return {
        # Attention is causal: the padding after the longest caption changes nothing before it.
        "tokens": tokens(words, device)[:, : MAX_WORDS + 2],
        "pixels": normalize((pixels(data.take("image", rows), device) + 1) / 2),
        "noun_at": torch.from_numpy(data.take("noun_word", rows).astype(np.int64) + 1).to(device),
        "last_at": torch.from_numpy(last_words(describes) + 1).to(device),
        "present": torch.from_numpy((noun >= 0) & (covered[..., 0] > 0.01)).to(device),
        "regions": torch.from_numpy((regions / np.maximum(covered, 1e-6)).astype(np.float32)).to(device),
        "said": torch.from_numpy(said).to(device),
        "have": torch.from_numpy(have).to(device),
    }


def train_clip(device: str, steps: int, shipped: bool = False) -> None:
    """Trains CLIP's towers and writes both files. Without a checkpoint, a run starts from the shipped weights if
    `shipped`."""
    shards = 4
    data = open_scenes(shards)
    torch.manual_seed(SEED)
    model = Clip()
    if shipped:
        model.text = compact_text()
        model.vision.load_state_dict(models.load("vision"))
    model.to(device)
    run = Run(RUNS / "clip", model, adamw(model, 1e-3), steps, SEED, warmup_cosine(200, steps), average=0.998)
    held_out = clip_batch(data, np.arange(3 * SHARD, 3 * SHARD + 256), device)

    def loss_of(step, _generator):
        return model(clip_batch(data, step_rows(step, 64, 3 * SHARD), device))

    def report(_step):
        return {f"held_out_{k}": round(float(v), 4) for k, v in model(held_out).items()}

    run.train(loss_of, 50, report=report, report_every=250)
    state = run.best_state()
    part = {
        side: {k[len(side) + 1 :]: v for k, v in state.items() if k.startswith(side + ".")}
        for side in ("text", "vision")
    }
    ids = word_tokens()
    models.save("text", {**part["text"], "token_ids": ids.int()}, weights_file("text"))
    models.save("vision", part["vision"], weights_file("vision"))
