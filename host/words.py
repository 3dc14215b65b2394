"""Where subjects stand in a prompt: by markers in the text or by their nouns, down to rows of a conditioning.

A marker is never seen by the text encoder. To learn which token stands before it, the prompt is tokenized a second time
with a word in the marker's place that is one token and occurs nowhere else; both token rows must agree but for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..encoders.words import check_word, find_word, hide_names, set_apart, whole_word

MARKER = "@subject"

SUBJECT_ROWS = "conceptloom_subject_rows"
"""Entry of a conditioning: the rows of its text states that carry a subject, as numbers."""

# Any that the tokenizer keeps as one token will do; several, for a prompt may use some of them.
_STAND_INS = ("zebra", "violin", "tornado", "pretzel", "glacier", "walnut", "lobster", "piano")
# CLIP's text encoders by the names that the host gives their tokens: SD 1.x has l, SD 2.x h, SDXL l and g.
_ENCODERS = {"l", "h", "g"}
# Marks of the published programs. One that is left in a prompt is a slip, not a word.
_KNOWN_MARKERS = (MARKER, "<|image|>")


@dataclass(frozen=True)
class Place:
    """Where one subject's word stands.

    Attributes:
        chunk, index: chunk of 77 tokens, and place in it.
        row: of the conditioning, counted over all chunks.
        weight: emphasis of its token in the prompt.
        word: the token as text.
    """

    chunk: int
    index: int
    row: int
    weight: float
    word: str


def find_subjects(prompt: str, nouns: Sequence[str], marker: str = MARKER) -> tuple[str, list[int]]:
    """The prompt without markers, and for each subject the place in it, in characters, where its word ends.

    With markers the first subject takes the first marker. Without markers each subject takes its noun, the second
    subject of a noun its second occurrence; nouns count as whole words, whatever their case, and never inside the name
    of an embedding. Where a script has no blanks between words, blanks are put around the word, for without them the
    text encoder would have no token that is the word's alone.

    Raises:
        ValueError: the number of markers is not that of the subjects, or a noun is absent.
    """
    marker = marker.strip()
    check_word(marker, "marker")
    # The end of an embedding's name may be the word, but no sign that follows it is a part of the name.
    searched = hide_names(prompt)[0] if marker[0].isalnum() else prompt
    markers = [found.span() for found in re.finditer(whole_word(marker), searched)]
    if markers:
        if len(markers) != len(nouns):
            raise ValueError(f"prompt: expected one {marker} per subject, got {len(markers)} for {len(nouns)} subjects")
        return _without_markers(prompt, markers)
    slip = next((known for known in _KNOWN_MARKERS if known in prompt.lower()), None)
    if slip:
        raise ValueError(f"prompt: expected {marker} after each subject's word, got a {slip}")
    spans, used = [], {}
    for number, noun in enumerate(nouns, 1):
        found = find_word(prompt, noun)
        nth = used[noun.lower()] = used.get(noun.lower(), -1) + 1
        if nth >= len(found):
            raise ValueError(
                f"prompt: expected {marker} after each subject's word, or the noun of each subject, got {noun!r} of "
                f"subject {number} {len(found)} times for {nth + 1} subjects of this noun"
            )
        spans.append(found[nth])
    return _with_words_apart(prompt, spans)


def _without_markers(prompt: str, markers: Sequence[tuple[int, int]]) -> tuple[str, list[int]]:
    """The prompt without what stands at `markers`, and where each of these stood."""
    text, ends, done = "", [], 0
    for start, end in markers:
        text += prompt[done:start]
        ends.append(len(text))
        done = end
        text = set_apart(text + prompt[end:], len(text)).removesuffix(prompt[end:])
    return text + prompt[done:], ends


def _with_words_apart(prompt: str, spans: Sequence[tuple[int, int]]) -> tuple[str, list[int]]:
    """The prompt with blanks around the words at `spans` where letters touch them, and where each of these ends."""
    ends = [end for _, end in spans]
    for at in sorted({place for span in spans for place in span}, reverse=True):
        apart = set_apart(prompt, at)
        ends = [end + len(apart) - len(prompt) if end > at else end for end in ends]
        prompt = apart
    return prompt, ends


def locate(clip, prompt: str, ends: Sequence[int]) -> tuple[dict[str, list], list[Place]]:
    """The host's tokens of a plain prompt, and the token that ends at each of `ends`.

    Args:
        clip: the host's CLIP with the tokenizers of SD 1.x, SD 2.x or SDXL.
        prompt: without markers, with emphasis and embeddings as the host reads them.
        ends: places in characters, as `find_subjects` gives them.

    Raises:
        ValueError: the CLIP is of another kind, a place has no word before it, two share one, or an embedding in the
            prompt does not fit the text encoder.
    """
    tokens = clip.tokenize(prompt, return_word_ids=True)
    if not set(tokens) <= _ENCODERS:
        raise ValueError(
            f"clip: expected the text encoders of SD 1.x, SD 2.x or SDXL, got one with the parts {', '.join(tokens)}"
        )
    name = next(iter(tokens))
    tokenizer = getattr(clip.tokenizer, f"clip_{name}")
    foreign, word = stand_in(tokenizer, prompt)
    marked = prompt
    for end in sorted(set(ends), reverse=True):
        marked = f"{marked[:end]} {word} {marked[end:]}"
    plain = _words(tokens[name])
    before, reached = [], []
    for token, *_ in _words(clip.tokenize(marked, return_word_ids=True)[name]):
        if isinstance(token, int) and token == foreign:
            reached.append(len(before))
        else:
            before.append(token)
    if len(reached) != len(set(ends)) or not _same(before, [token for token, *_ in plain]):
        raise ValueError("prompt: expected the marker right after a whole word, got one inside a word")
    count_at = dict(zip(sorted(set(ends)), reached, strict=True))
    places, taken = [], {}
    for number, end in enumerate(ends, 1):
        position = count_at[end] - 1
        if position < 0:
            raise ValueError(f"prompt: expected a word before the marker of subject {number}, got the beginning")
        _, weight, chunk, index, row = plain[position]
        text = _text_of(tokenizer, [one for one, *_ in plain[: position + 1]])
        if not any(c.isalnum() for c in text):
            raise ValueError(f"prompt: expected a word before the marker of subject {number}, got {text!r}")
        if position in taken:
            raise ValueError(
                f"prompt: expected a word of its own for each subject, got {text!r} for {taken[position]} and {number}"
            )
        taken[position] = number
        places.append(Place(chunk, index, row, weight, text))
    _check_embeddings(clip, tokens)
    return _without_word_ids(tokens), places


def row_count(tokens: Mapping[str, Sequence[Sequence]]) -> int:
    """How many rows of text states the host makes of its tokens, where one token is one row."""
    return min(sum(map(len, chunks)) for chunks in tokens.values())


def trained_layer(tokens: dict[str, list]) -> int:
    """The layer whose states the model was trained on: SD 1.x takes the last, the others the one before."""
    return -1 if set(tokens) == {"l"} else -2


def without_emphasis(tokens: dict[str, list], places: Sequence[Place]) -> dict[str, list]:
    """A copy of the host's tokens in which the tokens at `places` have weight 1."""
    here = {(place.chunk, place.index) for place in places}
    return {
        name: [[(t, 1.0 if (c, i) in here else w) for i, (t, w) in enumerate(chunk)] for c, chunk in enumerate(chunks)]
        for name, chunks in tokens.items()
    }


