"""Single representations for what consumes them today: ControlNets, T2I-Adapters, unCLIP and style models.

Each takes its hint in a convention of its own: sketches with white strokes on black, which T2I-Adapters were trained on
without gray; depth that is near where it is white; the colors of ADE20K for segments; and pictures with holes that are
-1, or beside which the mask is given.
"""

from __future__ import annotations

import comfy.clip_vision
import comfy.controlnet
import torch

from ...compositions.composition import (
    DEPTH,
    INSTANCES,
    INTENSITY,
    MASK,
    PALETTE,
    SEMANTICS,
    SKETCH,
    Composition,
)
from ...compositions.instance_map import ADE20K, coded
from ...compositions.palette import TILES, palette_picture

HINTS = (SKETCH, DEPTH, INSTANCES, INTENSITY, MASK, PALETTE)
"""Representations that have a picture for a ControlNet or a T2I-Adapter."""
_HOLE = -1.0


def hint_of(composition: Composition, name: str, binary: bool = False) -> torch.Tensor:
    """The picture (1, H, W, 3) of a representation as ControlNets and T2I-Adapters take it.

    Args:
        name: one of HINTS. The palette's has its colors in random places, for color adapters read them with their
            places.
        binary: makes a sketch black and white.

    Raises:
        ValueError: the composition does not have it.
    """
    value = present(composition, name)
    if name == INSTANCES:
        picture = coded(value, ADE20K)
    elif name == MASK:
        picture = torch.where(value.mask[..., None] > 0, torch.full_like(value.image, _HOLE), value.image)
    elif name == PALETTE:
        picture = palette_picture(value, composition.size[1], composition.size[0], TILES)
    else:
        plane = (value > value.max() / 2).float() if name == SKETCH and binary else value
        picture = plane[..., None].expand(-1, -1, 3)
    return picture[None].contiguous()


def present(composition: Composition, name: str):
    """The value of a representation.

    Raises:
        ValueError: the composition does not have it.
    """
    if name not in composition:
        known = ", ".join(composition.parts) or "nothing"
        raise ValueError(f"composition: expected one with {name}, got one with {known}")
    return composition[name]


def apply_control(positive: list, negative: list, composition: Composition, name: str, control_net, vae=None):
    """Both conditionings with a ControlNet or T2I-Adapter for a representation, at its strength and in its part of the
    schedule.

    Raises:
        ValueError: the composition does not have it, or the net does not take it.
    """
    from nodes import ControlNetApplyAdvanced

    hint = hint_of(composition, name, isinstance(control_net, comfy.controlnet.T2IAdapter))
    part, beside = composition.parts[name], []
    if name == MASK and getattr(control_net, "concat_mask", False):
        kept = 1 - part.value.mask[None, None]
        hint, beside = part.value.image[None] * kept[0, ..., None], [kept]
    elif name == MASK and getattr(control_net, "latent_format", None) is not None:
        raise ValueError("control_net: expected one for inpainting, got one that encodes its hint and takes no mask")
    how = part.strength, part.start_percent, part.end_percent
    return ControlNetApplyAdvanced().apply_controlnet(
        positive, negative, control_net, hint, *how, vae, extra_concat=beside
    )


def vision_output(composition: Composition):
    """The semantics as ComfyUI's CLIP_VISION_OUTPUT, for unCLIP and style models.

    Raises:
        ValueError: the composition has none.
    """
    semantics = present(composition, SEMANTICS)
    output = _WithoutTokens() if semantics.tokens is None else comfy.clip_vision.Output()
    output["image_embeds"] = (semantics.embedding * semantics.norm)[None]
    output["penultimate_hidden_states"] = None
    if semantics.tokens is not None:
        output["last_hidden_state"] = semantics.tokens[None]
    return output


class _WithoutTokens(comfy.clip_vision.Output):
    """The output of a vision tower of which only the embedding is known."""

    @property
    def last_hidden_state(self):
        """What style models take."""
        raise ValueError(
            "clip_vision_output: expected the tokens of a picture for a style model, got semantics without them, such "
            "as Caption Prior's; take those of Decompose Image"
        )
