"""Stage 'compositions': pictures of Shapeland with their instances and depth, as Composer is trained on them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from ...encoders.files import whole_file
from ...shapeland import world
from .folder import in_batches, work_through


def compositions_folder(root: Path, count: int, seed: int) -> None:
    """Draws scenes 0 to `count` - 1 of `seed` into folders of a thousand, each with its caption, instances and depth
    beside it. Pictures that are there stay.

    Every other caption names nothing but nouns: where a caption says all colors, a palette or an intensity has nothing
    to add, and is not learned.
    """
    root = Path(root)

    def place(number: int) -> Path:
        return root / f"{number // 1000:04d}" / f"{number:07d}.png"

    missing = [str(number) for number in range(count) if not place(number).exists()]

    def work(numbers: list[str]) -> None:
        for number in map(int, numbers):
            scene = world.random_scene(np.random.default_rng((seed, number)))
            _write_scene(place(number), scene, nouns_of(scene) if number % 2 else scene.caption)

    work_through("compositions", in_batches(missing, 64), len(missing), work)


def nouns_of(scene: world.Scene) -> str:
    """The scene's caption without looks, sizes, places and background."""
    counts, things = Counter(scene.noun_words), dict(zip(scene.noun_words, scene.things, strict=True))
    return world.caption_of([world.Mention(things[word].noun, count=counts[word]) for word in sorted(counts)], None)[0]


def _write_scene(file: Path, scene: world.Scene, caption: str) -> None:
    picture = world.render(scene)
    labels = np.where(picture.masks.sum(0) > 0.5, picture.masks.argmax(0) + 1, 0)
    nouns = [world.NOUNS[thing.noun] for thing in scene.things]
    for ending, text in ((".txt", caption), (".instances.txt", "\n".join(nouns))):
        with whole_file(file.with_name(file.stem + ending)) as part:
            part.write_text(text + "\n", encoding="utf-8")
    # The picture comes last, because it marks its files as done.
    for ending, values in (
        (".instances.png", labels),
        (".depth.png", np.round(picture.depth * 255)),
        (".png", np.round(picture.image * 255)),
    ):
        with whole_file(file.with_name(file.stem + ending)) as part:
            Image.fromarray(values.astype(np.uint8)).save(part, "PNG")
