"""Stage 'judge': the judge, trained and measured on ground truth alone."""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F

from ...shapeland import models, world
from ...shapeland.judge import Judge, crop_thing
from ..loop import Run
from ..optimizers import adamw, warmup_cosine
from .common import RUNS, SEED, open_scenes, step_rows, weights_file
from .scenes import SHARD, Scenes

TEMPERATURE = 0.1
PAIRS = 4096


def draw_pairs(count: int, seed: int) -> list[tuple[world.Picture, world.Picture]]:
    """Pairs of pictures whose first things have one identity but different nouns: identity apart from silhouette."""
    pairs = []
    for i in range(count):
        rng = np.random.default_rng((seed, 7, i))
        identity = world.random_identity(rng)
        first, second = rng.choice(len(world.NOUNS), 2, replace=False)
        pairs.append(
            tuple(
                world.render(world.scene_from([world.Mention(int(noun))], None, rng, [identity]))
                for noun in (first, second)
            )
        )
    return pairs


def pair_crops(pairs: list[tuple[world.Picture, world.Picture]]) -> torch.Tensor:
    """(2, n, 4, CROP, CROP): both things of each pair as the reader sees them."""
    sides = []
    for side in range(2):
        images = torch.from_numpy(np.stack([p[side].image for p in pairs])).permute(0, 3, 1, 2)
        masks = torch.from_numpy(np.stack([p[side].masks[0] for p in pairs])) > 0.5
        places = torch.tensor([[p[side].scene.things[0].x, p[side].scene.things[0].y] for p in pairs])
        sides.append(crop_thing(images, masks, places))
    return torch.stack(sides)


