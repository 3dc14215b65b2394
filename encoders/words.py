"""Words in prompts: where a whole word is, in scripts with and without spaces between words.

ComfyUI reads `embedding:NAME` as one unit, so no word is ever found inside the name of an embedding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Scripts without spaces between words: Thai to Tibetan, Burmese, Khmer, Japanese kana, and Chinese characters.
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Korean has spaces between words, but appends particles to them.
_WITH_PARTICLES = "\uac00-\ud7a3"
_NAME = re.compile(r"(?<![^\s(])embedding:[^\s()<\[]+")
_HIDDEN = "\ue000"
"""A character that is neither part of a word nor a space, from Unicode's private use area."""


def check_word(word: str, name: str) -> None:
    """Raises ValueError unless an invented word is one word in a prompt; `name` is the input that messages name."""
    if not word or re.search(r"[\s()\\:]", word):
        raise ValueError(f"{name}: expected a word without spaces, colons, parentheses or backslashes, got {word!r}")


def whole_word(word: str) -> str:
    """A pattern for a word that is not part of a longer one: "cat" is not found in "catalog". In scripts without spaces
    between words, it is found wherever its characters are."""
    first, last = word[0], word[-1]
    spaced = rf"[^\W{_UNSPACED}]"
    before = rf"(?<!{spaced})" if re.match(spaced, first) else ""
    after = rf"(?!{spaced})" if re.match(spaced, last) and not re.match(f"[{_WITH_PARTICLES}]", last) else ""
    return f"{before}{re.escape(word)}{after}"


def find_word(text: str, word: str, same_case: bool = False) -> list[tuple[int, int]]:
    """Start and end of each occurrence of a word in a text, in characters, in any case unless `same_case`; names of
    embeddings are skipped."""
    flags = 0 if same_case else re.IGNORECASE
    return [match.span() for match in re.finditer(whole_word(word), hide_names(text)[0], flags)]


def hide_names(text: str) -> tuple[str, list[str]]:
    """The text with the names of embeddings masked, at the same length, and these names for `show_names`."""
    return _NAME.sub(lambda match: _HIDDEN * len(match[0]), text), _NAME.findall(text)


def show_names(text: str, names: Sequence[str]) -> str:
    """The text with all names that `hide_names` masked."""
    remaining = iter(names)
    return re.sub(f"{_HIDDEN}+", lambda _: next(remaining), text)


def set_apart(text: str, at: int) -> str:
    """The text with a space at a position where two letters touch and one is of a script without spaces or Korean,
    since a tokenizer reads both as one word. Otherwise the text unchanged."""
    touching = text[at - 1 : at + 1] if 0 < at < len(text) else ""
    if touching.isalnum() and re.search(f"[{_UNSPACED}{_WITH_PARTICLES}]", touching):
        return f"{text[:at]} {text[at:]}"
    return text
