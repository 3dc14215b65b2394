"""What the stages of Shapeland's training share: the pictures, their order, sheets and the compact vocabulary."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ...shapeland import models
from ...shapeland.autoencoder import Autoencoder
from . import scenes as scene_files

RUNS = Path("runs/shapeland")
# Weights that the stages write and read; copied to shapeland/weights/, they take the place of the shipped ones.
WEIGHTS = RUNS / "weights"
SEED = 0
# The last shard is held out: no stage trains on it.
SHARDS = 8


def weights_file(name: str) -> Path:
    """Where the stages store the weights of a part."""
    return WEIGHTS / models.FILES[name].name


def open_scenes(shards: int = SHARDS) -> scene_files.Scenes:
    """The pictures on disk; missing ones are drawn first."""
    scene_files.draw(RUNS / "scenes", shards, SEED)
    return scene_files.Scenes(RUNS / "scenes", shards)


@lru_cache(2)
def _order(epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((SEED, epoch)).permutation(count)


def step_rows(step: int, batch: int, count: int) -> np.ndarray:
    """The rows of the pictures of a step: all `count` rows in a new random order per epoch, read in sequence."""
    start = step * batch
    parts, need = [], batch
    while need:
        epoch, offset = divmod(start, count)
        part = _order(epoch, count)[offset : offset + need]
        parts.append(part)
        start, need = start + len(part), need - len(part)
    return np.concatenate(parts)


def pixels(images: np.ndarray, device: str) -> torch.Tensor:
    """Pictures (n, H, W, 3), uint8, as a float tensor (n, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def save_sheet(pictures: torch.Tensor, path: Path, columns: int = 8, scale: int = 2) -> None:
    """Writes pictures (n, 3, H, W) in [-1, 1] as one PNG sheet."""
    from PIL import Image

    n, _, h, w = pictures.shape
    rows = -(-n // columns)
    sheet = torch.ones(rows * columns, 3, h, w)
    sheet[:n] = pictures.detach().cpu().float().clamp(-1, 1)
    sheet = sheet.view(rows, columns, 3, h, w).permute(0, 3, 1, 4, 2).reshape(rows * h, columns * w, 3)
    image = Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy())
    image.resize((columns * w * scale, rows * h * scale), Image.NEAREST).save(path)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio, in dB, of pictures in [-1, 1], over all pixels together."""
    return float(10 * torch.log10(4.0 / (a - b).square().mean()))


# In training, a token is its index in `scene_files.WORDS`; 0 is the end token, which also pads.
START = len(scene_files.WORDS)


def tokens(words: np.ndarray | torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Word rows (n, MAX_WORDS) as compact token rows (n, 77): start token, the words, end tokens as padding."""
    row = torch.zeros(len(words), models.TOKENS, dtype=torch.long, device=device)
    row[:, 0] = START
    row[:, 1 : 1 + words.shape[1]] = torch.as_tensor(words, device=device)
    return row


def word_tokens() -> torch.Tensor:
    """CLIP's token id of each compact token, from ComfyUI's tokenizer.

    Raises ValueError if a word is not one token.
    """
    from transformers import CLIPTokenizer

    host = Path(os.environ.get("COMFYUI_PATH", ".host/ComfyUI"))
    tokenizer = CLIPTokenizer.from_pretrained(host / "comfy" / "sd1_tokenizer")
    ids = [models.END]
    for word in scene_files.WORDS[1:]:
        _start, *inner, _end = tokenizer(word).input_ids
        if len(inner) != 1:
            raise ValueError(f"words: expected one token of CLIP's vocabulary for each, got {len(inner)} for {word!r}")
        ids += inner
    return torch.tensor([*ids, models.START])


def compact_text(path: Path | None = None) -> torch.nn.Module:
    """The shipped text tower over compact tokens, or the one in the file `path`. Words that are not in the file have
    the mean of those that are, as in `models.load`."""
    state, table = models.load("text", path), "text_model.embeddings.token_embedding.weight"
    # The file lists its tokens in the order of the compact ones; words are only ever appended.
    ids = load_file(path or models.FILES["text"])["token_ids"].long()
    rows = state[table][ids]
    absent = rows.mean(0).expand(START + 1 - len(rows), -1)
    state[table] = torch.cat((rows[:-1], absent, rows[-1:]))
    model = build_compact_text()
    model.load_state_dict(state)
    return model


def build_compact_text():
    """The text tower with the world's words as its only tokens."""
    return models.build_text(START + 1, START, end=0)


def frozen_autoencoder(device: str, path: Path | None = None) -> Autoencoder:
    """The shipped autoencoder, or the one in the file `path`, for inference."""
    model = Autoencoder()
    model.load_state_dict(models.load("autoencoder", path))
    return model.eval().requires_grad_(False).to(device)


def frozen_text(device: str, path: Path | None = None) -> torch.nn.Module:
    """The shipped text tower, or the one in the file `path`, over compact tokens (see `tokens`), for inference."""
    return compact_text(path).eval().requires_grad_(False).to(device)
