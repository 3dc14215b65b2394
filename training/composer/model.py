"""The Composer adapter as a trainable module: a base model that it adds to, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...compositions.palette import DEFAULT_TABLE, SIGMA, table_colors
from ...encoders.clip_pixels import normalize
from ...encoders.composer_adapter import (
    EPSILON,
    INPUT,
    LOCAL_CHANNELS,
    PALETTE,
    SEMANTICS,
    SENTENCE,
    VELOCITY,
    ComposerAdapter,
    ComposerAdapterConfig,
    Conditions,
    Features,
    table_hash,
)
from ..base import Base
from ..sampling import States
from .pictures import NAMES

_SD2_WIDTH = 1024


def config_of(base: Base, name: str, mode: str, local_width: int, body_share: int) -> ComposerAdapterConfig:
    """The architecture for a base, which error messages call `name`."""
    levels = tuple(base.unet.config.block_out_channels)
    colors = table_colors(DEFAULT_TABLE)
    widths = [tower.config.hidden_size for tower in base.towers]
    sentence = base.towers[-1].config.projection_dim if len(widths) > 1 else widths[0]
    if widths == [_SD2_WIDTH]:
        # ComfyUI's pooled state of Stable Diffusion 2's encoder is of another layer than diffusers', and projected.
        sentence = 0
    vision = base.vision.config
    return ComposerAdapterConfig(
        levels=levels,
        context_width=sum(widths),
        sentence_width=sentence,
        semantics_width=vision.projection_dim,
        vision_tokens=(vision.image_size // vision.patch_size) ** 2 + 1,
        colors=len(colors),
        table=table_hash(colors),
        sigma=SIGMA,
        local_width=local_width,
        body=() if mode == INPUT else tuple(max(8, channels // body_share) for channels in levels),
        mode=mode,
        base=name,
        prediction=EPSILON if base.predicts_noise else VELOCITY,
        # An adapter of the paper's mode has the paper's paths alone.
        **({"tones": 0} if mode == INPUT else {}),
    )


class ComposerTraining(nn.Module):
    """A base model, its vision tower, and the adapter that is trained; all else stays as it is.

    Args:
        base: its modules become this one's.
        config: the adapter's architecture.
        seed: seed of its initial weights.
    """

    def __init__(self, base: Base, config: ComposerAdapterConfig, seed: int = 0):
        super().__init__()
        self.base = base
        self.unet, self.towers, self.vision, self.autoencoder = base.unet, base.towers, base.vision, base.autoencoder
        self.requires_grad_(False)
        torch.manual_seed(seed)
        self.adapter = ComposerAdapter(config)

    @torch.no_grad()
    def see(self, pictures: torch.Tensor) -> torch.Tensor:
        """The semantics (n, D) of pictures (n, 3, H, W) in [-1, 1], with unit variance per coordinate."""
        side = self.vision.config.image_size
        small = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        embeds = self.vision(normalize((small + 1) / 2)).image_embeds.float()
        return F.normalize(embeds, dim=-1) * embeds.shape[-1] ** 0.5

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> tuple[States, torch.Tensor]:
        """Text states and sentences (n, D) of tokens (n, towers, 77), as ComfyUI encodes prompts."""
        if len(self.towers) > 1:
            states = self.base.read(tokens)
            return states, states[1]
        found = self.towers[0](tokens[:, 0])
        pooled = getattr(found, "pooler_output", None)
        if pooled is None:
            # With a projection the tower gives its result alone; the sentence is the end token's state.
            end = (tokens[:, 0, 1:] == self.base.vocabularies[0].end).int().argmax(1) + 1
            pooled = found.last_hidden_state[torch.arange(len(end), device=end.device), end]
        return (found.last_hidden_state.float(), None), pooled.float()

    def conditions(self, batch: Mapping[str, torch.Tensor], sentences: torch.Tensor) -> Conditions:
        """What the adapter is given of a batch of `pictures.collate`."""
        kept = dict(zip(NAMES, batch["kept"].unbind(1), strict=True))
        found = {SEMANTICS: self.see(batch["target"]), PALETTE: batch[PALETTE]}
        if self.adapter.config.sentence_width:
            found[SENTENCE] = sentences
        return Conditions(found, {name: batch[name] for name in LOCAL_CHANNELS}, kept)

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, states: States, features: Features) -> torch.Tensor:
        """The UNet's prediction (n, C, h, w) for text states, with what the adapter adds."""
        attended, (text, pooled) = None, states
        if features.tokens is not None:
            if features.kept is not None:
                seen = torch.ones(text.shape[:2], dtype=torch.bool)
                attended = torch.cat([seen.to(features.kept.device), features.kept], 1)
            text = torch.cat([text, features.tokens.to(text)], 1)
        with added(self.unet, features):
            return self.base.predict(noisy, t, (text, pooled), attended)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss `noise` of a batch of `pictures.read_batches`."""
        with torch.no_grad():
            latents = self.autoencoder.encode(batch["target"], batch["latent"])
        noisy, target = self.base.noised(latents, batch["noise"], batch["t"], batch.get("alone"))
        states, sentences = self.read(batch["tokens"])
        features = self.adapter(self.conditions(batch, sentences), tuple(noisy.shape[-2:]))
        return {"noise": F.mse_loss(self.predict(noisy, batch["t"], states, features), target)}


@contextmanager
def added(unet: nn.Module, features: Features) -> Iterator[None]:
    """Adds what an adapter gives to the timestep embedding and the encoder levels of a diffusers UNet."""
    hooks = []
    if features.time is not None:
        hooks.append(unet.time_embedding.register_forward_hook(partial(_plus, features.time)))
    for level, value in features.levels.items():
        block = None if level < 0 else unet.down_blocks[level]
        layer = unet.conv_in if block is None else [*block.resnets, *getattr(block, "attentions", [])][-1]
        hooks.append(layer.register_forward_hook(partial(_plus, value)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _plus(value: torch.Tensor, _layer, _inputs, output):
    if isinstance(output, tuple):
        return (output[0] + value.to(output[0]), *output[1:])
    if hasattr(output, "sample"):
        output.sample = output.sample + value.to(output.sample)
        return output
    return output + value.to(output)
