"""FastComposer in ComfyUI: encodes subjects, and fuses them into the words of a prompt.

Xiao et al., "FastComposer: Tuning-Free Multi-Subject Image Generation with Localized Attention" (arXiv 2305.10431).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_management
import torch

from ...encoders.fuser import fuse_rows
from ...encoders.reference import KEEP, prepare_reference
from ...subjects.subject import Subject
from ..advice import advise
from ..words import MARKER, SUBJECT_ROWS, Place, find_subjects, locate, row_count, trained_layer, without_emphasis
from .files import LoadedFuser, same_tower, tower_fingerprint

ENCODING = "fastcomposer"
FUSE = "Fuse Subjects (MLP)"
SEPARATE, AVERAGED = "each is a subject", "all show one subject"
FOREIGN_TOWER = (
    "the subjects were encoded by another vision tower than the fuser's own, which weakens their likeness: take "
    "CLIP_VISION from Load FastComposer"
)


@dataclass(frozen=True, eq=False)
class Embedding:
    """The embedding of a subject.

    Attributes:
        vector: (E,), the image embedding of its picture, or the mean over several pictures.
        tower: fingerprint of the vision tower that encoded it, see `files.tower_fingerprint`.
    """

    vector: torch.Tensor
    tower: torch.Tensor


def encode_subjects(
    clip_vision, subjects: Sequence[Subject], background: str = KEEP, crop: bool = False, pictures: str = SEPARATE
) -> tuple[Subject, ...]:
    """Returns the subjects with their embeddings.

    Args:
        clip_vision: ComfyUI's CLIP vision tower.
        subjects: each with one picture.
        background, crop: see `encoders.reference.prepare_reference`; for subjects with a mask.
        pictures: SEPARATE, or AVERAGED if all pictures show the same subject. Then only the first subject is returned,
            with the mean of the embeddings.

    Raises:
        ValueError: there is no subject, the tower is not a CLIP vision tower with a projection, or a mask that is
            needed is empty.
    """
    if not subjects:
        raise ValueError("subjects: expected at least one subject, got none")
    if clip_vision.model_type != "clip_vision_model" or "projection_dim" not in clip_vision.config:
        raise ValueError(f"clip_vision: expected a CLIP vision tower, got {clip_vision.model_type}")
    side = clip_vision.image_size
    pictures_seen = torch.stack([prepare_reference(s.image, s.mask, side, background, crop) for s in subjects])
    vectors = clip_vision.encode_image(pictures_seen).image_embeds.float()
    tower = tower_fingerprint(clip_vision)
    if pictures == AVERAGED:
        subjects, vectors = subjects[:1], vectors.mean(0, keepdim=True)
    return tuple(s.with_encoding(ENCODING, Embedding(v, tower)) for s, v in zip(subjects, vectors, strict=True))


def fuse(
    clip, fuser: LoadedFuser, prompt: str, subjects: Sequence[Subject], marker: str = MARKER, strength: float = 1.0
) -> tuple[list, list, str]:
    """Encodes a prompt without and with the subjects.

    The two conditionings differ only in the subjects' rows. A subject with weight 0 remains text.

    Returns:
        The conditioning of the text alone, the conditioning with the subjects, and a report of each subject's token.

    Raises:
        ValueError: a subject has no embedding, widths do not match, the CLIP skips layers or returns more than one row
            per token, or a subject's word is not found.
    """
    embeddings = _embeddings_of(subjects, fuser)
    plain, ends = find_subjects(prompt, [subject.noun for subject in subjects], marker)
    tokens, places = locate(clip, plain, ends)
    if clip.layer_idx not in (None, trained_layer(tokens)):
        raise ValueError(
            f"clip: expected its layer {trained_layer(tokens)}, as in training, got {clip.layer_idx} (CLIP skip)"
        )
    report = [
        f"{number}. {subject.noun}: token {place.row} {place.word!r}" + ("" if subject.weight else ", off (weight 0)")
        for number, (subject, place) in enumerate(zip(subjects, places, strict=True), 1)
    ]
    odd = [
        f'the prompt does not say "{subject.noun}"; subject {number} is fused into {place.word!r}'
        for number, (subject, place) in enumerate(zip(subjects, places, strict=True), 1)
        if subject.weight and subject.noun.casefold() not in plain.casefold()
    ]
    if fuser.tower is not None and not all(same_tower(e.tower, fuser.tower) for e in embeddings):
        odd.append(FOREIGN_TOWER)
    for sentence in odd:
        advise(FUSE, sentence)
        report.append(f"Warning: {sentence}.")
    text_only = clip.encode_from_tokens_scheduled(tokens)
    count = row_count(tokens)
    for states, _ in text_only:
        if states.shape[1] != count:
            raise ValueError(
                f"clip: expected one row of text states for each of the {count} tokens, got {states.shape[1]} rows, as "
                "CLIP NegPip gives them; connect the CLIP from before that node"
            )
    width = text_only[0][0].shape[-1]
    if width != fuser.module.text_width:
        raise ValueError(
            f"fuser: expected one for text states of width {width} for this CLIP, got {fuser.module.text_width}"
        )
    active = [i for i, subject in enumerate(subjects) if subject.weight and strength]
    fused = [[states, dict(extras)] for states, extras in text_only]
    if active:
        vectors = torch.stack([embeddings[i].vector for i in active])
        rows = _fused_rows(clip, fuser, tokens, [places[i] for i in active], text_only, vectors, strength)
        for entry, new in zip(fused, rows, strict=True):
            # A copy, because ComfyUI caches the states of the text alone.
            entry[0] = entry[0].clone()
            carriers = [places[i].row for i in active]
            entry[0][:, carriers] = new.to(entry[0])
            entry[1][SUBJECT_ROWS] = tuple(carriers)
    return text_only, fused, "\n".join(report)


def _fused_rows(
    clip,
    fuser: LoadedFuser,
    tokens: dict[str, list],
    places: Sequence[Place],
    text: list,
    vectors: torch.Tensor,
    strength: float,
) -> list[torch.Tensor]:
    """The new rows (n, D) at `places`, for each entry of a conditioning (scheduled hooks on a CLIP give several)."""
    emphasis = torch.tensor([place.weight for place in places])
    unweighted, neutral = text, [None] * len(text)
    if (emphasis != 1).any():
        unweighted = clip.encode_from_tokens_scheduled(without_emphasis(tokens, places))
        neutral = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    rows, indices = [place.row for place in places], [place.index for place in places]
    comfy.model_management.load_model_gpu(fuser.patcher)
    device = fuser.patcher.load_device
    return [
        fuse_rows(
            fuser.module,
            entry[0][0, rows].to(device),
            vectors.to(device),
            strength,
            None if empty is None else (emphasis.to(device), empty[0][0, indices].to(device)),
        )
        for entry, empty in zip(unweighted, neutral, strict=True)
    ]


def _embeddings_of(subjects: Sequence[Subject], fuser: LoadedFuser) -> list[Embedding]:
    """The embeddings of all subjects, after checking that they fit the fuser."""
    if not subjects:
        raise ValueError("subjects: expected at least one subject, got none")
    found: list[Embedding] = []
    for number, subject in enumerate(subjects, 1):
        embedding = subject.encodings.get(ENCODING)
        if embedding is None:
            raise ValueError(
                f"subjects: expected subjects from Subject Encoder (FastComposer), got subject {number} "
                f"({subject.noun}) without an embedding"
            )
        if len(embedding.vector) != fuser.module.image_width:
            raise ValueError(
                f"fuser: expected one for embeddings of width {len(embedding.vector)} for this CLIP_VISION, got "
                f"{fuser.module.image_width}"
            )
        found.append(embedding)
    return found
