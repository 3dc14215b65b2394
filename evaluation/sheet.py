"""Contact sheets: the same seeds side by side, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

_SIDE = 128
_GAP = 6
_LINE = 18


@dataclass(frozen=True)
class SheetRow:
    """One seed: its references and the pictures of all variants, (H, W, 3) each in [0, 1]."""

    prompt: str
    references: tuple[torch.Tensor, ...]
    pictures: dict[str, torch.Tensor]


def contact_sheet(rows: Sequence[SheetRow]) -> Image.Image:
    """Rows below each other, each under its prompt; the columns are the references, then the variants.

    A variant that a row lacks is left blank.
    """
    variants = list(dict.fromkeys(name for row in rows for name in row.pictures))
    labels = ["reference"] * max(len(row.references) for row in rows) + variants
    blank = [None] * len(labels)
    step_x, step_y = _SIDE + _GAP, _SIDE + _LINE + _GAP
    sheet = Image.new("RGB", (len(labels) * step_x + _GAP, _LINE + len(rows) * step_y + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, label in enumerate(labels):
        pen.text((_GAP + column * step_x, 2), label, "black", font)
    for i, row in enumerate(rows):
        top = _LINE + i * step_y
        pen.text((_GAP, top), row.prompt, "gray", font)
        shown = [*row.references, *blank][: len(labels) - len(variants)] + [*map(row.pictures.get, variants)]
        for column, picture in enumerate(shown):
            if picture is not None:
                sheet.paste(_as_image(picture), (_GAP + column * step_x, top + _LINE))
    return sheet


def _as_image(picture: torch.Tensor) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
