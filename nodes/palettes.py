"""Nodes of color: palettes, and recoloring."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..compositions.luma import LAB, MODES, luma_merge
from ..compositions.palette import (
    DEFAULT_TABLE,
    LAYOUTS,
    SIGMA,
    STRIP,
    TABLES,
    palette_of_colors,
    palette_of_picture,
    palette_picture,
    read_colors,
)
from ..subjects.masks import as_mask
from .types import Node, PaletteSocket, one_picture, preview

CATEGORY = "ConceptLoom/Composer"


class Palette(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomPalette",
            display_name="Palette",
            category=CATEGORY,
            description="How much of a picture has which color, wherever it is: of a picture, of a part of it, or of "
            "colors that you pick (Composer).",
            search_aliases=["Composer", "color palette", "color histogram", "colours", "extract colors", "rayleigh"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input(
                    "image", optional=True, tooltip="One picture; with alpha, its transparent part is left out."
                ),
                io.Mask.Input("mask", optional=True, tooltip="White on the part of the picture that counts."),
                io.String.Input(
                    "colors",
                    default="",
                    tooltip='Picked colors with their shares: "#ff8000, #202040 3" is one part orange, three parts '
                    "dark blue.",
                ),
                io.Float.Input(
                    "color_share",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the picked colors where there is a picture too.",
                ),
                io.Combo.Input(
                    "table",
                    options=list(TABLES),
                    default=DEFAULT_TABLE,
                    advanced=True,
                    tooltip="Colors of the histogram: 156 as this pack's adapters take it, 180 as DiffBlender does.",
                ),
                io.Float.Input(
                    "sigma",
                    default=SIGMA,
                    min=0.0,
                    max=50.0,
                    step=0.5,
                    advanced=True,
                    tooltip="How far similar colors count too, in units of CIELab. 10 is the published value; 0 "
                    "smooths nothing.",
                ),
            ],
            outputs=[
                PaletteSocket.Output("palette", tooltip="For Decompose Image and Palette to Image."),
                io.Image.Output(display_name="image", tooltip="Its main colors as strips."),
            ],
        )

    @classmethod
    def execute(cls, colors, color_share, table, sigma, image=None, mask=None) -> io.NodeOutput:
        if image is None and not colors.strip():
            raise ValueError("image: expected a picture, or colors such as #ff8000, got neither")
        made = None
        if image is not None:
            made = palette_of_picture(one_picture(image), None if mask is None else as_mask(mask), table, sigma)
        if colors.strip():
            picked = palette_of_colors(*read_colors(colors), table, sigma)
            made = picked if made is None else made.mixed(picked, color_share)
        shown = palette_picture(made, 256, 64)
        return io.NodeOutput(made, shown[None], ui=preview(cls, shown))


class PaletteToImage(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomPaletteToImage",
            display_name="Palette to Image",
            category=CATEGORY,
            description="A picture of a palette's main colors with their areas: a reference for "
            "Transfer Color, or a hint for color adapters that says nothing about places.",
            search_aliases=["Composer", "color reference", "color strip", "voronoi", "color transfer"],
            inputs=[
                PaletteSocket.Input("palette", tooltip="From Palette."),
                io.Int.Input("width", default=512, min=8, max=8192, step=8, tooltip="Of the picture, in pixels."),
                io.Int.Input("height", default=512, min=8, max=8192, step=8, tooltip="Of the picture, in pixels."),
                io.Combo.Input(
                    "layout",
                    options=list(LAYOUTS),
                    default=STRIP,
                    tooltip="strips: from left to right. tiles: in random places, for models that read colors with "
                    "their places.",
                ),
                io.Int.Input("count", default=16, min=1, max=180, tooltip="Number of main colors."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the tiles.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, palette, width, height, layout, count, seed) -> io.NodeOutput:
        return io.NodeOutput(palette_picture(palette, width, height, layout, count, seed)[None])


class LumaMerge(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLumaMerge",
            display_name="Luma Merge",
            category=CATEGORY,
            description="The lightness of one picture with the colors of another: brings back the detail of a picture "
            "that was recolored.",
            search_aliases=["Composer", "recolor", "colorize", "luminance", "LAB", "color blend"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input(
                    "light", tooltip="Pictures whose lightness is kept; one for all, or as many as in color."
                ),
                io.Image.Input(
                    "color", tooltip="Pictures whose colors are taken; one for all, or as many as in light."
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=LAB,
                    tooltip="CIELab keeps the lightness that is seen; Rec. 601 the intensity of these weights.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 leaves the colored pictures as they are.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The merged pictures.")],
        )

    @classmethod
    def execute(cls, light, color, mode, strength) -> io.NodeOutput:
        if light.shape[1:3] != color.shape[1:3]:
            sizes = [f"{one.shape[2]} x {one.shape[1]}" for one in (light, color)]
            raise ValueError(f"color: expected the size of light, {sizes[0]}, got {sizes[1]}; scale one of them")
        count = max(len(light), len(color))
        if not {len(light), len(color)} <= {1, count}:
            raise ValueError(f"color: expected one picture or {len(light)}, as in light, got {len(color)}")
        pictures = [one[..., :3].expand(count, -1, -1, -1) for one in (light, color)]
        merged = torch.cat(
            [luma_merge(a, b, mode, strength) for a, b in zip(*(p.split(1) for p in pictures), strict=True)]
        )
        return io.NodeOutput(merged, ui=preview(cls, merged[0]))


NODES: list[type[Node]] = [Palette, PaletteToImage, LumaMerge]
