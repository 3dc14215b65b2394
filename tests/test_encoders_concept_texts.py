"""The texts of a concept fusion."""

import pytest
from conceptloom.encoders.concept_texts import DROP_OTHERS, Name, check_text, concept_text

CAT, DOG, OWL = Name("cat", "<new1>"), Name("dog", "<new2>"), Name("owl", "<new3>")


@pytest.mark.parametrize(
    ("base", "own", "expected"),
    [
        ("a cat and a dog on the beach", CAT, "a <new1> cat and a dog on the beach"),
        ("a cat and a dog on the beach", DOG, "a cat and a <new2> dog on the beach"),
        ("an owl and a cat", OWL, "a <new3> owl and a cat"),
        ("a catalog with a Cat", CAT, "a catalog with a <new1> Cat"),
        ("a (cat:1.2), sleeping", CAT, "a (<new1> cat:1.2), sleeping"),
        ("a <new1> cat and a <new2> dog", DOG, "a cat and a <new2> dog"),
        ("photo of <new1> at night", Name("", "<new1>"), "photo of <new1> at night"),
        ("a cat and a dog", Name("cat", ""), "a cat and a dog"),
        ("embedding:cat of a cat", CAT, "embedding:cat of a <new1> cat"),
        ("a (embedding:my-cat:1.2) cat", CAT, "a (embedding:my-cat:1.2) <new1> cat"),
        ("一只狗在公园", Name("狗", "<new1>"), "一只 <new1> 狗在公园"),
        ("一只cat在公园", CAT, "一只 <new1> cat在公园"),
    ],
)
def test_the_placeholder_stands_before_the_class_word(base, own, expected):
    others = [
        name for name in (CAT, DOG, OWL) if name.class_word != own.class_word and name.placeholder != own.placeholder
    ]
    text = concept_text(base, own, others)
    assert text == expected
    check_text(text, own, others)


@pytest.mark.parametrize(
    ("base", "own", "others", "expected"),
    [
        ("a cat and a dog on the beach", CAT, [DOG], "a <new1> cat on the beach"),
        ("a cat and a dog on the beach", DOG, [CAT], "a <new2> dog on the beach"),
        ("a red striped cat, the big dog and an owl", DOG, [CAT, OWL], "the big <new2> dog"),
        ("a cat with a dog", CAT, [DOG], "a <new1> cat"),
        ("two cats and a dog", DOG, [CAT], "two cats and a <new2> dog"),
        ("a police dog and a dog", Name("police dog", "<new9>"), [DOG], "a <new9> police dog"),
        ("a cat and a cat", CAT, [Name("cat", "<new9>")], "a <new1> cat and a cat"),
        ("embedding:dog, a cat and a dog, embedding:old", CAT, [DOG], "embedding:dog, a <new1> cat , embedding:old"),
    ],
)
def test_the_others_can_be_left_out(base, own, others, expected):
    assert concept_text(base, own, others, DROP_OTHERS) == expected


@pytest.mark.parametrize(
    ("base", "own", "other", "expected"),
    [
        ("a cat on a dog", CAT, DOG, "a <new1> cat on"),
        ("a cat on a dog", DOG, CAT, "on a <new2> dog"),
        ("the cat looks at the dog", CAT, DOG, "the <new1> cat looks at"),
        ("a cat wearing a hat", CAT, Name("hat", "<h>"), "a <new1> cat wearing"),
        ("a cat and a one-eyed dog", CAT, DOG, "a <new1> cat"),
        ("a sunny garden behind a dog and a cat", CAT, DOG, "a sunny garden behind a <new1> cat"),
        ("a beach where a dog plays with a cat", CAT, DOG, "a beach where plays with a <new1> cat"),
        ("a cat and a dog on the beach", CAT, Name("beach", "<b>"), "a <new1> cat and a dog on"),
        ("a sks cat watching a ohwx dog", Name("sks cat", ""), Name("ohwx dog", ""), "a sks cat watching"),
    ],
)
def test_what_is_left_out_ends_at_the_next_thing(base, own, other, expected):
    assert concept_text(base, own, [other], DROP_OTHERS) == expected


def test_a_text_without_the_concept_is_refused():
    with pytest.raises(ValueError, match="prompt: expected 'cat' or <new1> in it, got 'a dog'"):
        concept_text("a dog", CAT, [])
    with pytest.raises(ValueError, match="got 'embedding:cat in a hat'"):
        concept_text("embedding:cat in a hat", CAT, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat", "expected <new1> exactly once in 'a cat', got it 0 times"),
        ("<new1> and <new1>", "got it 2 times"),
        ("a <new1> cat and a <new2> dog", "expected <new1> alone"),
    ],
)
def test_a_text_with_the_wrong_placeholders_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        check_text(text, CAT, [DOG])
