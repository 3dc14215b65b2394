"""Shapeland pictures on disk: shards of pictures with their ground truth, drawn once and memory-mapped."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import numpy as np

from ...shapeland import world

SHARD = 8192
MAX_WORDS = 40
_FIELDS = {
    "image": (np.uint8, (world.SIZE, world.SIZE, 3)),
    # 0 is the background, i + 1 is thing i where it covers most of a pixel.
    "label": (np.uint8, (world.SIZE, world.SIZE)),
    "noun": (np.int8, (3,)),
    "color": (np.int8, (3, 3)),
    "identity": (np.float32, (3, 14)),
    "place": (np.float32, (3, 3)),
    "background": (np.int8, ()),
    "words": (np.int16, (MAX_WORDS,)),
    "noun_word": (np.int8, (3,)),
    # Per thing and word: 1 where the word describes the thing.
    "describes": (np.uint8, (3, MAX_WORDS)),
}
# Word 0 is "no word".
WORDS = (
    "", *world.NOUNS, *(p for p in world.PLURALS if p not in world.NOUNS), *world.COLORS, *world.PATTERNS,
    *world.BACKGROUNDS, *world.COUNTS, "an", "and", "on", "background",
    *world.SIZES, *world.ACROSS, *world.DOWN, "at", "the",
)  # fmt: skip
_WORD_INDEX = {word: i for i, word in enumerate(WORDS)}


def _draw_shard(folder: Path, seed: int, shard: int) -> None:
    arrays = {name: np.zeros((SHARD, *shape), dtype) for name, (dtype, shape) in _FIELDS.items()}
    arrays["noun"][:] = -1
    for row in range(SHARD):
        picture = world.render(world.random_scene(np.random.default_rng((seed, shard, row))))
        scene = picture.scene
        arrays["image"][row] = np.round(picture.image * 255)
        covered = picture.masks.sum(0)
        nearest = picture.masks.argmax(0)
        arrays["label"][row] = np.where(covered > 0.5, nearest + 1, 0)
        for i, thing in enumerate(scene.things):
            identity = thing.identity
            arrays["noun"][row, i] = thing.noun
            arrays["color"][row, i] = identity.color, identity.second, identity.pattern
            arrays["identity"][row, i] = identity.vector()
            arrays["place"][row, i] = thing.x, thing.y, thing.radius
            arrays["noun_word"][row, i] = scene.noun_words[i]
            arrays["describes"][row, i, [scene.noun_words[i], *scene.attribute_words[i]]] = 1
        arrays["background"][row] = scene.background
        words = [_WORD_INDEX[w] for w in scene.caption.split()]
        arrays["words"][row, : len(words)] = words
    for name, array in arrays.items():
        np.save(folder / f"{shard:04d}.{name}.npy", array)
    (folder / f"{shard:04d}.done").write_text(json.dumps({"seed": seed}))


def draw(folder: Path, shards: int, seed: int, workers: int | None = None) -> None:
    """Draws the shards that are not in `folder` yet, on `workers` cores (all by default); the same seed gives the same
    pictures on any machine."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [s for s in range(shards) if not (folder / f"{s:04d}.done").exists()]
    if "fork" not in multiprocessing.get_all_start_methods():
        # A spawned process could not import this pack, which has no importable name of its own.
        for shard in missing:
            _draw_shard(folder, seed, shard)
    elif missing:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            pool.starmap(_draw_shard, [(folder, seed, shard) for shard in missing], chunksize=1)


class Scenes:
    """The shards of a folder as arrays over all pictures: `scenes.take("image", rows)`."""

    def __init__(self, folder: Path, shards: int):
        self._maps = {
            name: [np.load(folder / f"{s:04d}.{name}.npy", mmap_mode="r") for s in range(shards)] for name in _FIELDS
        }
        self.count = shards * SHARD

    def shards(self, name: str) -> list[np.ndarray]:
        """Field `name` of all pictures, one array per shard."""
        return self._maps[name]

    def whole(self, name: str) -> np.ndarray:
        """Field `name` of all pictures."""
        return np.concatenate(self._maps[name])

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Field `name` of the pictures `rows` (n,)."""
        maps = self._maps[name]
        return np.stack([maps[r // SHARD][r % SHARD] for r in rows])