def things_of(data: Scenes, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """The visible things of pictures: `picture` (index in the batch), `noun`, `color`, `identity`, `place`, `mask`."""
    label = torch.from_numpy(data.take("label", rows))
    noun = torch.from_numpy(data.take("noun", rows).astype(np.int64))
    masks = torch.stack([label == i + 1 for i in range(3)], 1)
    picture, index = ((noun >= 0) & (masks.sum((2, 3)) > 40)).nonzero(as_tuple=True)
    return {
        "picture": picture,
        "noun": noun[picture, index],
        "color": torch.from_numpy(data.take("color", rows).astype(np.int64))[picture, index],
        "identity": torch.from_numpy(data.take("identity", rows))[picture, index],
        "place": torch.from_numpy(data.take("place", rows))[picture, index],
        "mask": masks[picture, index],
    }


def contrast(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """InfoNCE loss between unit vectors a (n, d) and b (n, d), in which row i of one matches row i of the other."""
    logits = a.float() @ b.float().T / TEMPERATURE
    target = torch.arange(len(a), device=a.device)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def train_judge(device: str, steps: int, shipped: bool = False) -> None:
    """Trains segmentation, centers, attributes and identity in one run; writes weights and `report.json`. A run without
    a checkpoint starts from the shipped weights if `shipped`."""
    data = open_scenes(4)
    torch.manual_seed(SEED)
    judge = Judge()
    if shipped:
        judge.load_state_dict(models.load("judge"))
    judge.to(device)
    run = Run(RUNS / "judge", judge, adamw(judge, 2e-3), steps, SEED, warmup_cosine(100, steps), average=0.998)
    crops = pair_crops(draw_pairs(PAIRS, SEED))
    grid = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="xy"))

    def loss_of(step, generator):
        rows = step_rows(step, 24, 3 * SHARD)
        pictures = torch.from_numpy(data.take("image", rows)).permute(0, 3, 1, 2).float() / 255
        # Generated pictures are never as clean as drawn ones, so the judge learns to read with a little noise and blur.
        pictures = (pictures + 0.03 * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
        if step % 4 == 0:
            pictures = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        things = things_of(data, rows)
        nouns = torch.zeros(len(rows), 64, 64, dtype=torch.long)
        offsets = torch.zeros(len(rows), 2, 64, 64)
        for picture, noun, place, mask in zip(*(things[k] for k in ("picture", "noun", "place", "mask")), strict=True):
            nouns[picture][mask] = noun + 1
            offsets[picture][:, mask] = (place[:2, None, None] - 0.5 - grid)[:, mask]
        logits, votes = judge.segmenter(pictures.to(device))
        inside = (nouns > 0).to(device)
        shift = torch.randint(-2, 3, things["place"][:, :2].shape, generator=generator)
        parts = judge.reader(
            crop_thing(pictures[things["picture"]], things["mask"], things["place"][:, :2] + shift).to(device)
        )
        truth = {k: things[k].to(device) for k in ("noun", "color", "identity")}
        chosen = torch.randint(len(crops[0]), (24,), generator=generator)
        pair = [judge.reader(side[chosen].to(device))["embedding"] for side in crops]
        return {
            "segments": F.cross_entropy(logits.float(), nouns.to(device)),
            "centers": ((votes.float() - offsets.to(device)).abs().sum(1) * inside).sum() / inside.sum() / 10,
            "noun": F.cross_entropy(parts["noun"].float(), truth["noun"]),
            "color": F.cross_entropy(parts["color"].float(), truth["color"][:, 0]),
            "second": F.cross_entropy(parts["second"].float(), truth["color"][:, 1]),
            "pattern": F.cross_entropy(parts["pattern"].float(), truth["color"][:, 2]),
            "identity": (parts["identity"].float() - truth["identity"]).square().sum(1).mean(),
            "embedding": 0.5 * contrast(*pair),
        }

    def report(_step):
        return measure_accuracy(judge, data, np.arange(3 * SHARD, 3 * SHARD + 1024), device)

    run.train(loss_of, 50, report=report, report_every=400)
    judge.load_state_dict(run.best_state())
    models.save("judge", judge.state_dict(), weights_file("judge"))
    result = measure_accuracy(judge, data, np.arange(3 * SHARD, 4 * SHARD), device)
    (run.folder / "report.json").write_text(json.dumps(result, indent=1))


@torch.no_grad()
def measure_accuracy(judge: Judge, data: Scenes, rows: np.ndarray, device: str) -> dict[str, float]:
    """Measures the judge on held-out pictures.

    Returns the shares of things whose noun, both colors and pattern are read correctly among those found (matched by
    mask, with an IoU of at least 0.5); `found` and `false` readings per true thing; the share of `pictures` with all
    nouns right; the mean mask `iou`; `auc`, how often two things with one identity and different nouns are more similar
    than two with different identities; the mean similarities `same` and `other` of such pairs; and `twins`, that of two
    things with one noun in one picture.
    """
    right = {"noun": 0, "color": 0, "second": 0, "pattern": 0}
    found = seen = true = whole = 0
    overlap = 0.0
    twins = []
    for start in range(0, len(rows), 256):
        chunk = rows[start : start + 256]
        pictures = torch.from_numpy(data.take("image", chunk)).permute(0, 3, 1, 2).float() / 255
        readings = judge.read(pictures.to(device))
        things = things_of(data, chunk)
        for i, seen_here in enumerate(readings):
            mine = (things["picture"] == i).nonzero()[:, 0].tolist()
            true += len(mine)
            seen += len(seen_here)
            whole += sorted(int(things["noun"][j]) for j in mine) == sorted(r.noun for r in seen_here)
            for j in mine:
                mask = things["mask"][j].to(device)
                ious = [float((r.mask & mask).sum() / (r.mask | mask).sum()) for r in seen_here]
                if not ious or max(ious) < 0.5:
                    continue
                reading = seen_here[ious.index(max(ious))]
                found += 1
                overlap += max(ious)
                right["noun"] += reading.noun == int(things["noun"][j])
                for k, name in enumerate(("color", "second", "pattern")):
                    right[name] += getattr(reading, name) == int(things["color"][j, k])
            pairs = [r for r in seen_here if sum(r.noun == s.noun for s in seen_here) > 1]
            if len(pairs) == 2:
                twins.append(float(pairs[0].embedding @ pairs[1].embedding))
    a, b = (judge.reader(side.to(device))["embedding"] for side in pair_crops(draw_pairs(512, SEED + 1)))
    similarity = a @ b.T
    same, other = similarity.diagonal(), similarity[~torch.eye(len(a), dtype=torch.bool, device=a.device)]
    auc = float((same[:, None] > other[None, ::97]).float().mean())
    return {
        **{k: round(v / max(1, found), 4) for k, v in right.items()},
        "found": round(found / true, 4),
        "false": round((seen - found) / true, 4),
        "pictures": round(whole / len(rows), 4),
        "iou": round(overlap / max(1, found), 4),
        "auc": round(auc, 5),
        "same": round(float(same.mean()), 4),
        "other": round(float(other.mean()), 4),
        "twins": round(float(np.mean(twins)), 4) if twins else 0.0,
    }
