"""Reads the files of customized diffusion models, whichever program wrote them.

The format of a loaded state dict is recognized by its contents. Layers keep their names in the file: CompVis's
(input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight) or diffusers' (down_blocks.0.attentions.0 and so on);
`adapter_names` parses those of LoRAs.

The formats are those of Custom Diffusion's CompVis and diffusers training (Kumari et al., arXiv 2212.04488), diffusers'
own custom_diffusion example, and TweedieMix (Kwon and Ye, arXiv 2410.05591).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .adapter_names import is_numbered, names_a_part

COMPVIS = "Custom Diffusion (CompVis)"
DIFFUSERS = "Custom Diffusion (diffusers)"
SDXL = "Custom Diffusion (diffusers, SDXL)"
TWEEDIEMIX = "Custom Diffusion (TweedieMix)"
PROCESSORS = "Custom Diffusion (diffusers' attention processors)"
COMPRESSED = ", compressed"
LORA = "LoRA"

_UNET, _TEXT = "unet", ("text_encoder", "text_encoder_2")
_TOKENS = ("modifier_token", "modifier_token_2")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.")
_COMPVIS_TEXT = "cond_stage_model.transformer."
_COMPVIS_TOKENS = "embed"
_COMPVIS_LAYERS = ("input_blocks.", "middle_block.", "output_blocks.")
_BUNDLED = re.compile(r"bundle_emb\.(.+)\.(?:string_to_param\.\*|clip_([lgh]))")
_SDXL = (("l", 768), ("g", 1280))
_EMBEDDING_KEYS = {"clip_l": "l", "clip_g": "g", "clip_h": "h"}
_PROCESSOR_NAME = re.compile(r"\.processor\.(to_(?:k|v|q|out))_custom_diffusion\.")
_KEYS_AND_VALUES = re.compile(r"attn2\.to_[kv]\.weight$")

State = dict[str, torch.Tensor]
Tokens = dict[str, State]


@dataclass(frozen=True, eq=False)
class ConceptFile:
    """The contents of a file.

    Attributes:
        source_format: the format, one of the constants above.
        weights: whole weights and biases, by the file's names.
        factors: differences of weights as factors (out, r) and (r, in), by the file's names; r may be 0.
        lora: tensors of a LoRA or related adapter, by the file's names, for `adapter_names` to parse.
        tokens: by placeholder and text encoder (l, g, h), (n, d).
        text: whole weights of text encoders, by encoder.
        about: metadata in the file or next to it (see `adapter_names.scale_of`).
    """

    source_format: str
    weights: State = field(default_factory=dict)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    lora: State = field(default_factory=dict)
    tokens: Tokens = field(default_factory=dict)
    text: dict[str, State] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)

    @property
    def text_width(self) -> int | None:
        """Width of the text states that keys and values are computed from; None for a LoRA."""
        return _text_width([*self.weights.items(), *((name, down) for name, (_, down) in self.factors.items())])


def read(state: Any, about: Mapping[str, str] | None = None) -> ConceptFile:
    """Interprets a loaded file.

    Args:
        state: tensors by name, possibly in sections, or the list of tensors that cloneofsimo/lora once saved.
        about: metadata of safetensors, and under "adapter_config" the content of PEFT's file of that name.

    Raises:
        ValueError: it is in none of the known formats, or holds non-finite numbers.
    """
    if isinstance(state, list) and state and len(state) % 2 == 0 and all(map(torch.is_tensor, state)):
        state = {f"unet:{n // 2}:{'up' if n % 2 == 0 else 'down'}": tensor for n, tensor in enumerate(state)}
    if not isinstance(state, Mapping):
        raise ValueError(f"file: expected a concept, got {_few(state)}")
    if isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if isinstance(state.get(_UNET), Mapping):
        layers, tokens, text = _sections(state)
        origin = TWEEDIEMIX if _TOKENS[1] in state else SDXL if any(map(_is_sdxl, tokens.values())) else DIFFUSERS
    else:
        layers, tokens, text, origin = dict(state), {}, {}, DIFFUSERS
    # diffusers saves an empty dict for every processor that was not trained.
    layers = {name: value for name, value in layers.items() if not (isinstance(value, Mapping) and not value)}
    if any(map(names_a_part, layers)):
        tokens |= _bundled(layers)
        if any(map(is_numbered, layers)):
            # cloneofsimo/lora stores its tokens next to the layers.
            tokens |= _paired({name: layers.pop(name) for name in list(layers) if not names_a_part(name)}, {})
        _check_tensors(layers)
        return ConceptFile(LORA, lora=layers, tokens=tokens, text=text, about=about or {})
    if _COMPVIS_TOKENS in layers:
        rows = _tensor(_COMPVIS_TOKENS, layers.pop(_COMPVIS_TOKENS))
        tokens = _numbered(rows, rows.shape[-1] if rows.ndim == 2 else _text_width(layers.items()))
    of_text = {name: layers.pop(name) for name in list(layers) if name.startswith(_COMPVIS_TEXT)}
    if of_text:
        text = _by_encoder({name.removeprefix(_COMPVIS_TEXT): value for name, value in of_text.items()})
    layers = {_plain_name(name): value for name, value in layers.items()}
    if not any(_KEYS_AND_VALUES.search(name) for name in layers):
        first = next(iter(layers), None)
        raise ValueError(
            "file: expected a concept (Custom Diffusion, TweedieMix, a LoRA, or one of Save Concept), got a file "
            f"without keys or values of cross-attention{f', only such as {first!r}' if first else ''}"
        )
    if any(name.startswith(_COMPVIS_LAYERS) for name in layers):
        origin = COMPVIS
    elif any(_PROCESSOR_NAME.search(name) for name in state):
        origin = PROCESSORS
    factors = {name: _pair(name, value) for name, value in layers.items() if isinstance(value, Mapping)}
    weights = {name: value for name, value in layers.items() if name not in factors}
    _check_tensors(weights)
    return ConceptFile(origin + (COMPRESSED if factors else ""), weights, factors, {}, tokens, text)


def read_tokens(state: Any) -> Tokens:
    """The tokens of an embedding or of a concept's file, by placeholder and text encoder (l, g, h), (n, d).

    Tokens of files that name no placeholder (textual inversion embeddings) are called "<new1>".

    Raises:
        ValueError: the file holds no tokens.
    """
    if isinstance(state, Mapping) and "string_to_param" in state:
        # AUTOMATIC1111 and the original textual inversion; in old files the value is a ParameterDict.
        held = state["string_to_param"]
        held = getattr(held, "_parameters", held)
        if not isinstance(held, Mapping) or len(held) != 1:
            raise ValueError(f"token: expected one embedding in string_to_param, got {_few(held)}")
        return _paired({"<new1>": next(iter(held.values()))}, {})
    if isinstance(state, list) and state and all(isinstance(one, Mapping) for one in state):
        return _by_width([_rows(tensor) for one in state for tensor in one.values()])
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"token: expected an embedding or a file with a concept's word, got {_few(state)}")
    if any(name in state for name in _TOKENS):
        return _paired(*(state.get(name, {}) for name in _TOKENS))
    if any(name in state for name in _EMBEDDING_KEYS):
        foreign = next((name for name in state if name not in _EMBEDDING_KEYS), None)
        if foreign:
            raise ValueError(f"token: expected rows for {', '.join(_EMBEDDING_KEYS)}, got some for {foreign!r}")
        return {"<new1>": {_EMBEDDING_KEYS[name]: _rows(tensor) for name, tensor in state.items()}}
    if set(state) == {"emb_params"}:
        return _paired({"<new1>": state["emb_params"]}, {})
    rest = dict(state)
    if tokens := _bundled(rest):
        return tokens
    foreign = next((name for name in state if names_a_part(name) or _KEYS_AND_VALUES.search(name)), None)
    if foreign:
        raise ValueError(f"token: expected an embedding or a file with a concept's word, got one with {foreign!r}")
    return _paired(state, {})


def _bundled(state: dict[str, Any]) -> Tokens:
    """Removes the embeddings that trainers put into LoRAs from `state`, and returns them."""
    tokens: Tokens = {}
    for name in list(state):
        if match := _BUNDLED.fullmatch(name):
            rows = _rows(state.pop(name))
            tokens.setdefault(match[1], {})[match[2] or _only_encoder(rows.shape[1])] = rows
    return tokens


def _by_width(rows: list[torch.Tensor]) -> Tokens:
    """A token without a name, from rows for one text encoder or for SDXL's two, in any order."""
    widths = {row.shape[1] for row in rows}
    if len(widths) == 1:
        return _paired({"<new1>": torch.cat(rows)}, {})
    if widths != {768, 1280}:
        given = " and ".join(str(width) for width in sorted(widths))
        raise ValueError(f"token: expected rows of one width, or of 768 and 1280 for SDXL, got {given}")
    return {"<new1>": {name: torch.cat([row for row in rows if row.shape[1] == width]) for name, width in _SDXL}}


