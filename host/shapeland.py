"""Shapeland's models as ComfyUI's MODEL, CLIP, VAE and CLIP_VISION objects.

Without a given `state`, the loaders read the shipped file. They raise FileNotFoundError if it is missing, and
ValueError if it is incomplete.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.clip_vision import ClipVisionModel

from ..shapeland import models
from ..shapeland.autoencoder import CHANNELS, FACTOR, Autoencoder
from ..shapeland.judge import Judge, Reading
from .model.networks import in_patcher

LATENT_MEMORY = 2000  # generous estimate of the numbers per pixel in memory at once while the autoencoder runs


class LatentFormat(comfy.latent_formats.LatentFormat):
    """Latents of unit variance, with eight channels at a quarter of the picture's height and width."""

    latent_channels = CHANNELS
    spacial_downscale_ratio = FACTOR


class ModelConfig(comfy.supported_models_base.BASE):
    """Stable Diffusion 1.5's blocks with 64 channels and v prediction, in ComfyUI's description of a UNet."""

    unet_config = {
        "image_size": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "model_channels": models.UNET_CONFIG["block_out_channels"][0],
        "num_res_blocks": [2, 2, 2, 2],
        "channel_mult": [1, 2, 2, 2],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "context_dim": models.WIDTH,
        "use_linear_in_transformer": False,
        "use_spatial_transformer": True,
        "adm_in_channels": None,
        "use_temporal_attention": False,
        "legacy": False,
    }
    unet_extra_config = {"num_heads": models.UNET_CONFIG["attention_head_dim"], "num_head_channels": -1}
    latent_format = LatentFormat
    memory_usage_factor = 0.5
    reference_weight = 0.3
    """Of subjects in self-attention, in place of the published 3: from 1 on, pictures of two lose their nouns (see
    docs/report.md)."""

    def __init__(self):
        super().__init__(type(self).unet_config)

    def inpaint_model(self):
        """ComfyUI assumes inpainting if there are more than four input channels; these are all the latent's."""
        return False

    def model_type(self, *_):
        """Shapeland's UNet uses v prediction."""
        return comfy.model_base.ModelType.V_PREDICTION


def load_model(
    state: dict[str, torch.Tensor] | None = None, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Loads the UNet as a MODEL.

    Args:
        state: weights with diffusers' names; None loads the shipped file.
        disable_dynamic: loads the model without ComfyUI's dynamic memory.
    """
    factory = (load_model, (state,))
    state = models.load("unet") if state is None else state
    config = ModelConfig()
    load_device = comfy.model_management.get_torch_device()
    config.set_inference_dtype(torch.float32, None)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    model = config.get_model({}, device=comfy.model_management.unet_offload_device())
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device())
    model.load_model_weights({names[k]: v for k, v in state.items()}, "", assign=patcher.is_dynamic())
    # ComfyUI loads a second copy for what dynamic memory does not support (hooks, compiling, several GPUs).
    patcher.cached_patcher_init = factory
    return patcher


class _TextTower(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(models.TEXT_CONFIG),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


class _Text(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options=None):
        super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=_TextTower)


class _Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory, tokenizer_data or {})
        # Textual inversion embeddings for this model have its width, not Stable Diffusion's.
        self.clip_l.embedding_size = models.WIDTH


def load_clip(
    state: dict[str, torch.Tensor] | None = None,
    embedding_directory: str | list[str] | None = None,
    disable_dynamic: bool = False,
) -> comfy.sd.CLIP:
    """Loads the text tower as a CLIP with ComfyUI's own tokenizer. For `disable_dynamic` see `load_model`."""
    factory = (_load_clip_patcher, (state, embedding_directory))
    state = models.load("text") if state is None else state
    target = comfy.supported_models_base.ClipTarget(_Tokenizer, _Text)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=embedding_directory,
        parameters=sum(v.numel() for v in state.values()),
        state_dict=[state],
        disable_dynamic=disable_dynamic,
    )
    clip.patcher.cached_patcher_init = factory
    return clip


def _load_clip_patcher(state, embedding_directory, disable_dynamic=False) -> comfy.model_patcher.ModelPatcher:
    return load_clip(state, embedding_directory, disable_dynamic).patcher


class _VAE(comfy.sd.VAE):
    """ComfyUI's VAE object with Shapeland's autoencoder."""

    def __init__(self, state: dict[str, torch.Tensor]):
        # ComfyUI chooses a module by the names in the file; the smallest one is created, and then replaced.
        super().__init__(sd={"pixel_space_vae": torch.zeros(1)})
        self.first_stage_model = Autoencoder().eval()
        self.vae_dtype = torch.float32
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            self.first_stage_model,
            load_device=self.device,
            offload_device=comfy.model_management.vae_offload_device(),
        )
        self.first_stage_model.load_state_dict(state, assign=self.patcher.is_dynamic())
        comfy.model_management.archive_model_dtypes(self.first_stage_model)
        self.latent_channels = CHANNELS
        self.downscale_ratio = self.upscale_ratio = FACTOR
        self.process_input = lambda image: image * 2.0 - 1.0
        self.process_output = lambda image: image.add_(1.0).div_(2.0).clamp_(0.0, 1.0)
        self.memory_used_encode = lambda shape, dtype: LATENT_MEMORY * shape[2] * shape[3] * 4
        self.memory_used_decode = lambda shape, dtype: LATENT_MEMORY * shape[2] * shape[3] * FACTOR**2 * 4
        self.size = None
        self.model_size()


def load_vae(state: dict[str, torch.Tensor] | None = None) -> comfy.sd.VAE:
    """Loads the autoencoder as a VAE."""
    return _VAE(models.load("autoencoder") if state is None else state)


def load_clip_vision(state: dict[str, torch.Tensor] | None = None) -> ClipVisionModel:
    """Loads the vision tower as a CLIP_VISION."""
    state = models.load("vision") if state is None else state
    vision = ClipVisionModel({**models.VISION_CONFIG, "model_type": "clip_vision_model"})
    vision.load_sd(state)
    return vision


def load_judge() -> comfy.model_patcher.ModelPatcher:
    """Loads the judge in a model patcher, so that ComfyUI manages its memory; the module is `patcher.model`."""
    judge = Judge().eval().requires_grad_(False)
    judge.load_state_dict(models.load("judge"))
    return in_patcher(judge)


def read_pictures(images: torch.Tensor) -> list[list[Reading]]:
    """The shipped judge's readings of `images` (n, H, W, 3) in [0, 1]: one list per image."""
    return read_with(load_judge(), images)


def read_with(judge: comfy.model_patcher.ModelPatcher, images: torch.Tensor) -> list[list[Reading]]:
    """A loaded judge's readings of `images` (n, H, W, 3) in [0, 1]: one list per image."""
    # As a whole: its layers are not ComfyUI's, which could be loaded one by one.
    comfy.model_management.load_models_gpu([judge], force_full_load=True)
    return judge.model.read(images[..., :3].movedim(-1, 1).to(judge.load_device).float())
