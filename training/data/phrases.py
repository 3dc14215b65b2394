"""Stage 'phrases': the noun phrases of captions, by spaCy, with "two women" split into "a woman and a woman"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .folder import CAPTION, PHRASES, Folder, Phrase, in_batches, work_through

if TYPE_CHECKING:
    from spacy.language import Language

# Training uses at most four subjects of a picture.
_COUNTS = {"two": 2, "three": 3, "four": 4, "2": 2, "3": 3, "4": 4}
_COUNTED = re.compile(rf"(?:(?:the|these|those)\s+)?({'|'.join(_COUNTS)})\s+(.*)", re.IGNORECASE | re.DOTALL)
# Words that lemmatizers leave in the plural.
_SINGULARS = {"people": "person"}
# Where "an" is right, though some sounds differ from the spelling: "a unicorn", "a one-eyed cat", "an hour".
_AN = re.compile(r"(?!uni(?!n|m)|eu|one\b|us[eu])[aeiou]|hour|honest|heir|honou?r", re.IGNORECASE)


@dataclass(frozen=True)
class Chunk:
    """Characters `start` to `end` (exclusive) of a caption, and the phrases that replace them."""

    start: int
    end: int
    phrases: tuple[str, ...]


def take_apart(before: str, noun: str, singular: str) -> list[str]:
    """The phrases that a counted plural stands for: `before` is the text of the noun chunk before its noun ("the two
    young "), `noun` the noun ("women"), `singular` its singular ("woman").

    Counts of two to four give as many equal phrases ("a young woman"); any other chunk is returned unchanged, as the
    only phrase (FastComposer, arXiv 2305.10431, section 5.1).
    """
    counted = _COUNTED.fullmatch(before)
    # In "two women's hats" the count belongs to the women.
    if counted is None or not singular or re.search(r"['\u2019]", before):
        return [before + noun]
    described = counted[2] + _SINGULARS.get(singular.lower(), singular)
    return [f"{'an' if _AN.match(described) else 'a'} {described}"] * _COUNTS[counted[1].lower()]


def rewrite(caption: str, chunks: Iterable[Chunk]) -> tuple[str, list[Phrase]]:
    """The caption with each chunk replaced by its phrases, joined by "and", and the phrases with their positions in it.

    Chunks must be in the order of the caption and not overlap. An initial capital is kept.
    """
    text, done, phrases = "", 0, []
    for chunk in chunks:
        text += caption[done : chunk.start]
        for i, phrase in enumerate(chunk.phrases):
            if i:
                text += " and "
            elif caption[chunk.start].isupper():
                phrase = phrase[0].upper() + phrase[1:]
            text += phrase
            phrases.append(Phrase(phrase, len(text)))
        done = chunk.end
    return text + caption[done:], phrases


def write_phrases(folder: Folder, model: str, batch: int = 256, again: bool = False) -> None:
    """Writes `<id>.phrases.json` of every picture that has none, from its caption, with the spaCy pipeline `model` (the
    name of an installed one, or a folder).

    Raises ImportError, FileNotFoundError or ValueError if spaCy, the pipeline or a component of it is missing.
    """
    ids = folder.left_to_do((CAPTION,), (PHRASES,), again)
    if not ids:
        return
    pipeline = _load(model)

    def work(some: list[str]) -> None:
        captions = [folder.caption(i) for i in some]
        for image_id, caption, doc in zip(some, captions, pipeline.pipe(captions), strict=True):
            chunks = [
                Chunk(c.start_char, c.end_char, _phrases_of(caption, c))
                for c in doc.noun_chunks
                if c.root.pos_ != "PRON"
            ]
            text, phrases = rewrite(caption, chunks)
            records = [{"text": p.text, "end": p.end} for p in phrases]
            folder.write_json(image_id, PHRASES, {"caption": text, "phrases": records})

    work_through("phrases", in_batches(ids, batch), len(ids), work)


def _phrases_of(caption: str, chunk) -> tuple[str, ...]:
    before, noun = caption[chunk.start_char : chunk.root.idx], caption[chunk.root.idx : chunk.end_char]
    plural = chunk.root.tag_ in ("NNS", "NNPS")
    return tuple(take_apart(before, noun, chunk.root.lemma_)) if plural else (before + noun,)


def _load(model: str) -> Language:
    try:
        import spacy
    except ImportError as error:
        raise ImportError("phrases: expected the package spaCy, got none; `pip install spacy`") from error
    try:
        pipeline = spacy.load(model)
    except OSError as error:
        raise FileNotFoundError(
            f"--model: expected an installed spaCy pipeline or a folder with one, got {model!r}; `python -m spacy "
            f"download {model}`"
        ) from error
    # Noun chunks need the parse, plurals the tags, singulars the lemmas.
    probe = pipeline("two women")
    missing = [name for name in ("DEP", "POS", "TAG", "LEMMA") if not probe.has_annotation(name)]
    if missing:
        raise ValueError(
            f"--model: expected a spaCy pipeline with parser, tagger and lemmatizer (such as en_core_web_sm), got "
            f"{model!r}, which sets no {', '.join(missing)}"
        )
    return pipeline
