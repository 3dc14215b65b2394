"""What a person sees of a composition: a picture of each representation, and all of them on one sheet."""

from __future__ import annotations

import textwrap
from typing import Any

import torch

from .composition import INSTANCES, MASK, PALETTE, Composition, described
from .instance_map import coded
from .palette import palette_picture

TILE = 256
_COLUMNS = 4
_LABEL = 18


def shown(name: str, value: Any, size: tuple[int, int]) -> torch.Tensor | None:
    """A picture (H, W, 3) of a representation; None for one that has none."""
    if name == PALETTE:
        scale = TILE / max(size)
        return palette_picture(value, max(1, round(size[1] * scale)), max(1, round(size[0] * scale)))
    if name == INSTANCES:
        return coded(value)
    if name == MASK:
        return value.shown
    if isinstance(value, torch.Tensor):
        return value[..., None].expand(-1, -1, 3)
    return None


def contact_sheet(composition: Composition) -> torch.Tensor:
    """All representations of a composition on one sheet (H, W, 3), each with its name."""
    from PIL import Image, ImageDraw

    names = list(composition.parts)
    columns = max(1, min(_COLUMNS, len(names)))
    rows = max(1, -(-len(names) // columns))
    sheet = Image.new("RGB", (columns * TILE, rows * (TILE + _LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        part = composition.parts[name]
        left, top = i % columns * TILE, i // columns * (TILE + _LABEL)
        draw.text((left + 4, top + 3), name, fill="black")
        picture = shown(name, part.value, composition.size)
        if picture is None:
            text = "\n".join(textwrap.wrap(described(name, part), 38)[:14])
            draw.multiline_text((left + 8, top + _LABEL + 8), text, fill="black")
            continue
        pixels = (picture.float().clamp(0, 1) * 255).round().byte().cpu().numpy()
        image = Image.fromarray(pixels)
        scale = TILE / max(image.size)
        inner = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(inner, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS)
        sheet.paste(image, (left + (TILE - image.width) // 2, top + _LABEL + (TILE - image.height) // 2))
    if not names:
        draw.text((8, _LABEL), "nothing", fill="black")
    return torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3) / 255
