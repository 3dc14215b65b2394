"""Draws the pack's icon: colored threads woven into one cloth. `python tools/make_icon.py`

Every warp thread (upright) is a subject with its own color, every weft thread (across) the
picture that takes them all in; they pass over and under each other in a twill.
"""

import numpy as np
from environment import ROOT
from PIL import Image

SIZE = 400
SCALE = 3  # drawn larger and scaled down, for smooth edges
THREADS = 6
THICKNESS = 0.78  # of the distance between two threads
CORNER = 0.20
BACKGROUND = (24, 26, 38)
WARP = ((239, 71, 111), (255, 166, 48), (255, 221, 87), (64, 201, 137), (38, 170, 225), (139, 108, 239))
WEFT = (238, 234, 224)


def thread_shade(across: np.ndarray, along: np.ndarray, raised: np.ndarray) -> np.ndarray:
    """Brightness of a round twisted thread: `across` in -1..1 over its width, `along` in thread distances."""
    roundness = np.sqrt(np.clip(1 - across**2, 0, 1))
    twist = 0.5 + 0.5 * np.sin(2 * np.pi * (along * 2.5 + across * 0.45))
    return (0.30 + 0.70 * roundness) * (0.90 + 0.10 * twist) * (0.55 + 0.45 * raised)


def draw() -> Image.Image:
    """The icon as an RGBA picture."""
    side = SIZE * SCALE
    y, x = (np.mgrid[:side, :side] + 0.5) / side * THREADS
    column, row = x.astype(int), y.astype(int)
    warp_across = (x - column - 0.5) * 2 / THICKNESS
    weft_across = (y - row - 0.5) * 2 / THICKNESS

    # A 2/2 twill: at each crossing one of the two lies on top, shifted by one from row to row.
    # A thread's height follows a wave along its length, highest in the middle of where it is on top.
    phase = 2 * np.pi / 4
    warp_height = 0.5 + 0.5 * np.cos(phase * (y - 1.0 + column))
    weft_height = 0.5 - 0.5 * np.cos(phase * (x - 1.0 + row))

    colors = np.array(WARP, float)
    warp = colors[column % len(WARP)] * thread_shade(warp_across, y, warp_height)[..., None]
    weft = np.array(WEFT, float) * thread_shade(weft_across, x, weft_height)[..., None]

    picture = np.empty((side, side, 3))
    picture[:] = BACKGROUND
    on_warp, on_weft = np.abs(warp_across) < 1, np.abs(weft_across) < 1
    warp_on_top = on_warp & (~on_weft | ((column + row) % 4 < 2))
    weft_on_top = on_weft & ~warp_on_top
    picture[warp_on_top] = warp[warp_on_top]
    picture[weft_on_top] = weft[weft_on_top]

    # Rounded corners: distance to the rounded square, in pixels of the large picture.
    radius = CORNER * side
    grid = np.abs(np.mgrid[:side, :side] + 0.5 - side / 2) - (side / 2 - radius)
    outside = np.hypot(*np.clip(grid, 0, None)) > radius
    alpha = np.where(outside, 0, 255)
    rgba = np.dstack([picture, alpha]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(rgba, "RGBA").resize((SIZE, SIZE), Image.LANCZOS)


if __name__ == "__main__":
    place = ROOT / "assets" / "icon.png"
    place.parent.mkdir(exist_ok=True)
    draw().save(place, optimize=True)
    print(place)
