"""Which of what a detector found is meant (spec: D1, G1)."""

import pytest
import torch
from conceptloom.subjects.instances import (
    ALL,
    EMPTY,
    ERROR,
    WHOLE,
    Candidate,
    Detections,
    Wanted,
    choose,
    distinct,
    read_nouns,
)


def box(left, right, score, top=2, bottom=8):
    mask = torch.zeros(10, 20, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return Candidate(mask, score)


DOGS = [box(12, 16, 0.9), box(1, 4, 0.4), box(6, 10, 0.7)]
CAT = [box(17, 20, 0.8)]


def pick(text, *found, absent=ERROR):
    entries = read_nouns(text)
    masks, detections = choose(found, entries, absent, (10, 20))
    assert detections.entries == tuple(entries)
    return masks, list(detections.scores)


def test_nouns_are_read_from_commas_and_lines():
    assert read_nouns(" dog , red hat#2,\n cat # all,") == [Wanted("dog"), Wanted("red hat", 2), Wanted("cat", ALL)]
    assert [str(want) for want in read_nouns("dog, dog#2, dog#all")] == ["dog", "dog#2", "dog#all"]


@pytest.mark.parametrize("text", ["", " , \n", "dog#0", "dog#", "#2", "dog#two", "dog#-1", "dog#1.5"])
def test_what_is_no_list_of_nouns_gets_its_sentence(text):
    with pytest.raises(ValueError, match="nouns: "):
        read_nouns(text)


def test_the_best_the_numbered_and_all_are_chosen():
    masks, scores = pick("cat, dog, dog#1, dog#2", CAT, DOGS, DOGS, DOGS)
    assert scores == [0.8, 0.9, 0.4, 0.7]
    for mask, one in zip(masks, [CAT[0], *DOGS], strict=True):
        assert torch.equal(mask, one.mask)
    _, scores = pick("dog#1, dog#2, dog#3", DOGS, DOGS, DOGS)
    assert scores == [0.4, 0.7, 0.9]
    masks, scores = pick("dog#all, cat", DOGS, CAT)
    assert torch.equal(masks[0], DOGS[0].mask | DOGS[1].mask | DOGS[2].mask) and scores == [0.4, 0.8]


def test_one_thing_found_twice_counts_once():
    twice = [box(1, 11, 0.5), box(1, 12, 0.6), box(14, 18, 0.3), box(5, 5, 0.99)]
    assert [one.score for one in distinct(twice)] == [0.6, 0.3]
    masks, scores = pick("dog#2", twice)
    assert torch.equal(masks[0], twice[2].mask) and scores == [0.3]


@pytest.mark.parametrize("text", ["dog, cat", "dog, dog", "dog#3, dog", "dog, dog#3"])
def test_two_nouns_on_one_thing_are_refused(text):
    with pytest.raises(ValueError, match="nouns: expected a thing of its own for each"):
        pick(text, DOGS, [box(12, 16, 0.3)] if "cat" in text else DOGS)


def test_two_numbers_may_name_one_thing_and_part_of_a_thing_is_another():
    masks, _ = pick("dog#3, cat#1", DOGS, [box(12, 16, 0.3)])
    assert torch.equal(masks[0], masks[1])
    masks, _ = pick("dog, nose", DOGS, [box(12, 14, 0.3)])
    assert (masks[1] & ~masks[0]).sum() == 0


def test_what_is_absent_is_an_error_or_nothing_or_everything():
    for text, found, seen in (("fox", [], "nothing of the kind"), ("dog#4", DOGS, "3 of them")):
        with pytest.raises(ValueError, match=f"image: expected something that looks like '{text}', got .* {seen}"):
            pick(text, found)
    masks, scores = pick("fox, cat, dog#4", [], CAT, DOGS, absent=EMPTY)
    assert not masks[0].any() and not masks[2].any() and scores == [0, 0.8, 0]
    masks, scores = pick("fox, dog#4", [], DOGS, absent=WHOLE)
    assert masks.all() and scores == [0, 0]
    with pytest.raises(ValueError, match="absent: expected one of"):
        pick("cat", CAT, absent="skip")


def test_detections_are_lines_to_read():
    entries = tuple(read_nouns("dog#2, time: noon, cat#all"))
    assert str(Detections(entries, (0.125, 0.0, 1.0))).splitlines() == [
        "dog#2: 0.125",
        "time: noon: 0.000",
        "cat#all: 1.000",
    ]
