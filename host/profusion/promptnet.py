"""PromptNet in ComfyUI: a conditioning in which a word follows the latents that are being sampled.

The word of a subject is replaced by the vectors S* that PromptNet makes of the subject's picture, of the current
latents and of their timestep (ProFusion, arXiv 2305.13579, section 3.1). They enter in front of the text encoder, so
both networks run when S* changes. The conditioning carries what that takes, and a MODEL that is `prepared` computes
the text states whenever the UNet is evaluated, for any sampler and guider.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.ops
import torch

from ...encoders.files import read, state_of
from ...encoders.promptnet import PromptNet, heads_of
from ...encoders.words import whole_word
from ...subjects.pictures import cover
from ...subjects.subject import Subject
from ..model import carried
from ..model.carried import carry
from ..model.networks import compute_dtype, in_patcher
from ..words import GAMMA, MARKER, SUBJECT_ROWS, find_subjects, locate, stand_in
from .spliced import Slots, SplicedText, slots_of

TAG = "conceptloom_promptnet"
EVERY_EVALUATION, EVERY_STEP, ONCE = "every evaluation", "every step", "once"
UPDATES = (EVERY_EVALUATION, EVERY_STEP, ONCE)

_END_OF_EMPHASIS = re.compile(r"\s*(:\s*[\d.]+)?[\s)]*\Z")
_UNPREPARED = (
    "PromptNet Encode: model: expected one from Load PromptNet in the sampler, which makes the subject's word, got "
    "another (connect yours to Load PromptNet's input)."
)


@dataclass(frozen=True, eq=False)
class LoadedPromptNet:
    """A PromptNet in a model patcher, so that ComfyUI manages its memory."""

    patcher: Any

    @property
    def module(self) -> PromptNet:
        """The network."""
        return self.patcher.model


@dataclass(frozen=True, eq=False)
class Seen:
    """A subject as PromptNet takes it.

    Attributes:
        image: (H, W, 3), values 0..1.
        tokens: (t, V), the vision tower's last hidden states of it.
    """

    image: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True, eq=False)
class Words:
    """What a conditioning carries: where its subjects' words are, and what makes them.

    Attributes:
        promptnet: the network.
        clip: the text encoder.
        vae: encodes the subjects' pictures, at the size that is sampled.
        slots: of the prompt, in the places of the subjects' words.
        subjects: one for each slot.
        update: one of UPDATES.
        states: (1, T, D), text states of the conditioning; those of chunks with slots are only there to be replaced.
    """

    promptnet: LoadedPromptNet
    clip: Any
    vae: Any
    slots: Slots
    subjects: tuple[Seen, ...]
    update: str
    states: torch.Tensor


def load(path: str) -> LoadedPromptNet:
    """Loads a PromptNet from safetensors or from a file of torch.

    Raises:
        ValueError: the file is no PromptNet, or not whole.
    """
    value, metadata = read(path)
    return made_of(state_of(value, Path(path), "file"), heads_of(metadata))


def made_of(state: Mapping[str, torch.Tensor], heads: Sequence[int] | None) -> LoadedPromptNet:
    """A PromptNet with weights, in the precision that ComfyUI's device computes in; see `PromptNet.from_state`."""
    return wrap(PromptNet.from_state(state, heads, comfy.ops.manual_cast, dtype=compute_dtype()))


def wrap(net: PromptNet) -> LoadedPromptNet:
    """A network in a patcher."""
    return LoadedPromptNet(in_patcher(net))


def encode(
    promptnet: LoadedPromptNet,
    clip,
    clip_vision,
    vae,
    prompt: str,
    subjects: Sequence[Subject],
    marker: str = MARKER,
    update: str = EVERY_EVALUATION,
) -> tuple[list, list]:
    """The prompt's conditioning as plain text, and with each subject's word replaced by what PromptNet sees.

    Args:
        prompt: with the marker after each subject's word, or with the noun of each.
        update: when S* is made anew.

    Raises:
        ValueError: a place cannot be found, or one of the models does not fit the PromptNet.
    """
    if not subjects:
        raise ValueError("subjects: expected at least one subject, got none")
    plain, ends = find_subjects(prompt, [subject.noun for subject in subjects], marker)
    tokenizer = checked_tokenizer(promptnet, clip)
    tokens, _ = locate(clip, plain, ends)
    text = clip.encode_from_tokens_scheduled(tokens)
    active = [i for i, subject in enumerate(subjects) if subject.weight]
    if not active:
        return text, text
    _, word = stand_in(tokenizer, plain)
    held, ends = _with_stand_ins(plain, [ends[i] for i in active], [subjects[i].noun for i in active], word)
    seen = tuple(look(promptnet, clip_vision, subjects[i].image) for i in active)
    return text, conditioning(promptnet, clip, vae, held, ends, seen, update, text)


