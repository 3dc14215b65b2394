"""Finds subjects in a prompt, by markers in the text or by their nouns, and the rows of the conditioning for them.

The text encoder never sees a marker. To find the token before a marker, the prompt is tokenized a second time, with the
marker replaced by a word that is a single token and does not occur elsewhere. Except for this token, both token
sequences must be equal.
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
"""Key in a conditioning's options: the indices of the text rows that carry a subject."""
GAMMA = "conceptloom_gamma"
"""Key in a conditioning's options: the factor of these rows, for text states that are computed while sampling."""

# Any word that the tokenizer keeps as one token will do. There are several, because a prompt may contain some.
_STAND_INS = ("zebra", "violin", "tornado", "pretzel", "glacier", "walnut", "lobster", "piano")
# ComfyUI's names for CLIP's text encoders: SD 1.x has l, SD 2.x has h, SDXL has l and g.
_ENCODERS = {"l", "h", "g"}
# Markers of the published programs. One that is left in a prompt is a mistake, not a word.
_KNOWN_MARKERS = (MARKER, "<|image|>")


@dataclass(frozen=True)
class Place:
    """Position of a subject's word in the encoded prompt.

    Attributes:
        chunk, index: the chunk of 77 tokens, and the position in it.
        row: row of the conditioning, counted over all chunks.
        weight: emphasis of the token in the prompt.
        word: the token as text.
    """

    chunk: int
    index: int
    row: int
    weight: float
    word: str


def find_subjects(prompt: str, nouns: Sequence[str], marker: str = MARKER) -> tuple[str, list[int]]:
    """Finds the words of the subjects in a prompt.

    With markers, the first subject takes the first marker, and so on. Without markers, each subject takes its noun, and
    the second subject with the same noun takes its second occurrence. Nouns are matched as whole words, ignoring case,
    and never inside the name of an embedding. In scripts without spaces between words, spaces are inserted around the
    word, because otherwise no token of the text encoder would belong to the word alone.

    Returns:
        The prompt without markers, and for each subject the position in it, in characters, where its word ends.

    Raises:
        ValueError: the marker cannot be used, the number of markers differs from the number of subjects, or a noun is
            missing.
    """
    marker = marker.strip()
    check_word(marker, "marker")
    # A marker that is a word can be part of an embedding's name; one that starts with a sign such as @ cannot.
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
    """The prompt without the text at `markers`, and for each of these the position where it was."""
    text, ends, done = "", [], 0
    for start, end in markers:
        text += prompt[done:start]
        ends.append(len(text))
        done = end
        text = set_apart(text + prompt[end:], len(text)).removesuffix(prompt[end:])
    return text + prompt[done:], ends


def _with_words_apart(prompt: str, spans: Sequence[tuple[int, int]]) -> tuple[str, list[int]]:
    """The prompt with spaces around the words at `spans` where letters touch them, and the end of each word."""
    ends = [end for _, end in spans]
    for at in sorted({place for span in spans for place in span}, reverse=True):
        apart = set_apart(prompt, at)
        ends = [end + len(apart) - len(prompt) if end > at else end for end in ends]
        prompt = apart
    return prompt, ends


def locate(clip, prompt: str, ends: Sequence[int]) -> tuple[dict[str, list], list[Place]]:
    """Tokenizes a plain prompt, and finds the token that ends at each of `ends`.

    Args:
        clip: CLIP with the tokenizers of SD 1.x, SD 2.x or SDXL.
        prompt: without markers, with emphasis and embeddings in ComfyUI's syntax.
        ends: positions in characters, from `find_subjects`.

    Returns:
        ComfyUI's tokens, and a `Place` for each of `ends`.

    Raises:
        ValueError: the CLIP is of another kind, there is no word before a position, two positions share a word, or an
            embedding in the prompt does not fit the text encoder.
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
    """Number of rows of text states that ComfyUI makes from its tokens if every token is one row."""
    return min(sum(map(len, chunks)) for chunks in tokens.values())


def trained_layer(tokens: dict[str, list]) -> int:
    """The text encoder's layer that the model was trained on: the last (-1) for SD 1.x, else the one before (-2)."""
    return -1 if set(tokens) == {"l"} else -2


def without_emphasis(tokens: dict[str, list], places: Sequence[Place]) -> dict[str, list]:
    """A copy of ComfyUI's tokens in which the tokens at `places` have weight 1."""
    here = {(place.chunk, place.index) for place in places}
    return {
        name: [[(t, 1.0 if (c, i) in here else w) for i, (t, w) in enumerate(chunk)] for c, chunk in enumerate(chunks)]
        for name, chunks in tokens.items()
    }


def _text_of(tokenizer, tokens: Sequence[Any]) -> str:
    """The last token as text, with as many tokens before it as are needed to get whole characters."""
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
    """(token, weight, chunk, index, row) of all tokens that come from text. ComfyUI gives the others word id 0."""
    found, row = [], 0
    for c, chunk in enumerate(chunks):
        found += [(token, weight, c, i, row + i) for i, (token, weight, word) in enumerate(chunk) if word]
        row += len(chunk)
    return found


def stand_in(tokenizer, prompt: str) -> tuple[int, str]:
    """Finds a word that is not in the prompt and that the tokenizer keeps as one token.

    Returns:
        The token id and the word.

    Raises:
        ValueError: the prompt contains all candidates.
    """
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
    """Raises ValueError for embeddings of the wrong width. ComfyUI drops them while encoding, which would shift all
    following rows."""
    for name, chunks in tokens.items():
        width = getattr(clip.tokenizer, f"clip_{name}").embedding_size
        for token in (token for chunk in chunks for token, *_ in chunk if torch.is_tensor(token)):
            if token.shape[-1] != width:
                raise ValueError(
                    f"prompt: expected embeddings of width {width} for this text encoder, got {token.shape[-1]}"
                )


def _without_word_ids(tokens: dict[str, list]) -> dict[str, list]:
    return {name: [[(t, w) for t, w, _ in chunk] for chunk in chunks] for name, chunks in tokens.items()}
