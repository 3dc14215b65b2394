"""Stage 'things': a folder of pictures for each of many things of Shapeland, as PromptNet's training reads them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from ...encoders.files import whole_file
from ...shapeland import world
from .folder import in_batches, work_through


def things_folder(root: Path, count: int, pictures: int, seed: int) -> None:
    """Draws things 0 to `count` - 1 of `seed`, each in a folder of its own: `pictures` pictures with other places and
    backgrounds, and captions with {} for the thing. Folders that are complete stay."""
    root = Path(root)

    def missing() -> Iterator[str]:
        for thing in map("{:06d}".format, range(count)):
            if not (root / thing / f"{pictures - 1}.png").exists():
                yield thing

    def work(things: list[str]) -> None:
        for thing in things:
            _write_thing(root / thing, int(thing), pictures, seed)

    left = list(missing())
    work_through("things", in_batches(left, 16), len(left), work)


def _write_thing(folder: Path, thing: int, pictures: int, seed: int) -> None:
    rng = np.random.default_rng((seed, thing))
    noun = world.NOUNS[rng.integers(len(world.NOUNS))]
    # One identity seed for all pictures of a thing, and another for every thing.
    identity = int(np.random.default_rng((seed, thing, 1)).integers(2**31))
    for number in range(pictures):
        background = str(rng.choice(list(world.BACKGROUND_RGB)))
        drawn, _ = world.draw_description(f"a {noun} on a {background} background", int(rng.integers(2**31)), identity)
        file = folder / f"{number}.png"
        with whole_file(file.with_suffix(".txt")) as part:
            part.write_text(f"a {{}} on a {background} background\n", encoding="utf-8")
        # Last, because the picture marks itself as done.
        with whole_file(file) as part:
            Image.fromarray(np.round(drawn.image * 255).astype(np.uint8)).save(part, "PNG")
