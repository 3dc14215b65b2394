"""The architectures of Shapeland's models and the format of their shipped weights.

Each is a small version of a part of Stable Diffusion 1.5: a UNet with the same numbering of blocks, an autoencoder, and
CLIP's two towers with CLIP's own tokenizer. UNet and towers are built as diffusers and transformers models for
training; `host/shapeland.py` loads the same files into ComfyUI.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from ..encoders.files import read_state
from .autoencoder import CHANNELS

WEIGHTS = Path(__file__).parent / "weights"
FILES = {name: WEIGHTS / f"{name}.safetensors" for name in ("unet", "autoencoder", "text", "vision", "judge")}

WIDTH = 128
TOKENS = 77
VOCABULARY = 49408
START, END = 49406, 49407
# Stable Diffusion's noise schedule.
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}

UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "layers_per_block": 2,
    "block_out_channels": (64, 128, 128, 128),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": WIDTH,
    # The number of heads, under diffusers' name for it. Two cost less than four and are no less accurate.
    "attention_head_dim": 2,
}
_TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "projection_dim": WIDTH,
    "hidden_act": "quick_gelu",
}
TEXT_CONFIG = {
    **_TOWER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": TOKENS,
    "bos_token_id": START,
    "eos_token_id": END,
    "pad_token_id": END,
}
VISION_CONFIG = {**_TOWER, "image_size": 64, "patch_size": 8, "num_channels": 3}

_TOKEN_TABLE = "text_model.embeddings.token_embedding.weight"
_TOKEN_IDS = "token_ids"
# Both towers come from one training stage; each other part has a stage of its own name.
_STAGES = {"text": "clip", "vision": "clip"}


def build_unet():
    """A diffusers `UNet2DConditionModel` with Stable Diffusion 1.5's blocks and random weights."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET_CONFIG)


def build_text(vocabulary: int = VOCABULARY, start: int = START, end: int = END):
    """A transformers `CLIPTextModelWithProjection` over `vocabulary` token rows, pooling at the first token `end`."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = {**TEXT_CONFIG, "vocab_size": vocabulary, "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return CLIPTextModelWithProjection(CLIPTextConfig(**config))


def build_vision():
    """A transformers `CLIPVisionModelWithProjection` for 64x64 pictures in patches of 8."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION_CONFIG))


def save(name: str, state: dict[str, torch.Tensor], path: Path | None = None) -> Path:
    """Writes floating-point tensors as fp16 safetensors (others as they are) and returns the path."""
    path = path or FILES[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in state.items()}, path)
    return path


def load(name: str, path: Path | None = None) -> dict[str, torch.Tensor]:
    """Reads the weights of `name` ("unet", "autoencoder", "text", "vision" or "judge") as fp32.

    The text file holds rows for the world's own words only; the full table that CLIP's tokenizer indexes is restored
    here, with the mean of the known rows for all other tokens.

    Raises FileNotFoundError, which says how to get the file, and ValueError if it is damaged.
    """
    path = path or FILES[name]
    if not path.exists():
        raise FileNotFoundError(
            f"Shapeland's {name} weights are not at {path}: clone the repository, which carries them, or train them "
            f"with `python tools/run.py training.shapeland {_STAGES.get(name, name)}` (see shapeland/README.md)."
        )
    state = {k: v.float() if v.is_floating_point() else v for k, v in read_state(path, "weights").items()}
    if _TOKEN_IDS in state:
        ids, rows = state.pop(_TOKEN_IDS).long(), state[_TOKEN_TABLE]
        table = rows.mean(0).repeat(VOCABULARY, 1)
        table[ids] = rows
        state[_TOKEN_TABLE] = table
    return state
