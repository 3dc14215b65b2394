"""Writes the README's picture of Shapeland: `python tools/make_pictures.py`."""

import numpy as np
from environment import ROOT
from PIL import Image
from run import alias_pack

ROWS, COLUMNS, ENLARGE, GAP = 2, 8, 2, 6


def main() -> None:
    """Draws a sheet of random scenes."""
    alias_pack()
    from conceptloom.shapeland import world

    side = world.SIZE * ENLARGE
    sheet = Image.new("RGB", (COLUMNS * (side + GAP) - GAP, ROWS * (side + GAP) - GAP), "white")
    for i in range(ROWS * COLUMNS):
        picture = world.render(world.random_scene(np.random.default_rng((0, i))), ENLARGE)
        drawn = Image.fromarray((picture.image * 255).round().astype("uint8"))
        sheet.paste(drawn, (i % COLUMNS * (side + GAP), i // COLUMNS * (side + GAP)))
    file = ROOT / "docs" / "images" / "shapeland.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file, optimize=True)


if __name__ == "__main__":
    main()
