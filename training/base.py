"""The base model of a training: Shapeland's own, or Stable Diffusion from a folder in diffusers' format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..encoders.files import check_folder
from ..shapeland import models, world
from ..shapeland.autoencoder import CHANNELS, FACTOR, Autoencoder
from .sampling import States, sample
from .shapeland.common import START, frozen_autoencoder, frozen_text
from .shapeland.scenes import WORDS

SHAPELAND = "shapeland"
PARTS = {
    "unet": "config.json",
    "text_encoder": "config.json",
    "tokenizer": "tokenizer_config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
}
SECOND_PARTS = {"text_encoder_2": "config.json", "tokenizer_2": "tokenizer_config.json"}
LENGTH = models.TOKENS


@dataclass(frozen=True)
class Vocabulary:
    """How a text tower tokenizes a text: `split` gives its tokens; `start`, `end` and `pad` are the ids around them."""

    split: Callable[[str], list[int]]
    start: int
    end: int
    pad: int

    def row(self, text: str) -> list[int]:
        """The 77 ids of a text. A longer text is cut and, unlike in the published code, keeps its end token."""
        return self.around(self.split(text))

    def around(self, tokens: list[int]) -> list[int]:
        """The 77 ids of a text that is already tokenized."""
        row = [self.start, *tokens[: LENGTH - 2], self.end]
        return row + [self.pad] * (LENGTH - len(row))


@dataclass(frozen=True, eq=False)
class Base:
    """All parts of a model, in fp32.

    Attributes:
        unet: a diffusers `UNet2DConditionModel`.
        towers: its text towers: one, or two for SDXL, of which the second has a projection.
        vocabularies: one for each tower; both tokenize texts alike.
        vision: a transformers `CLIPVisionModelWithProjection`, or None if none was asked for.
        autoencoder: see `ScaledAutoencoder`.
        scheduler: a diffusers `DDPMScheduler`, which defines the noise and what the UNet predicts.
        resolution: resolution of the pictures, in pixels.

    Raises:
        ValueError: the UNet does not fit the resolution or the autoencoder, or predicts neither epsilon nor v.
    """

    unet: nn.Module
    towers: nn.ModuleList
    vocabularies: tuple[Vocabulary, ...]
    vision: nn.Module | None
    autoencoder: ScaledAutoencoder
    scheduler: object
    resolution: int

    def __post_init__(self):
        # The layout in which convolutions are fastest, on a CPU and in half precision on a GPU.
        self.unet.to(memory_format=torch.channels_last)
        step = self.autoencoder.factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if self.resolution < 1 or self.resolution % step:
            raise ValueError(f"--resolution: expected a multiple of {step} for this base, got {self.resolution}")
        given = self.unet.config.in_channels
        if given != self.autoencoder.channels:
            raise ValueError(
                f"--base: expected a UNet that takes the {self.autoencoder.channels} channels of its autoencoder, got "
                f"one for {given} (inpainting)"
            )
        kind = self.scheduler.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"--base: expected a model that predicts epsilon or v_prediction, got {kind}")

    @property
    def times(self) -> int:
        """Number of timesteps, from the least noise to nothing but noise."""
        return self.scheduler.config.num_train_timesteps

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one picture's latent."""
        side = self.resolution // self.autoencoder.factor
        return self.unet.config.in_channels, side, side

    def read(self, tokens: torch.Tensor) -> States:
        """The text states of token ids (n, towers, 77)."""
        if len(self.towers) == 1:
            return self.towers[0](tokens[:, 0]).last_hidden_state.float(), None
        seen = [tower(tokens[:, i], output_hidden_states=True) for i, tower in enumerate(self.towers)]
        return torch.cat([s.hidden_states[-2].float() for s in seen], -1), seen[-1].text_embeds.float()

    def predict(
        self, noisy: torch.Tensor, t: torch.Tensor, states: States, attended: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The UNet's prediction (n, C, h, w) in fp32; `attended` (n, tokens) is False for text states that it must not
        see."""
        context, pooled = states
        added = None
        if pooled is not None:
            side = self.resolution
            # Original size, crop offset and target size, as for a picture that was neither resized nor cropped.
            sizes = torch.tensor([[side, side, 0, 0, side, side]], device=noisy.device).expand(len(noisy), -1)
            added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(noisy, t, context, added_cond_kwargs=added, encoder_attention_mask=attended).sample.float()

    @property
    def predicts_noise(self) -> bool:
        """Whether the UNet predicts epsilon, and not v."""
        return self.scheduler.config.prediction_type == "epsilon"

    def noised(
        self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, alone: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents with the noise of timesteps t (n,), and the UNet's prediction target.

        Rows of `alone` (n,), boolean, have nothing but the noise, and the v with which the denoised latents are the
        given ones. A UNet that predicts noise has none of them.
        """
        noisy = self.scheduler.add_noise(latents, noise, t)
        if self.predicts_noise:
            return noisy, noise
        target = self.scheduler.get_velocity(latents, noise, t)
        if alone is None:
            return noisy, target
        alone = alone[:, None, None, None]
        share = self.scheduler.alphas_cumprod.to(latents)[t][:, None, None, None]
        unseen = (share.sqrt() * noise - latents) / (1 - share).sqrt()
        return torch.where(alone, noise, noisy), torch.where(alone, unseen, target)

    def sample(
        self,
        unconditional: States,
        conditional: Callable[[int, torch.Tensor, torch.Tensor], States],
        count: int,
        steps: int,
        guidance: float,
        seed: int,
    ) -> torch.Tensor:
        """DDIM latents of `count` pictures; see `sampling.sample`."""
        shape = (count, *self.latent_shape)
        schedule = self.scheduler.config
        return sample(self.predict, schedule, shape, unconditional, conditional, steps, guidance, seed)


class ScaledAutoencoder(nn.Module):
    """Encodes pictures (n, 3, H, W) in [-1, 1] to latents (n, C, H/factor, W/factor) at the UNet's scale, and back."""

    def __init__(self, model: nn.Module, factor: int):
        super().__init__()
        self.model, self.factor = model, factor

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return CHANNELS if isinstance(self.model, Autoencoder) else self.model.config.latent_channels

    def encode(self, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents; if the autoencoder gives a distribution, `noise` of the latents' shape samples from it."""
        if isinstance(self.model, Autoencoder):
            return self.model.encode(pictures)
        found = self.model.encode(pictures).latent_dist
        return (found.mean + found.std * noise) * self.model.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures, not clamped."""
        if isinstance(self.model, Autoencoder):
            return self.model.decode(latents)
        return self.model.decode(latents / self.model.config.scaling_factor).sample


def open_base(
    name: str, vision: Path | None = None, resolution: int | None = None, *, with_vision: bool = True
) -> Base:
    """Opens Shapeland's models, or those in the folder `name`, with the vision tower in the folder `vision`; without a
    vision tower if not `with_vision`.

    Raises:
        FileNotFoundError: weights, or a folder or a part of it, are missing.
        ValueError: an option does not fit the base.
    """
    if name == SHAPELAND:
        if vision is not None:
            raise ValueError(f"--vision: expected none for Shapeland, which has its own tower, got {vision}")
        return _shapeland(world.SIZE if resolution is None else resolution, with_vision)
    if vision is None and with_vision:
        raise ValueError(f"--vision: expected the folder of CLIP's vision tower with --base {name}, got none")
    return _folder(Path(name), vision, resolution)


def _shapeland(resolution: int, with_vision: bool) -> Base:
    from diffusers import DDPMScheduler

    unet, vision = models.build_unet(), models.build_vision() if with_vision else None
    unet.load_state_dict(models.load("unet"))
    if vision is not None:
        vision.load_state_dict(models.load("vision"))
    return Base(
        unet,
        nn.ModuleList([frozen_text("cpu")]),
        (Vocabulary(_world_words, START, 0, 0),),
        vision,
        ScaledAutoencoder(frozen_autoencoder("cpu"), FACTOR),
        DDPMScheduler(**models.SCHEDULE),
        resolution,
    )


def _world_words(text: str) -> list[int]:
    """The compact tokens of a caption: each of the world's words is one token, as in CLIP's vocabulary.

    Raises ValueError if a word is not one of the world's.
    """
    words = text.split()
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(f"captions: expected Shapeland's words, got {unknown[0]!r} in {text!r}")
    return [WORDS.index(word) for word in words]


def _folder(folder: Path, vision: Path | None, resolution: int | None) -> Base:
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

    twofold = (folder / "text_encoder_2").is_dir()
    for part, file in (PARTS | SECOND_PARTS if twofold else PARTS).items():
        if not (folder / part / file).exists():
            raise FileNotFoundError(f"--base: expected a diffusers folder with {part}/{file}, got {folder}")
        check_folder(folder / part, "--base")
    if vision is not None:
        if not (vision / "config.json").exists():
            raise FileNotFoundError(f"--vision: expected a folder with a saved CLIP vision tower, got {vision}")
        check_folder(vision, "--vision")
    local = {"local_files_only": True}
    full = {**local, "dtype": torch.float32}

    towers = [CLIPTextModel.from_pretrained(folder / "text_encoder", **full)]
    tokenizers = [CLIPTokenizer.from_pretrained(folder / "tokenizer", **local)]
    if twofold:
        towers.append(CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **full))
        tokenizers.append(CLIPTokenizer.from_pretrained(folder / "tokenizer_2", **local))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32, **local)
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32, **local)
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    return Base(
        unet,
        nn.ModuleList(towers),
        tuple(Vocabulary(_splitter(t), t.bos_token_id, t.eos_token_id, t.pad_token_id) for t in tokenizers),
        None if vision is None else CLIPVisionModelWithProjection.from_pretrained(vision, **full),
        ScaledAutoencoder(autoencoder, factor),
        DDPMScheduler.from_pretrained(folder / "scheduler", **local),
        unet.config.sample_size * factor if resolution is None else resolution,
    )


def _splitter(tokenizer) -> Callable[[str], list[int]]:
    return lambda text: tokenizer(text, add_special_tokens=False).input_ids
