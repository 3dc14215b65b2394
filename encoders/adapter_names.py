"""Names that trainers give the tensors of LoRAs and related adapters, and the scales that they store elsewhere.

Names are parsed only here: each becomes a place (the diffusion model or a text encoder), a layer, and a part of one of
the kinds in `adapters`. The known writers are kohya's sd-scripts, LyCORIS, old and new diffusers, PEFT, and
cloneofsimo/lora.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

DIFFUSION, TEXT, TEXT_2, ANYWHERE = "unet", "text_encoder", "text_encoder_2", ""
"""Places of layers; a layer without a prefix may be in any of them."""

_PEFT = "base_model.model."
_ROOTS = (
    *((prefix, ANYWHERE) for prefix in (_PEFT, "module.", "_orig_mod.", "lycoris_")),
    *((prefix, DIFFUSION) for prefix in ("model.diffusion_model.", "diffusion_model.", "unet.")),
    *((prefix, DIFFUSION) for prefix in ("lora_unet_", "lora_unet.")),
    *((prefix, TEXT) for prefix in ("lora_te_", "lora_te1_", "lora_te.", "lora_te1.", "text_encoder.")),
    *((f"text_encoders.clip_{name}.transformer.", TEXT) for name in "lh"),
    *(
        (prefix, TEXT_2)
        for prefix in ("lora_te2_", "lora_te2.", "text_encoder_2.", "text_encoders.clip_g.transformer.")
    ),
)
# PEFT appends the adapter's name to the part's name if a whole model was saved.
_ADAPTER = r"(?:\.(?!weight$|bias$)[^.]+)?"
_PARTS = tuple(
    (re.compile(pattern + "$"), part)
    for pattern, part in (
        (r"\.lora_(up|down|mid)\.weight", None),
        (r"(?:\.lora_linear_layer|[._]lora)\.(up|down)\.weight", None),
        (rf"\.lora_A{_ADAPTER}(?:\.weight)?", "down"),
        (rf"\.lora_B{_ADAPTER}(?:\.weight)?", "up"),
        (rf"\.lora_B{_ADAPTER}\.bias", "up_bias"),
        (rf"\.lora_magnitude_vector{_ADAPTER}(?:\.weight)?", "magnitude"),
        (r"\.(alpha|dora_scale|hada_\w+|lokr_\w+|oft_blocks|rescale|on_input)", None),
        (r"\.(diff|diff_b|set_weight|w_norm|b_norm)", None),
        (r"\.([ab][12]|bm)\.weight", None),
    )
)
_FACTORED = ("pissa", "olora", "corda")
"""PEFT initializations that subtract something from the base model's weights first."""

_NUMBERED = re.compile(rf"({DIFFUSION}|{TEXT}):(\d+):(up|down)")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT_ATTENTION = ("k_proj", "v_proj", "q_proj", "out_proj")


class Layer(NamedTuple):
    """A layer that a file has tensors for: its place, and its name with underscores and without prefix."""

    place: str
    name: str


class Named(NamedTuple):
    """A tensor with the name that a file gives it."""

    name: str
    tensor: torch.Tensor


Group = dict[str, Named]
"""The tensors of one layer, by part."""


def layer_of(name: str) -> Layer:
    """Place and plain name of a layer, whichever program wrote its name."""
    place = ANYWHERE
    while found := next((root for root in _ROOTS if name.startswith(root[0])), None):
        name, place = name.removeprefix(found[0]), place or found[1]
    plain = name.replace(".processor.", ".").removesuffix("_lora").replace(".", "_")
    if place in (ANYWHERE, TEXT, TEXT_2) and plain.startswith("text_model_"):
        place = place or TEXT
    return Layer(place, plain.removeprefix("text_model_") if place in (TEXT, TEXT_2) else plain)


def names_a_part(name: str) -> bool:
    """Whether a tensor's name is that of an adapter's part, in any layer."""
    return is_numbered(name) or any(pattern.search(name) for pattern, _ in _PARTS)


def is_numbered(name: str) -> bool:
    """Whether a tensor's name has the form of cloneofsimo/lora, which `numbered_names` reads."""
    return bool(_NUMBERED.fullmatch(name))


def grouped(state: Mapping[str, torch.Tensor]) -> tuple[dict[Layer, Group], dict[str, torch.Tensor]]:
    """A file's tensors by layer and part, and those whose names are not those of a part.

    Raises:
        ValueError: two tensors have the same layer and part.
    """
    groups: dict[Layer, Group] = {}
    rest = {}
    for name, tensor in state.items():
        layer, part = _split(name, state)
        if part is None:
            rest[name] = tensor
            continue
        group = groups.setdefault(layer_of(layer), {})
        if part in group:
            raise ValueError(
                f"file: expected one adapter, got two: {group[part].name!r} and {name!r} are for one layer"
            )
        group[part] = Named(name, tensor)
    return groups, rest


def _split(name: str, state: Mapping[str, torch.Tensor]) -> tuple[str, str | None]:
    for pattern, part in _PARTS:
        if match := pattern.search(name):
            return name[: match.start()], part or match[1]
    layer = name.removesuffix(".weight")
    if layer != name and f"{layer}.on_input" in state:
        return layer, "weight"
    return name, None