def conditioning(
    promptnet: LoadedPromptNet,
    clip,
    vae,
    prompt: str,
    ends: Sequence[int],
    subjects: Sequence[Seen],
    update: str = EVERY_EVALUATION,
    plain: list | None = None,
) -> list:
    """The conditioning of a prompt whose words that end at `ends`, of one token each, are those of the subjects.

    Args:
        plain: conditioning of the same prompt with the subjects' nouns. Nodes that take the text states of this one
            alone, as the host's Conditioning (Concat) does with one of its inputs, get those.

    Raises:
        ValueError: a place cannot be found.
    """
    slots, tokens = slots_of(clip, prompt, ends)
    found = clip.encode_from_tokens_scheduled(tokens)
    conditionings = []
    for (states, extras), (shown, _) in zip(found, plain or found, strict=True):
        states = slots.with_chunks_of(shown, states)
        words = Words(promptnet, clip, vae, slots, tuple(subjects), update, states)
        conditionings.append([states, {**carry(extras, TAG, words, _UNPREPARED), SUBJECT_ROWS: slots.states_rows}])
    return conditionings


def _with_stand_ins(prompt: str, ends: Sequence[int], nouns: Sequence[str], word: str) -> tuple[str, list[int]]:
    """The prompt with the words that end at `ends` replaced by a word of one token, and where each of these ends. The
    end of an emphasis may stand behind a word."""
    text, found, done = "", {}, 0
    for i in sorted(range(len(ends)), key=ends.__getitem__):
        before = prompt[done : ends[i]]
        emphasis = _END_OF_EMPHASIS.search(before)[0]
        before = before.removesuffix(emphasis)
        own = re.search(rf"{whole_word(nouns[i])}\Z|[\w'-]+\Z", before, re.IGNORECASE)
        if own is None:
            raise ValueError(f"prompt: expected the marker right after a word, got it after {before[-12:]!r}")
        text += before[: own.start()] + word
        found[i], done = len(text), ends[i]
        text += emphasis.rstrip()
    return text + prompt[done:], [found[i] for i in range(len(ends))]


def checked_tokenizer(promptnet: LoadedPromptNet, clip):
    """The tokenizer of a CLIP's only text encoder.

    Raises:
        ValueError: it has several, or one of another width than the PromptNet's vectors.
    """
    names = list(clip.tokenize(""))
    if len(names) > 1:
        raise ValueError(f"clip: expected a single text encoder, as Stable Diffusion 1 and 2 have, got {len(names)}")
    tokenizer = getattr(clip.tokenizer, f"clip_{names[0]}")
    _check_width("clip", "text encoder", tokenizer.embedding_size, promptnet.module.config.context_width)
    return tokenizer


def check_channels(promptnet: LoadedPromptNet, channels: int) -> None:
    """Raises ValueError if a PromptNet does not take latents of so many channels."""
    own = promptnet.module.config.latent_channels
    if channels != own:
        raise ValueError(f"promptnet: expected one for latents of {channels} channels, got one for {own}")


def look(promptnet: LoadedPromptNet, clip_vision, image: torch.Tensor) -> Seen:
    """A picture (H, W, 3) as a PromptNet takes it.

    Raises:
        ValueError: the vision tower does not fit the PromptNet.
    """
    tokens = clip_vision.encode_image(image[None])["last_hidden_state"][0]
    _check_width("clip_vision", "vision tower", tokens.shape[-1], promptnet.module.config.vision_width)
    return Seen(image, tokens)


def _check_width(name: str, what: str, width: int, expected: int) -> None:
    if width != expected:
        raise ValueError(f"{name}: expected the {what} of width {expected} of this PromptNet, got one of width {width}")


def prepared(model):
    """Returns a clone of the MODEL that makes the subjects' words of such conditionings, and is otherwise the same."""

    def open_run(words: Words, patcher, noise: torch.Tensor) -> WordRun:
        return WordRun(words, patcher.model, noise)

    def models_of(words: Words) -> tuple:
        return words.promptnet.patcher, words.clip.patcher

    return carried.prepared(model, TAG, open_run, models_of, check=_check_together)


def _check_together(several: Sequence[Words]) -> None:
    """Raises ValueError if text encoders of one sampling are the same network with different weights, of which only one
    can be loaded."""
    first, *others = (words.clip.patcher for words in several)
    for other in others:
        same = (other.patches_uuid, other.forced_hooks) == (first.patches_uuid, first.forced_hooks)
        if other.is_clone(first) and not same:
            raise ValueError(
                "PromptNet Encode: clip: expected one with the same LoRAs and hooks for all subjects of a sampling, "
                "got different ones"
            )