def _few(value: Any) -> str:
    """A short description of a value, for an error message."""
    if isinstance(value, Mapping):
        return ", ".join(map(repr, list(value)[:3])) or "nothing"
    if isinstance(value, (list, tuple)):
        return f"{len(value)} entries" + (f", the first a {type(value[0]).__name__}" if value else "")
    return f"a {type(value).__name__}"


def _sections(state: Mapping[str, Any]) -> tuple[dict, Tokens, dict[str, State]]:
    known = {_UNET, *_TOKENS, *_TEXT}
    foreign = next((name for name in state if name not in known), None)
    if foreign:
        raise ValueError(f"file: expected the sections {', '.join(sorted(known))} alone, got {foreign!r}")
    text = {}
    for name in _TEXT:
        if state.get(name):
            _check_tensors(state[name])
            text |= _by_encoder(state[name])
    return dict(state[_UNET]), _paired(*(state.get(name, {}) for name in _TOKENS)), text


def _plain_name(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return _PROCESSOR_NAME.sub(r".\1.", name)


def _tensor(name: str, value: Any) -> torch.Tensor:
    if not torch.is_tensor(value):
        raise ValueError(f"file: expected tensors, got {name!r}, a {type(value).__name__}")
    if value.is_floating_point() and not torch.isfinite(value.float()).all():
        raise ValueError(f"file: expected finite numbers, got NaN or infinity in {name!r}")
    return value


def _check_tensors(state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        _tensor(name, value)


def _pair(name: str, value: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    if set(value) != {"u", "v"}:
        raise ValueError(f"file: expected the factors u and v for {name!r}, got {', '.join(map(str, value))}")
    up, down = (_tensor(name, value[end]) for end in ("u", "v"))
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
        given = f"{tuple(up.shape)} and {tuple(down.shape)}"
        raise ValueError(f"file: expected factors that fit together for {name!r}, got {given}")
    return up, down


def _text_width(layers: Iterable[tuple[str, Any]]) -> int | None:
    for name, value in layers:
        if _KEYS_AND_VALUES.search(name):
            return (value["v"] if isinstance(value, Mapping) else value).shape[-1]
    return None


def _rows(value: Any) -> torch.Tensor:
    """A token (d,) or (n, d) as (n, d) in memory of its own, because files hold views of whole vocabularies."""
    value = _tensor("the token", value)
    if value.ndim not in (1, 2) or not value.numel():
        raise ValueError(f"token: expected one row or several, got the shape {tuple(value.shape)}")
    return value.detach().to("cpu", torch.float32, copy=True).reshape(-1, value.shape[-1])


def _only_encoder(width: int) -> str:
    """The text encoder with a given width, for models that have only one."""
    return "h" if width == 1024 else "l"


def _paired(first: Mapping[str, Any], second: Mapping[str, Any]) -> Tokens:
    """Tokens with rows for one encoder, for two in a list, or with the second encoder's rows in a second dict."""
    tokens: Tokens = {}
    lonely = next((name for name in second if name not in first), None)
    if lonely:
        raise ValueError(f"token: expected rows for both text encoders for {lonely}, got one for the second alone")
    for name, value in first.items():
        if name in second:
            value = (value, second[name])
        if isinstance(value, (list, tuple)):
            if len(value) != 2:
                raise ValueError(f"token: expected rows for one or two text encoders for {name}, got {len(value)}")
            tokens[name] = {"l": _rows(value[0]), "g": _rows(value[1])}
        else:
            rows = _rows(value)
            tokens[name] = {_only_encoder(rows.shape[1]): rows}
    return tokens


def _is_sdxl(token: State) -> bool:
    return set(token) == {"l", "g"}


def _numbered(rows: torch.Tensor, width: int | None) -> Tokens:
    """CompVis's tokens without names, as <new1>, <new2> and so on; some files have all in one row."""
    if not width or rows.numel() % width:
        raise ValueError(f"token: expected rows as wide as the text states ({width}), got {rows.numel()} numbers")
    return _paired({f"<new{n}>": row for n, row in enumerate(rows.reshape(-1, width), 1)}, {})


def _by_encoder(state: Mapping[str, torch.Tensor]) -> dict[str, State]:
    norm = next((value for name, value in state.items() if name.endswith("final_layer_norm.weight")), None)
    if norm is None:
        raise ValueError("file: expected the weights of a CLIP text encoder, got some without final_layer_norm")
    return {"g" if len(norm) == 1280 else _only_encoder(len(norm)): dict(state)}
