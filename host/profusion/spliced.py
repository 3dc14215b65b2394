"""Prompts in which vectors stand in the places of words, in front of the text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..words import locate


@dataclass(frozen=True)
class Slots:
    """A prompt in which some words, of one token each, only keep places for vectors.

    Attributes:
        rows: tokens of the prompt's chunks with their weights, as ComfyUI has them.
        places: (chunk, index) of each word that keeps a place.
        states_rows: the row of the prompt's text states for each of them.
    """

    rows: tuple[tuple[tuple[Any, float], ...], ...]
    places: tuple[tuple[int, int], ...]
    states_rows: tuple[int, ...]

    def chunk_rows(self) -> list[slice]:
        """The rows of the prompt's text states for each chunk with a slot."""
        length = len(self.rows[0])
        return [slice(chunk * length, (chunk + 1) * length) for chunk in sorted({chunk for chunk, _ in self.places})]

    def with_chunks_of(self, plain: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Text states (1, T, D) of the prompt with those of another one in the chunks with slots, if it has them."""
        states = states.clone()
        for rows in self.chunk_rows():
            if rows.stop <= plain.shape[1]:
                states[:, rows] = plain[:, rows]
        return states


def slots_of(clip, prompt: str, ends: Sequence[int]) -> tuple[Slots, dict[str, list]]:
    """The slots of a prompt whose words that end at `ends` keep places, and ComfyUI's tokens of it.

    Args:
        clip: ComfyUI's CLIP with a single text encoder.

    Raises:
        ValueError: a place cannot be found.
    """
    tokens, places = locate(clip, prompt, ends)
    (rows,) = tokens.values()
    taken = tuple((place.chunk, place.index) for place in places)
    return Slots(tuple(map(tuple, rows)), taken, tuple(place.row for place in places)), tokens


class SplicedText:
    """Encodes a prompt with vectors in its slots.

    Args:
        clip: ComfyUI's CLIP with a single text encoder.
        slots: of the prompt.
        count: number of vectors in each slot; as many tokens at the end of a chunk are dropped.
    """

    def __init__(self, clip, slots: Slots, count: int):
        self.clip, self.slots, self.count = clip, slots, count
        self._neutral: torch.Tensor | None = None

    @property
    def room(self) -> int:
        """How many tokens fit between the last vector of a chunk and its end token; less than 0 if vectors do not."""
        taken = [index for chunk, _ in self.slots.places for index in self.carriers(chunk)]
        return len(self.slots.rows[0]) - 2 - max(taken)

    def carriers(self, chunk: int) -> list[int]:
        """The places of all vectors in a chunk, from left to right."""
        here = sorted(index for c, index in self.slots.places if c == chunk)
        return [index + number * (self.count - 1) + r for number, index in enumerate(here) for r in range(self.count)]

    def write(self, text: torch.Tensor, encoded: dict[int, torch.Tensor], gamma: float = 1.0) -> torch.Tensor:
        """Text states (B, T, D) of the whole prompt.

        Args:
            text: (1 or B, T, D), states of the prompt as it is.
            encoded: from `encode`, for the chunks with slots.
            gamma: factor of the rows that carry vectors.
        """
        batch, length = len(next(iter(encoded.values()))), len(self.slots.rows[0])
        chunks = list(text.expand(batch, -1, -1).split(length, 1))
        for chunk, found in encoded.items():
            found = found.to(text)
            if gamma != 1:
                found = found.clone()
                found[:, self.carriers(chunk)] *= gamma
            chunks[chunk] = found
        return torch.cat(chunks, 1)

    def encode(self, vectors: torch.Tensor) -> dict[int, torch.Tensor]:
        """Text states (B, tokens, D) of each chunk with slots, for vectors (slots, B, count, D).

        Every vector is an embedding with its position, as PromptNet's published weights make it.
        """
        clip, model = self.clip, self.clip.cond_stage_model
        model.reset_clip_options()
        if clip.layer_idx is not None:
            model.set_clip_options({"layer": clip.layer_idx})
        model.set_clip_options({"execution_device": clip.patcher.load_device})
        encoder = getattr(model, model.clip)
        positions = encoder.transformer.text_model.embeddings.position_embedding.weight
        found = {}
        for chunk in {chunk for chunk, _ in self.slots.places}:
            row = self._row(chunk)
            rows = [[token for token, _ in row] for _ in range(vectors.shape[1])]
            for index, vector in zip(self.carriers(chunk), self._of_chunk(vectors, chunk), strict=True):
                # ComfyUI adds the position to every token.
                for tokens, own in zip(rows, vector - positions[index].to(vector), strict=True):
                    tokens[index] = own
            states = encoder(rows)[0]
            weights = torch.tensor([weight for _, weight in row])
            if (weights != 1).any():
                if self._neutral is None:
                    (empty,) = clip.tokenize("").values()
                    self._neutral = encoder([[token for token, _ in empty[0]]])[0]
                states = self._neutral + (states - self._neutral) * weights.to(states)[:, None]
            found[chunk] = states
        return found

    def _row(self, chunk: int) -> list[tuple[Any, float]]:
        """Tokens of a chunk with a place for each vector."""
        here = {index for c, index in self.slots.places if c == chunk}
        row = self.slots.rows[chunk]
        spread = [one for i, one in enumerate(row) for _ in range(self.count if i in here else 1)]
        return spread[: len(row)]

    def _of_chunk(self, vectors: torch.Tensor, chunk: int) -> list[torch.Tensor]:
        """The vectors (B, D) of a chunk in the order of `carriers`."""
        here = sorted((index, j) for j, (c, index) in enumerate(self.slots.places) if c == chunk)
        return [vectors[j, :, r] for _, j in here for r in range(self.count)]