def _text_of(tokenizer, tokens: Sequence[Any]) -> str:
    """The last of some tokens as text, with as many before it as make whole characters, of which it may be a part."""
    if torch.is_tensor(tokens[-1]):
        return "embedding"
    for first in range(len(tokens) - 1, -1, -1):
        if not isinstance(tokens[first], int):
            break
        text = tokenizer.decode(tokens[first:]).strip()
        if "\ufffd" not in text:
            return text
    return tokenizer.inv_vocab[tokens[-1]].removesuffix("</w>")


def _words(chunks: list[list[tuple]]) -> list[tuple[Any, float, int, int, int]]:
    """(token, weight, chunk, index, row) of all tokens that come from text; the host gives all others word id 0."""
    found, row = [], 0
    for c, chunk in enumerate(chunks):
        found += [(token, weight, c, i, row + i) for i, (token, weight, word) in enumerate(chunk) if word]
        row += len(chunk)
    return found


def stand_in(tokenizer, prompt: str) -> tuple[int, str]:
    """A word that the prompt does not contain and the tokenizer keeps as one token."""
    for word in _STAND_INS:
        own = _words(tokenizer.tokenize_with_weights(word, return_word_ids=True))
        if len(own) == 1 and word not in prompt.lower():
            return own[0][0], word
    raise ValueError(f"prompt: expected one without some of the words {', '.join(_STAND_INS)}, got all of them")


def _same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.is_tensor(x) == torch.is_tensor(y) and (torch.equal(x, y) if torch.is_tensor(x) else x == y)
        for x, y in zip(a, b, strict=True)
    )


def _check_embeddings(clip, tokens: dict[str, list]) -> None:
    """The host drops embeddings of a wrong width while it encodes, which would shift all rows behind them."""
    for name, chunks in tokens.items():
        width = getattr(clip.tokenizer, f"clip_{name}").embedding_size
        for token in (token for chunk in chunks for token, *_ in chunk if torch.is_tensor(token)):
            if token.shape[-1] != width:
                raise ValueError(
                    f"prompt: expected embeddings of width {width} for this text encoder, got {token.shape[-1]}"
                )


def _without_word_ids(tokens: dict[str, list]) -> dict[str, list]:
    return {name: [[(t, w) for t, w, _ in chunk] for chunk in chunks] for name, chunks in tokens.items()}
