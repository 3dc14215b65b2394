"""The Composer adapter: from the representations of a composition to what a UNet takes.

Composer (Huang et al., arXiv 2302.09778) trains a whole UNet with its conditions: global ones are added to the timestep
embedding and to the text tokens, local ones are brought to the latent's size, summed and joined to its input. Its
weights were never published. This adapter keeps the conditions and leaves a published UNet as it is: what the paper
concatenates to the input is added behind the first convolution here, which is the same function (a convolution of two
inputs is the sum of two convolutions), and at every level of the encoder, because a UNet that is not trained follows a
sum at its input alone too little.

A sum at the levels says where it is light and dark, but hardly how light a picture is as a whole when only noise is
seen; what is added to the timestep embedding does, as the palette shows. So the intensity, and what a mask leaves of a
picture, enter there too, by the shares of their tones.

One that is absent adds exactly nothing, and its tokens are not there: attention is changed by tokens of zeros.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from ..subjects.pictures import resized_strokes
from .files import load_exactly, read, state_of, whole_file

SKETCH, INTENSITY, MASK = "sketch", "intensity", "mask"
LOCAL_CHANNELS = {SKETCH: 1, "instances": 3, "depth": 1, INTENSITY: 1, MASK: 4}
"""Local representations, and the channels of their maps."""
SENTENCE, SEMANTICS, PALETTE = "caption", "semantics", "palette"
WITH_TOKENS = (SEMANTICS, PALETTE)
INPUT, LEVELS = "input", "levels"
MODES = (LEVELS, INPUT)
EPSILON, VELOCITY = "epsilon", "v_prediction"
FORMAT, VERSION = "conceptloom_composer_adapter", 1
_SUPPORT = 4
"""Cells of a map per cell of the latent, along one side, to which maps are brought."""


@dataclass(frozen=True)
class ComposerAdapterConfig:
    """The architecture of an adapter. The defaults fit Stable Diffusion 1.5 with CLIP ViT-L/14.

    Attributes:
        levels: channels of the UNet's encoder levels, from fine to coarse.
        context_width: of the text states.
        sentence_width: of the caption's pooled embedding; 0 for none.
        semantics_width: of the image embedding.
        colors: entries of the palette's table.
        table: hash of that table's colors.
        sigma: of the palette's smoothing.
        tokens: that semantics and palette each add to the text states.
        local_width: channels of the summed maps.
        body: channels of the levels of the network behind them; empty in mode INPUT.
        mode: LEVELS adds to every level of the encoder, INPUT behind the first convolution alone, as the paper does.
        base: the model that the adapter is for, in words.
        vision_tokens: of the vision tower that embeds pictures, by which towers of one width are told apart; 0 if that
            is not known.
        prediction: what the model predicts, EPSILON or VELOCITY, in diffusers' names; empty if that is not known.
        tones: of which the intensity, and each color of a masked picture, have shares that are added to the timestep
            embedding; 0 if these are maps alone, as in the paper.

    Raises:
        ValueError: the mode is unknown.
    """

    levels: tuple[int, ...] = (320, 640, 1280, 1280)
    context_width: int = 768
    sentence_width: int = 768
    semantics_width: int = 768
    colors: int = 156
    table: str = ""
    sigma: float = 10.0
    tokens: int = 4
    local_width: int = 64
    body: tuple[int, ...] = (80, 160, 320, 320)
    mode: str = LEVELS
    base: str = ""
    vision_tokens: int = 0
    prediction: str = ""
    tones: int = 16

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {self.mode!r}")
        if self.mode == LEVELS and len(self.body) != len(self.levels):
            raise ValueError(f"body: expected a width for each of {len(self.levels)} levels, got {len(self.body)}")

    @property
    def time_width(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.levels[0]


def table_hash(colors: torch.Tensor) -> str:
    """What a palette's table (K, 3) is told by."""
    return hashlib.sha256(colors.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Conditions:
    """The representations of n compositions, as an adapter takes them.

    Attributes:
        globals: SENTENCE, SEMANTICS and PALETTE by name, (n, width) each, with unit variance per coordinate but for the
            sentence, which stays as it is.
        maps: local representations by name, (n, c, H, W), see LOCAL_CHANNELS.
        strengths: of each representation, (n,), or 1 where it is not here. 0 leaves one out of a row.
    """

    globals: Mapping[str, torch.Tensor] = field(default_factory=dict)
    maps: Mapping[str, torch.Tensor] = field(default_factory=dict)
    strengths: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def strength(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The strengths (n,) of a representation, for its tensor."""
        return self.strengths.get(name, torch.ones(len(like))).to(like)


class Features(NamedTuple):
    """What an adapter gives to a UNet.

    Attributes:
        time: (n, T), added to the timestep embedding; None for nothing.
        tokens: (n, k, D), which follow the text states; None for none.
        kept: (n, k), boolean: whether a row has a token; None if all have all.
        levels: (n, C, h, w) by the number of an encoder level, added to its output; -1 is the first convolution.
    """

    time: torch.Tensor | None
    tokens: torch.Tensor | None
    kept: torch.Tensor | None
    levels: dict[int, torch.Tensor]


class ComposerAdapter(nn.Module):
    """See the module.

    Args:
        config: the architecture.
        operations: provides Linear and Conv2d; torch.nn, or ComfyUI's, which cast weights.
        settings: keyword arguments of these layers (device, dtype).
    """

    def __init__(self, config: ComposerAdapterConfig | None = None, operations: Any = nn, **settings):
        super().__init__()
        self.config = config = config or ComposerAdapterConfig()

        def perceptron(width: int, out: int, inner: int, zero: bool = False) -> nn.Sequential:
            last = operations.Linear(inner, out, **settings)
            return nn.Sequential(operations.Linear(width, inner, **settings), nn.SiLU(), zeroed(last) if zero else last)

        def zeroed(layer: nn.Module) -> nn.Module:
            # A new adapter changes nothing but by its tokens.
            for weight in layer.parameters():
                nn.init.zeros_(weight)
            return layer

        def conv(channels: int, out: int, kernel: int = 3, stride: int = 1, bias: bool = True):
            return operations.Conv2d(channels, out, kernel, stride, kernel // 2, bias=bias, **settings)

        widths = {SENTENCE: config.sentence_width, SEMANTICS: config.semantics_width, PALETTE: config.colors}
        widths |= {INTENSITY: config.tones, MASK: 3 * config.tones}
        widths = {name: width for name, width in widths.items() if width}
        time = config.time_width
        self.add = nn.ModuleDict({name: perceptron(width, time, time, zero=True) for name, width in widths.items()})
        self.tokens = nn.ModuleDict(
            {
                name: perceptron(widths[name], config.tokens * config.context_width, config.context_width)
                for name in WITH_TOKENS
            }
        )
        self.stacks = nn.ModuleDict(
            {name: _Stack(channels, config.local_width, conv) for name, channels in LOCAL_CHANNELS.items()}
        )
        if config.mode == INPUT:
            self.out = zeroed(conv(config.local_width, config.levels[0], bias=False))
        else:
            before = (config.local_width, *config.body)
            self.body = nn.ModuleList(
                _BodyLevel(before[i], width, conv, halved=i > 0) for i, width in enumerate(config.body)
            )
            self.outs = nn.ModuleList(
                zeroed(conv(width, channels, 1, bias=False))
                for width, channels in zip(config.body, config.levels, strict=True)
            )

    def forward(self, given: Conditions, size: tuple[int, int]) -> Features:
        """What the representations of compositions add to a UNet.

        Args:
            given: see `Conditions`.
            size: (h, w) of the latents.
        """
        # Before anything else, so that strokes are as wide, and memory as small, whatever the size of the picture.
        target = _SUPPORT * size[0], _SUPPORT * size[1]
        maps = {name: _resized(name, torch.nan_to_num(value), target) for name, value in given.maps.items()}
        return Features(self._time(given, maps), *self._tokens(given), self._levels(given, maps))

    def _time(self, given: Conditions, maps: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        found = dict(given.globals)
        if INTENSITY in maps and INTENSITY in self.add:
            found[INTENSITY] = tone_shares(maps[INTENSITY], self.config.tones)
        if MASK in maps and MASK in self.add:
            picture, kept = maps[MASK].split((3, 1), 1)
            # Where a cell is half a hole, its color is half of what it was.
            found[MASK] = tone_shares((picture / kept.clamp(min=1e-6) + 1) / 2, self.config.tones, kept)
        parts = [
            self.add[name](value) * given.strength(name, value)[:, None]
            for name, value in found.items()
            if name in self.add
        ]
        return sum(parts[1:], parts[0]) if parts else None

    def _tokens(self, given: Conditions) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        parts, kept = [], []
        for name in WITH_TOKENS:
            if name in given.globals:
                value = given.globals[name]
                strength = given.strength(name, value)
                found = self.tokens[name](value).unflatten(-1, (self.config.tokens, -1))
                parts.append(found * strength[:, None, None])
                kept.append((strength > 0)[:, None].expand(-1, self.config.tokens))
        if not parts:
            return None, None
        there = torch.cat(kept, 1)
        return torch.cat(parts, 1), None if there.all() else there

    def _levels(self, given: Conditions, maps: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
        parts = [
            self.stacks[name](value) * given.strength(name, value)[:, None, None, None] for name, value in maps.items()
        ]
        if not parts:
            return {}
        h = sum(parts[1:], parts[0])
        if self.config.mode == INPUT:
            return {-1: self.out(h)}
        # A row without a map has no sum to go on from: its levels are nothing, whatever the biases of the body.
        rows = torch.stack([given.strength(name, value) > 0 for name, value in given.maps.items()]).any(0)
        found = {}
        for i, (level, out) in enumerate(zip(self.body, self.outs, strict=True)):
            h = level(h)
            found[i] = out(h) * rows.to(h)[:, None, None, None]
        return found

    @classmethod
    def from_state(
        cls, state: Mapping[str, torch.Tensor], config: ComposerAdapterConfig, operations: Any = nn, **settings
    ) -> ComposerAdapter:
        """An adapter with the weights `state`.

        Raises:
            ValueError: weights are missing, unknown, or do not fit the architecture.
        """
        return load_exactly(partial(cls, config), state, "a Composer adapter", operations, **settings)


def tone_shares(picture: torch.Tensor, tones: int, kept: torch.Tensor | None = None) -> torch.Tensor:
    """The shares (n, c tones) of evenly spaced tones from black to white in each channel of pictures (n, c, H, W),
    values 0..1; one between two tones counts for both, the nearer more. They are scaled by the root of `tones`, so that
    the squares of a channel of one tone have the mean 1.

    Args:
        kept: (n, 1, H, W), weights of the pixels; all alike if None. Where none has any, the shares are 0.
    """
    values = picture.float().flatten(2)[..., None]  # half precision cannot count the cells
    spaced = torch.linspace(0, 1, tones, device=values.device, dtype=values.dtype)
    near = (1 - (values - spaced).abs() * (tones - 1)).clamp(min=0)
    weights = torch.ones_like(values) if kept is None else kept.float().flatten(2)[..., None]
    shares = (near * weights).sum(2) / weights.sum(2).clamp(min=1e-6)
    return (tones**0.5 * shares.flatten(1)).to(picture)


def _resized(name: str, value: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if tuple(value.shape[-2:]) == size:
        return value
    if name == SKETCH:
        return resized_strokes(value, size)
    return F.interpolate(value, size, mode="bilinear", antialias=True)


class _Stack(nn.Module):
    """The convolutions of one local representation."""

    def __init__(self, channels: int, width: int, conv):
        super().__init__()
        self.first, self.second, self.third = (
            conv(channels, 4 * width),
            conv(4 * width, 4 * width, stride=2),
            conv(4 * width, width, stride=2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, width, h, w) for maps (n, c, 4 h, 4 w)."""
        return self.third(F.silu(self.second(F.silu(self.first(x)))))


class _BodyLevel(nn.Module):
    """Two residual blocks at the size of one encoder level."""

    def __init__(self, channels: int, width: int, conv, halved: bool):
        super().__init__()
        self.halved = halved
        self.enter = conv(channels, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), conv(width, width), nn.SiLU(), conv(width, width)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.halved:
            # As a convolution with stride 2 counts cells: an odd size is rounded up.
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def save(net: ComposerAdapter, file: Path, state: Mapping[str, torch.Tensor] | None = None, **about: str) -> None:
    """Writes an adapter in fp16 as safetensors, with its own weights or others of its architecture. `about` is kept as
    metadata beside it."""
    state = net.state_dict() if state is None else state
    metadata = {"format": FORMAT, "version": str(VERSION), "config": json.dumps(asdict(net.config)), **about}
    with whole_file(file) as part:
        save_file(
            {key: value.detach().to("cpu", torch.float16).contiguous() for key, value in state.items()}, part, metadata
        )


def load(path: Path | str, operations: Any = nn, **settings) -> ComposerAdapter:
    """Reads an adapter.

    Raises:
        ValueError: the file is none, not whole, or of a newer version.
    """
    value, metadata = read(path)
    name = Path(path).name
    if metadata.get("format") != FORMAT:
        raise ValueError(f"file: expected a Composer adapter, got {name}, which is another kind of file")
    if metadata.get("version") != str(VERSION):
        raise ValueError(f"file: expected version {VERSION} of the format, got {name} with {metadata.get('version')}")
    try:
        given: dict[str, Any] = json.loads(metadata["config"])
        given = {key: tuple(one) if isinstance(one, list) else one for key, one in given.items()}
        config = ComposerAdapterConfig(**given)
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"file: expected a whole Composer adapter, got {name} ({error})") from error
    return ComposerAdapter.from_state(state_of(value, Path(path), "file"), config, operations, **settings)
