"""Batches for training, with the positions of subjects among a caption's tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..base import LENGTH, Vocabulary
from ..data.dataset import SubjectPictures


def subject_rows(vocabulary: Vocabulary, caption: str, ends: Iterable[int]) -> list[int]:
    """For each character offset in a caption, the row of the token just before it, which is the token that a
    placeholder marks at inference.

    The row is 0 if there is no token to mark: before the first word, inside a word, after the last of the 77 tokens, or
    if an earlier offset has marked it.
    """
    tokens, rows = vocabulary.split(caption), []
    for end in ends:
        before = vocabulary.split(caption[:end])
        marks = before == tokens[: len(before)] and len(before) <= LENGTH - 2 and len(before) not in rows
        rows.append(len(before) if marks else 0)
    return rows


def collate(items: Sequence[dict], vocabularies: Sequence[Vocabulary]) -> dict[str, torch.Tensor]:
    """n items of `SubjectPictures` as a batch: `picture`, `masks` and `objects` stacked, and

    - `tokens` (n, text towers, 77), int64
    - `rows` (n, 4), int64: see `subject_rows`
    - `present` (n, 4), bool: which rows are subjects; one whose token cannot be marked stays plain text
    """
    batch = {name: torch.stack([item[name] for item in items]) for name in ("picture", "masks", "objects")}
    present = torch.stack([item["present"] for item in items])
    rows = torch.zeros(present.shape, dtype=torch.long)
    for i, item in enumerate(items):
        # All towers tokenize alike, so a row is valid for each.
        found = subject_rows(vocabularies[0], item["caption"], item["ends"][present[i]].tolist())
        rows[i, present[i]] = torch.tensor(found, dtype=torch.long)
    tokens = [[vocabulary.row(item["caption"]) for vocabulary in vocabularies] for item in items]
    return {**batch, "tokens": torch.tensor(tokens), "rows": rows, "present": rows > 0}


def check_subjects(data: SubjectPictures) -> None:
    """Raises ValueError if no picture has a subject of the requested classes."""
    types = data.object_types
    found = (subject.segment.label for image_id in data.ids for subject in data.folder.matched(image_id)[1])
    if not any(types is None or label in types for label in found):
        kind = "a subject" if types is None else f"a subject of class {', '.join(sorted(types))}"
        raise ValueError(f"--data: expected pictures with {kind}, got none among the {len(data)} in {data.folder.root}")