def numbered_names(state: Mapping[str, torch.Tensor], layers: Mapping[str, Sequence[int]]) -> dict[str, torch.Tensor]:
    """Replaces the layer numbers in a file of cloneofsimo/lora with the names of the layers.

    The numbers follow the modules of a UNet as in diffusers of early 2023: down blocks, up blocks, then the middle
    block; in a transformer block the self-attention, in later files the feed-forward's gate, then the cross-attention.
    Text encoders have attention layers only.

    Args:
        state: tensors with names such as unet:0:up.
        layers: shapes of the UNet's weights by diffusers' names, including .weight.

    Raises:
        ValueError: factors are missing, or the number or the shapes of the layers belong to another model.
    """
    found: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in state.items():
        place, number, end = name.split(":")
        found.setdefault(place, {}).setdefault(int(number), {})[end] = tensor
    named = {}
    for place, pairs in found.items():
        if sorted(pairs) != list(range(len(pairs))) or any(len(pair) != 2 for pair in pairs.values()):
            raise ValueError(
                f"file: expected both factors of {place}:0, {place}:1 and so on, got a file that lacks some"
            )
        if place == DIFFUSION:
            names = _unet_order(pairs, layers)
        else:
            names = [
                f"{TEXT}.text_model.encoder.layers.{n // 4}.self_attn.{_TEXT_ATTENTION[n % 4]}"
                for n in range(len(pairs))
            ]
        for number, layer in enumerate(names):
            named |= {f"{layer}.lora_{end}.weight": tensor for end, tensor in pairs[number].items()}
    return named


def _unet_order(pairs: Mapping[int, Mapping[str, torch.Tensor]], layers: Mapping[str, Sequence[int]]) -> list[str]:
    blocks = list(dict.fromkeys(name.rpartition(".attn1.")[0] for name in layers if ".attn1.to_q." in name))
    order = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    blocks.sort(key=lambda block: (order[block.partition(".")[0]], [int(n) for n in re.findall(r"\d+", block)]))
    attention = [[f"{attn}.{part}" for part in _ATTENTION] for attn in ("attn1", "attn2")]
    given = [(pairs[n]["up"].shape[0], pairs[n]["down"].flatten(1).shape[1]) for n in range(len(pairs))]
    for between in (["ff.net.0.proj"], []):
        names = [f"{block}.{part}" for block in blocks for part in (*attention[0], *between, *attention[1])]
        wanted = [(layers[f"{name}.weight"][0], math.prod(layers[f"{name}.weight"][1:])) for name in names]
        if given == wanted:
            return [f"{DIFFUSION}.{name}" for name in names]
    raise ValueError(
        f"file: expected the attention layers of this model, {len(blocks) * 8} or {len(blocks) * 9} in their order, "
        f"got {len(pairs)} numbered ones of another"
    )


# ---- scales that are not in the tensors ---------------------------------------------------------------------------


def scale_of(layer: Layer, group: Group, about: Mapping[str, str], rank: int | None = None) -> float | None:
    """The factor of a layer's adapter if the file stores it outside the tensors; None if the tensors determine it.

    PEFT stores alpha and rank in adapter_config.json, whose content `about` has under "adapter_config"; diffusers
    writes the same into the metadata of safetensors, by place. In LyCORIS, a LoKr of two whole factors has the scale 1,
    or the square root of the rank if training was rank-stabilised; in the latter case its alpha is that root times the
    rank. To recognize it, alpha is compared with `rank`, the rank of the file's other layers; without `rank`, any alpha
    that is not a whole number counts as rank-stabilised.

    Raises:
        ValueError: PEFT started from changed base weights, which the file does not hold.
    """
    if "alpha" not in group:
        return _peft_scale(layer, group, _peft_config(layer, about))
    if not {"lokr_w1", "lokr_w2"} <= set(group):
        return None
    alpha = float(group["alpha"].tensor)
    stabilised = alpha % 1 if rank is None else rank > 1 and math.isclose(alpha, rank**1.5, rel_tol=1e-2)
    return alpha ** (1 / 3) if stabilised else 1.0


def lost_its_scale(state: Mapping[str, torch.Tensor], about: Mapping[str, str]) -> bool:
    """Whether PEFT saved the adapter, and the configuration with alpha that it stores next to it is missing."""
    kept = {"adapter_config", "lora_adapter_metadata"} & set(about)
    return any(name.startswith(_PEFT) for name in state) and not kept


def lokr_rank(groups: Mapping[Layer, Group]) -> int | None:
    """The rank of a file's factored LoKr layers, which is the same for all; None if there is no such layer."""
    ends = ("lokr_w1_b", "lokr_w2_b")
    return next((len(group[end].tensor) for group in groups.values() for end in ends if end in group), None)


def _peft_config(layer: Layer, about: Mapping[str, str]) -> dict[str, Any]:
    if config := about.get("adapter_config"):
        return _json(config)
    config = _json(about.get("lora_adapter_metadata", "{}"))
    prefix = f"{layer.place or DIFFUSION}."
    return {name.removeprefix(prefix): value for name, value in config.items() if name.startswith(prefix)}


def _json(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _peft_scale(layer: Layer, group: Group, config: Mapping[str, Any]) -> float | None:
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(_FACTORED):
        raise ValueError(f"file: expected a LoRA for the base model as it is, got one that was begun with {start}")
    alpha = _by_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", config.get("alpha")))
    rank = _by_pattern(config.get("rank_pattern"), layer, config.get("r"))
    if "down" in group:
        rank = len(group["down"].tensor)
    if not alpha or not rank:
        return None
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(patterns: Mapping[str, float] | None, layer: Layer, otherwise: float | None) -> float | None:
    """PEFT's patterns are suffixes of a layer's name, or regular expressions for them."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*_)?({pattern.replace(chr(92) + '.', '_').replace('.', '_')})$", layer.name):
            return value
    return otherwise
