"""A prior in ComfyUI: semantics that pictures of a caption may have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch

from ...compositions.semantics import Semantics
from ...encoders.caption_prior import HEADS, CaptionPrior, spaced, text_mask
from ...encoders.files import read, state_of
from ...samplers.prior import sample_prior
from ..advice import advise
from ..model.networks import compute_dtype, in_patcher

NAME = "Caption Prior"


@dataclass(frozen=True, eq=False)
class LoadedPrior:
    """A prior in a model patcher, so that ComfyUI manages its memory."""

    patcher: Any

    @property
    def module(self) -> CaptionPrior:
        """The network."""
        return self.patcher.model


def load(path: str) -> LoadedPrior:
    """Loads a prior, in the names of diffusers' PriorTransformer.

    Raises:
        ValueError: the file holds something else, or is not whole.
    """
    value, metadata = read(path)
    heads = int(metadata[HEADS]) if HEADS in metadata else None
    state = state_of(value, Path(path), "file")
    return wrap(CaptionPrior.from_state(state, heads, comfy.ops.manual_cast, dtype=compute_dtype()))


def wrap(net: CaptionPrior) -> LoadedPrior:
    """A network in a patcher."""
    return LoadedPrior(in_patcher(net))


@torch.no_grad()
def draw(prior: LoadedPrior, clip, caption: str, count: int, seed: int, steps: int, guidance: float) -> list[Semantics]:
    """Semantics that pictures of a caption may have.

    Args:
        clip: with a single text encoder, and its projection to the space of image embeddings.
        caption: its first 75 tokens are read, without weights.
        count: number of draws.
        guidance: guidance scale, away from the empty caption; 1 for none.

    Raises:
        ValueError: the text encoder does not fit the prior.
    """
    encoder, rows, end = _tokenized(clip, [caption, ""])
    _check(prior, encoder)
    comfy.model_management.load_models_gpu([clip.patcher, prior.patcher])
    device = prior.patcher.load_device
    model = clip.cond_stage_model
    model.reset_clip_options()
    model.set_clip_options({"execution_device": clip.patcher.load_device})
    # Whatever models of pictures take of this encoder, priors take its last layer and its projected end token.
    encoder.set_clip_options({"layer": None, "projected_pooled": False})
    states, pooled = encoder(rows)
    model.reset_clip_options()
    sentences = encoder.transformer.text_projection(pooled)
    numbers = torch.tensor([[-1 if torch.is_tensor(token) else token for token in row] for row in rows])
    mask = text_mask(numbers, end).to(device)
    states, sentences = states.to(device, torch.float32), sentences.to(device, torch.float32)
    sides = [0, 1] if guidance != 1 else [0]
    kept = [part[sides].repeat_interleave(count, 0) for part in (sentences, states, mask)]
    net, progress = prior.module, comfy.utils.ProgressBar(steps)
    dtype = net.proj_in.weight.dtype

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        noisy = x.to(device, dtype).repeat(len(sides), 1)
        times = torch.full((len(noisy),), t, device=device)
        sentence, text, seen = kept
        found = net(noisy, times, sentence.to(dtype), text.to(dtype), seen).float()
        progress.update(1)
        if len(sides) == 1:
            return found
        own, empty = found.chunk(2)
        return empty + guidance * (own - empty)

    shape = (count, net.config.width)
    sampled = sample_prior(predict, shape, spaced(steps), torch.Generator().manual_seed(seed))
    return [Semantics(one) for one in net.unscaled(sampled.to(device)).float().cpu()]


def _tokenized(clip, texts: list[str]) -> tuple[Any, list[list], int]:
    """The CLIP's only text encoder, the tokens of each text, and the number of the end token."""
    rows, names = [], []
    for text in texts:
        tokens = clip.tokenize(text)
        # A file with one of two encoders has the tokenizers of both.
        names = [name for name in tokens if hasattr(clip.cond_stage_model, f"clip_{name}")] or list(tokens)
        first, *more = tokens[names[0]]
        if more:
            advise(NAME, "reads the first 75 tokens of the caption; the rest says nothing here")
        if any(weight != 1 for _, weight, *_ in first):
            advise(NAME, "reads the caption without weights such as (word:1.2)")
        rows.append([token for token, *_ in first])
    if len(names) > 1:
        raise ValueError(f"clip: expected a single text encoder, as Stable Diffusion 1 and 2 have, got {len(names)}")
    name = f"clip_{names[0]}"
    encoder, tokenizer = getattr(clip.cond_stage_model, name, None), getattr(clip.tokenizer, name, None)
    if encoder is None or tokenizer is None:
        raise ValueError(f"clip: expected a CLIP text encoder, got {names[0]}")
    return encoder, rows, tokenizer.end_token


def _check(prior: LoadedPrior, encoder) -> None:
    width = prior.module.config.width
    projection = getattr(getattr(encoder.transformer, "text_projection", None), "weight", None)
    # Where the file has none, as that of Stable Diffusion 1.5, ComfyUI's has the values that were in memory, of which
    # zeros and what is not finite can be told.
    if projection is None or not projection.any() or not torch.isfinite(projection).all():
        raise ValueError(
            "clip: expected a CLIP text encoder with its projection to image embeddings, got one without; load it from "
            "a file of its own"
        )
    if tuple(projection.shape) != (width, width):
        given = " to ".join(map(str, reversed(projection.shape)))
        raise ValueError(f"clip: expected a text encoder of width {width} for this prior, got one of {given}")
