"""Draws and reads pictures in this process, with ComfyUI's own sampler and Shapeland's weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from ..host import shapeland
from ..shapeland.judge import Reading, centers_of, crop_thing
from ..shapeland.world import SIZE
from .kept import Kept

SAMPLER = "dpmpp_2m"
SCHEDULER = "sgm_uniform"
STEPS = 20
CFG = 4.0
NEGATIVE_PROMPT = ""


@dataclass(frozen=True, eq=False)
class Studio:
    """Shapeland's models as in a workflow, and the judge in its ModelPatcher. Clones of `model` may be patched. Reports
    draw through `kept`."""

    model: Any
    clip: Any
    vae: Any
    judge: Any
    kept: Kept = field(default_factory=Kept)

    @classmethod
    def open(cls, kept: Kept | None = None) -> Studio:
        """Loads the shipped weights.

        Raises:
            FileNotFoundError: one of the files is missing; the message says which.
        """
        judge = shapeland.load_judge()
        return cls(shapeland.load_model(), shapeland.load_clip(), shapeland.load_vae(), judge, kept or Kept())

    def encode(self, prompt: str) -> list:
        """A prompt as a ComfyUI conditioning."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(prompt))

    def draw(
        self, model, prompt: str, seed: int, count: int, positive: list | None = None, cfg: float = CFG
    ) -> torch.Tensor:
        """`count` pictures (count, SIZE, SIZE, 3) in [0, 1], as KSampler with a batch and VAE Decode return them;
        `positive` replaces the prompt's conditioning."""
        side = SIZE // self.vae.spacial_compression_decode()
        empty = torch.zeros(count, self.vae.latent_channels, side, side)
        latents = comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(empty, seed),
            STEPS,
            cfg,
            SAMPLER,
            SCHEDULER,
            self.encode(prompt) if positive is None else positive,
            self.encode(NEGATIVE_PROMPT),
            empty,
            disable_pbar=True,
            seed=seed,
        )
        return self.vae.decode(latents).float().cpu()

    def redraw(self, model, positive: list, latents: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Pictures (n, SIZE, SIZE, 3) that the euler sampler makes from an inversion's noise along its schedule."""
        sampled = comfy.sample.sample_custom(
            model,
            torch.zeros_like(latents),
            CFG,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            positive,
            self.encode(NEGATIVE_PROMPT),
            latents,
            disable_pbar=True,
            seed=0,
        )
        return self.vae.decode(sampled).float().cpu()

    def read(self, pictures: torch.Tensor) -> list[list[Reading]]:
        """The judge's readings of pictures (n, H, W, 3)."""
        return shapeland.read_with(self.judge, pictures)

    def embed(self, pictures: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Identity embeddings (n, d) of the things at exact `masks` (n, SIZE, SIZE) of pictures (n, SIZE, SIZE, 3), so
        that no misread silhouette spoils a reference."""
        inside = masks > 0.5
        crops = crop_thing(pictures.movedim(-1, 1), inside, centers_of(inside))
        comfy.model_management.load_model_gpu(self.judge)
        return self.judge.model.reader(crops.to(self.judge.load_device))["embedding"]