class WordRun:
    """One sampling with a PromptNet's words.

    Args:
        words: the content of the conditioning.
        model: ComfyUI's BaseModel.
        noise: (B, C, h, w), with the size of the latents.

    Raises:
        ValueError: the latents are of another kind than the PromptNet's, or too small for it.
    """

    def __init__(self, words: Words, model, noise: torch.Tensor):
        self.words, self.model = words, model
        config, size = words.promptnet.module.config, tuple(noise.shape[-2:])
        factor = words.vae.spacial_compression_encode()
        try:
            check_channels(words.promptnet, noise.shape[1])
        except ValueError as error:
            raise ValueError(f"PromptNet Encode: {error}") from error
        if min(size) < config.region_side:
            raise ValueError(
                f"PromptNet Encode: latent: expected at least {config.region_side * factor} pixels on each side for "
                f"this PromptNet, got {size[1] * factor} x {size[0] * factor}"
            )
        pixels = torch.stack([cover(seen.image, (size[0] * factor, size[1] * factor)) for seen in words.subjects])
        self.references = model.process_latent_in(words.vae.encode(pixels))
        self.tokens = torch.stack([seen.tokens for seen in words.subjects])
        regions = (size[0] // config.region_side) * (size[1] // config.region_side)
        self.text = SplicedText(words.clip, words.slots, regions)
        room = self.text.room
        if room < 0:
            raise ValueError(
                f"PromptNet Encode: prompt: expected the subjects' words earlier (each becomes {regions} vectors at "
                f"this size), got one too late by {-room}; shorten the text before it"
            )
        self._kept: tuple[tuple, dict[int, torch.Tensor]] | None = None
        self._checked: set[float] = set()

    def _check(self, text: torch.Tensor, gamma: float) -> None:
        """Raises ValueError if another node has changed text states that are about to be replaced."""
        own, slots = self.words.states.clone(), self.words.slots
        if gamma != 1:
            own[:, list(slots.states_rows)] *= gamma
        for rows in slots.chunk_rows():
            if not torch.equal(text[:1, rows].to(own), own[:, rows]):
                raise ValueError(
                    "PromptNet Encode: subject: expected the conditioning with its text as the node gives it, got one "
                    "that another node has averaged, multiplied or zeroed, which the subject's word would undo; "
                    "weaken the subject by subject_scale or gamma of Fusion Guider"
                )

    def write(self, inputs: Mapping[str, Any], entry: Mapping[str, Any], x: torch.Tensor, sigma: torch.Tensor) -> dict:
        """See `carried.CarriedRun`: the inputs with the text states of this evaluation."""
        text, gamma = inputs["c_crossattn"].cond, entry.get(GAMMA, 1.0)
        if gamma not in self._checked:
            self._check(text, gamma)
            self._checked.add(gamma)
        states = self.states(text, x, sigma, gamma)
        return {**inputs, "c_crossattn": comfy.conds.CONDCrossAttn(states)}

    def states(self, text: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, gamma: float) -> torch.Tensor:
        """Text states (B, T, D) for the latents x (B, C, h, w) at a noise level (B,).

        Args:
            text: (1 or B, T, D), states of the prompt with a plain word for each subject.
            gamma: factor of the rows that carry subjects.
        """
        update = self.words.update
        key = (float(timestep[0]) if update == EVERY_STEP else None, len(x))
        if update == EVERY_EVALUATION or self._kept is None or self._kept[0] != key:
            self._kept = (key, self.text.encode(self._vectors(x, timestep)))
        return self.text.write(text, self._kept[1], gamma)

    def _vectors(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """S* (subjects, B, n, D)."""
        batch, many = len(x), len(self.words.subjects)
        made = vectors_of(
            self.words.promptnet.module,
            self.model.model_sampling,
            self.references.repeat_interleave(batch, 0),
            self.tokens.repeat_interleave(batch, 0),
            x.repeat(many, 1, 1, 1),
            timestep.repeat(many),
        )
        return made.unflatten(0, (many, batch))


def vectors_of(
    net: PromptNet,
    sampling,
    references: torch.Tensor,
    tokens: torch.Tensor,
    x: torch.Tensor,
    sigma: torch.Tensor,
) -> torch.Tensor:
    """S* (B, n, D) for latents that are being sampled.

    Args:
        net: on their device.
        sampling: the model's `model_sampling`.
        references: (B, C, h, w), the pictures' latents.
        tokens: (B, t, V), the vision tower's last hidden states of the pictures.
        x: (B, C, h, w) at the noise levels `sigma` (B,).
    """
    dtype = net.conv_in.weight.dtype
    noisy, timestep = sampling.calculate_input(sigma, x).to(dtype), sampling.timestep(sigma)
    return net(references.to(x.device, dtype), noisy, timestep, tokens.to(x.device, dtype)).float()
