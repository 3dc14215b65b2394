"""The texts of a concept fusion: from one base text, one text per concept with the placeholder of that concept alone.

Concept Weaver (Kwon et al., arXiv 2404.03913, section 3.4) describes the same scene once plainly and once per concept,
each time with one placeholder: "a cat and a dog" becomes "a <new1> cat and a dog" and "a cat and a <new2> dog". A text
may also leave the other concepts out ("a <new1> cat"), so that nothing in it refers to them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .words import find_word, hide_names, show_names, whole_word

KEEP_OTHERS, DROP_OTHERS = "keep the others' words", "leave the others out"
OTHERS = (KEEP_OTHERS, DROP_OTHERS)

_DETERMINERS = r"(?:an?|the|one|this|that|his|her|its|my|your|our|their)"


@dataclass(frozen=True)
class Name:
    """The names of a concept: its class word ("dog") and its own placeholder ("<new1>"); either may be empty."""

    class_word: str
    placeholder: str


def concept_text(base: str, own: Name, others: Sequence[Name], about_others: str = KEEP_OTHERS) -> str:
    """The base text with a concept's placeholder before its class word.

    The concept's placeholder stays where the text already has it; placeholders of other concepts are removed. A concept
    without a class word must have its placeholder in the text; one without a placeholder is named by its class word
    alone. Names of embeddings are left unchanged.

    Raises:
        ValueError: neither the concept's placeholder nor its class word is in the text.
    """
    text, names = hide_names(plain_text(base, others))
    for other in others:
        if about_others == DROP_OTHERS and other.class_word and other.class_word.lower() != own.class_word.lower():
            text = _without(text, other.class_word, own.class_word)
    if own.placeholder and re.search(whole_word(own.placeholder), text):
        return _tidy(show_names(text, names))
    found = find_word(text, own.class_word) if own.class_word else []
    if not found:
        expected = " or ".join(filter(None, (repr(own.class_word) if own.class_word else "", own.placeholder)))
        raise ValueError(f"prompt: expected {expected or 'the class word of the concept'} in it, got {base!r}")
    if own.placeholder:
        (start, _), *_ = found
        # "an owl" becomes "a <new1> owl": the article depends on the word that follows it.
        before = re.sub(r"\b([Aa])n(\s+)$", r"\1\2", text[:start])
        # Without a space the tokenizer would read placeholder and preceding word as one word.
        before += " " * before[-1:].isalnum()
        text = f"{before}{own.placeholder} {text[start:]}"
    return _tidy(show_names(text, names))


def plain_text(base: str, names: Sequence[Name]) -> str:
    """The base text without placeholders, which only the concepts' own texts may contain."""
    text, embeddings = hide_names(base)
    for name in names:
        if name.placeholder:
            text = re.sub(rf"{whole_word(name.placeholder)}\s*", "", text)
    return _tidy(show_names(text, embeddings))


def check_text(text: str, own: Name, others: Sequence[Name]) -> None:
    """Raises ValueError unless a concept's text contains its placeholder exactly once and no other concept's."""
    times = len(find_word(text, own.placeholder, same_case=True)) if own.placeholder else 1
    if times != 1:
        raise ValueError(f"texts: expected {own.placeholder} exactly once in {text!r}, got it {times} times")
    for other in others:
        if other.placeholder and find_word(text, other.placeholder, same_case=True):
            raise ValueError(
                f"texts: expected {own.placeholder or own.class_word} alone in {text!r}, got {other.placeholder} "
                "beside it, with which it would mix"
            )


def names_class(text: str, own: Name) -> bool:
    """Whether a text contains a concept's class word, or the concept has none."""
    return not own.class_word or bool(find_word(text, own.class_word))


def _without(text: str, class_word: str, kept: str) -> str:
    """The text without a class word, its article, the adjectives between them, and one conjunction. The phrase `kept`
    stays, even if it contains the class word."""
    if kept and re.search(whole_word(class_word), kept, re.IGNORECASE):
        first, *rest = re.split(f"({whole_word(kept)})", text, flags=re.IGNORECASE)
        held = iter(rest[::2])
        marked = "\0".join([first, *rest[1::2]])
        return re.sub("\0", lambda _: next(held), _without(marked, class_word, ""))
    # No adjective: what joins things, the article of the next thing, and the concept's own word.
    own = f"|{whole_word(kept)}" if kept else ""
    adjective = rf"(?!(?:and|with|or|{_DETERMINERS})(?![\w-]){own})[\w-]+"
    phrase = rf"(?:(?<!\w){_DETERMINERS}\s+(?:{adjective}\s+){{0,4}}?)?{whole_word(class_word)}"
    after, before = r"\s*,?\s*(?<!\w)(?:and|with)\s+|\s*,\s*", r"\s*,?\s+(?:and|with)(?!\w)\s*|\s*,\s*"
    joined = f"(?:{after}){phrase}|{phrase}(?:{before})|{phrase}"
    return re.sub(joined, " ", text, flags=re.IGNORECASE)


def _tidy(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
