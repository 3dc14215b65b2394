"""Models with the true architectures and random weights, to measure what a system costs without any files.

Cost depends on shapes alone. Text and pictures are random tensors too, so that only the model's own work is measured:
prompts and references are encoded once per change, however much is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

from ..host.shapeland import ModelConfig
from ..subjects.subject import Subject

SAMPLER, SCHEDULER, CFG = "euler", "normal", 5.0
COVERAGE = 0.22  # share of a reference that its mask covers: the mean of the published data set
_TOKENS = 77
_POOLED = 1280

SD15_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "adm_in_channels": None,
    "use_linear_in_transformer": False,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}


def sdxl_unet(depth: int) -> dict:
    """SDXL's UNet with `depth` transformer blocks (10 in the original) at its coarsest levels."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 320,
        "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, depth, depth],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, depth, depth, depth],
        "transformer_depth_middle": depth,
        "context_dim": 2048,
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "use_linear_in_transformer": True,
        "use_spatial_transformer": True,
        "use_temporal_attention": False,
        "legacy": False,
    }


@dataclass(frozen=True)
class Plan:
    """What is sampled on one kind of device.

    Attributes:
        label: name in the rows, with any difference from the true architecture.
        config: makes ComfyUI's configuration of the model.
        side: side of the square latent.
        steps: steps of one sampling.
        rounds: samplings per variant; the median counts.
    """

    label: str
    config: Callable[[], Any]
    side: int
    steps: int
    rounds: int


def _sd15():
    return comfy.supported_models.SD15(dict(SD15_UNET))


PLANS = {
    ("tiny", "cpu"): Plan("tiny", ModelConfig, 16, 10, 5),
    ("tiny", "cuda"): Plan("tiny", ModelConfig, 16, 10, 5),
    # On a CPU a small latent and few steps: minutes instead of hours.
    ("sd15", "cpu"): Plan("sd15", _sd15, 32, 3, 3),
    ("sd15", "cuda"): Plan("sd15", _sd15, 64, 20, 5),
    ("sdxl", "cpu"): Plan("sdxl (depth 1 of 10)", lambda: comfy.supported_models.SDXL(sdxl_unet(1)), 32, 2, 3),
    ("sdxl", "cuda"): Plan("sdxl", lambda: comfy.supported_models.SDXL(sdxl_unet(10)), 128, 20, 3),
}


class RandomVAE:
    """Stands in for a VAE: the latent of any picture is noise of the right shape."""

    def __init__(self, channels: int):
        self.latent_channels = channels

    def spacial_compression_encode(self) -> int:
        """Pixels per side of a latent cell; as few as possible, because the pixels are discarded."""
        return 1

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Latents (n, C, h, w) for pictures (n, h, w, 3)."""
        return torch.randn(len(pixels), self.latent_channels, *pixels.shape[1:3])


class RandomCLIP:
    """Stands in for a CLIP: the conditioning of any text is noise of the right shape."""

    def __init__(self, width: int):
        self.width = width

    def tokenize(self, text: str) -> str:
        """The text itself."""
        return text

    def encode_from_tokens_scheduled(self, _tokens: str) -> list:
        """A conditioning as ComfyUI's CLIP returns it."""
        return [[torch.randn(1, _TOKENS, self.width), {"pooled_output": torch.randn(1, _POOLED)}]]


@dataclass(eq=False)
class Rig:
    """A model with everything that sampling needs.

    Attributes:
        plan: what it was made from.
        model: ComfyUI's MODEL.
        vae, clip: stand-ins.
        positive, negative: conditionings from `clip`.
    """

    plan: Plan
    model: Any
    vae: RandomVAE
    clip: RandomCLIP
    positive: list = field(init=False)
    negative: list = field(init=False)

    def __post_init__(self):
        self.positive = self.clip.encode_from_tokens_scheduled("what is wanted")
        self.negative = self.clip.encode_from_tokens_scheduled("what is not")

    @classmethod
    def build(cls, plan: Plan) -> Rig:
        """The model on ComfyUI's device, in half precision unless that is the CPU."""
        torch.manual_seed(0)
        device = comfy.model_management.get_torch_device()
        dtype = torch.float32 if device.type == "cpu" else torch.float16
        config = plan.config()
        config.unet_config["dtype"] = dtype
        config.set_inference_dtype(dtype, None)
        base = config.get_model({}, device=device)
        base.to(device)
        fill(base.diffusion_model)
        model = comfy.model_patcher.ModelPatcher(base, load_device=device, offload_device=device)
        channels = base.latent_format.latent_channels
        return cls(plan, model, RandomVAE(channels), RandomCLIP(config.unet_config["context_dim"]))

    def sample(self, model, seed: int, positive: list | None = None) -> torch.Tensor:
        """The latent (1, C, side, side) of one picture, as KSampler makes it; `positive` replaces the rig's own."""
        empty = torch.zeros(1, self.vae.latent_channels, self.plan.side, self.plan.side)
        noise = comfy.sample.prepare_noise(empty, seed)
        return comfy.sample.sample(
            model,
            noise,
            self.plan.steps,
            CFG,
            SAMPLER,
            SCHEDULER,
            self.positive if positive is None else positive,
            self.negative,
            empty,
            disable_pbar=True,
            seed=seed,
        )

    def sample_with(self, guider, sampler, seed: int) -> torch.Tensor:
        """Samples one picture with a guider and a SAMPLER along the same schedule, and returns its latent."""
        empty = torch.zeros(1, self.vae.latent_channels, self.plan.side, self.plan.side)
        sampling = self.model.get_model_object("model_sampling")
        sigmas = comfy.samplers.calculate_sigmas(sampling, SCHEDULER, self.plan.steps)
        return guider.sample(
            comfy.sample.prepare_noise(empty, seed), empty, sampler, sigmas, disable_pbar=True, seed=seed
        )

    def subjects(self, count: int) -> list[Subject]:
        """Subjects with square masks of COVERAGE, each with its own picture."""
        side = self.plan.side
        mask = torch.zeros(side, side)
        edge = round(side * math.sqrt(COVERAGE))
        mask[:edge, :edge] = 1.0
        return [Subject(torch.rand(side, side, 3), f"subject {i}", mask) for i in range(count)]


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Random weights that keep activations at about the same scale; non-finite values would distort the timings."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
