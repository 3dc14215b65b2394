"""The prompts of concept fusion: one conditioning per concept, with its own token and text encoder.

A placeholder is not a word of the tokenizer. For tokenization it is replaced by a word that is a single token. Each of
these tokens is then replaced by a row of the concept's token embedding, which ComfyUI's text encoders accept as a
token. The states are the same as those for a vocabulary with one more word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ...encoders.concept_texts import KEEP_OTHERS, Name, check_text, concept_text, names_class, plain_text
from ...encoders.concepts import Concept
from ...encoders.words import hide_names, show_names, whole_word
from ..advice import advise
from ..words import row_count, stand_in
from .concepts import check_tokens, join, with_text
from .fusion import PromptedConcept


@dataclass(frozen=True, eq=False)
class ConceptPrompts:
    """Concepts with their prompts.

    Attributes:
        positive, negative: conditionings of the plain prompts.
        concepts: in the order in which they were given.
        background: concept of the background; None leaves it to the base model.
        texts: the text of each concept's conditioning, the background's last.
    """

    positive: list
    negative: list
    concepts: tuple[PromptedConcept, ...]
    background: PromptedConcept | None
    texts: tuple[str, ...]


def encode_prompts(
    clip,
    base: str,
    negative: str,
    concepts: Sequence[Concept],
    background: Concept | None = None,
    texts: str = "",
    about_others: str = KEEP_OTHERS,
) -> ConceptPrompts:
    """Encodes the prompts of all concepts.

    Args:
        clip: the model's CLIP.
        base: prompt for the whole picture, with class words; placeholders in it are removed from the plain prompt.
        negative: the negative prompt.
        concepts: the concepts of a bank.
        background: concept for the background; its text is made from `base` too.
        texts: texts to use, one line per concept and one for the background; for an empty or missing line, the text is
            made from `base`.
        about_others: one of `concept_texts.OTHERS`.

    Raises:
        ValueError: the concepts do not fit together, a text lacks its concept's words or contains another's
            placeholder, or a token does not fit the CLIP.
    """
    bank = [*concepts, *([background] if background is not None else [])]
    join(bank)
    names = [Name(concept.class_word, concept.placeholder) for concept in bank]
    lines = [line.strip() for line in texts.rstrip().splitlines()]
    if len(lines) > len(bank):
        raise ValueError(f"texts: expected at most one line for each of the {len(bank)} concepts, got {len(lines)}")
    lines += [""] * (len(bank) - len(lines))
    for concept in bank:
        check_tokens(concept, clip)
    prompted, said = [], []
    for i, (concept, own) in enumerate(zip(bank, names, strict=True)):
        others = [name for j, name in enumerate(names) if j != i]
        text = lines[i] or concept_text(base, own, others, about_others)
        check_text(text, own, others)
        if not names_class(text, own):
            advise("Concept Prompts", f"{text!r} does not say what {concept.name} is ({own.class_word})")
        prompted.append(PromptedConcept(concept, encode_text(clip, text, concept)))
        said.append(text)
    plain = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (plain_text(base, names), negative)]
    behind = prompted.pop() if background is not None else None
    return ConceptPrompts(*plain, tuple(prompted), behind, tuple(said))


def encode_text(clip, text: str, concept: Concept) -> list:
    """Returns the conditioning of a text with a concept's placeholder, from the concept's own text encoder.

    Raises:
        ValueError: raised by `splice`, or a word with negative weight has two rows of states, for keys and for values.
            Only a model with NegPip tells these apart, the concept's own layers do not.
    """
    words = {concept.placeholder: concept.tokens} if concept.tokens else {}
    clip = with_text(concept, clip)
    tokens = splice(clip, text, words)
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    negative = any(weight < 0 for chunks in tokens.values() for chunk in chunks for _, weight in chunk)
    if negative and any(states.shape[1] != row_count(tokens) for states, _ in conditioning):
        raise ValueError(
            f"clip: expected one row of text states for each token where words have negative weights, as in {text!r}, "
            "got two, as CLIP NegPip gives them; put such words into the negative prompt"
        )
    return conditioning


def splice(clip, text: str, words: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, list]:
    """Tokenizes a text, with placeholders replaced by rows (n, d) for each text encoder.

    Args:
        clip: ComfyUI's CLIP.
        text: may contain each placeholder any number of times.
        words: the rows by text encoder, by placeholder; if empty, the tokens are the text's own.

    Raises:
        ValueError: a placeholder is part of a longer word.
    """
    (marked, names), places = hide_names(text), {}
    for placeholder, rows in words.items():
        name = next(iter(rows))
        foreign, word = stand_in(getattr(clip.tokenizer, f"clip_{name}"), marked)
        marked = re.sub(whole_word(placeholder), " ".join([word] * len(rows[name])), marked)
        places[foreign] = placeholder, word, rows
    tokens = clip.tokenize(show_names(marked, names))
    for encoder, chunks in tokens.items():
        reached = dict.fromkeys(places, 0)
        for chunk in chunks:
            for i, (token, *weight) in enumerate(chunk):
                if isinstance(token, int) and token in places:
                    rows = places[token][2][encoder]
                    chunk[i] = (rows[reached[token] % len(rows)], *weight)
                    reached[token] += 1
        for foreign, (placeholder, word, _) in places.items():
            if reached[foreign] != marked.count(word):
                raise ValueError(f"texts: expected spaces around {placeholder}, got {text!r}")
    return tokens
