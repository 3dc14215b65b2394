"""Masks, subjects and collage: shapes, sampling, and what is said about bad input (spec: oracle 11, table 3.2)."""

import pytest
import torch
from conceptloom.subjects.collage import Box, paste, row_of_boxes
from conceptloom.subjects.masks import as_mask, binarize, bounding_box, feather, token_mask
from conceptloom.subjects.subject import Subject

PICTURE = torch.rand(48, 32, 3)


def test_nearest_sampling_takes_the_top_left_of_each_cell():
    checkers = (torch.arange(128)[:, None] // 2 + torch.arange(128) // 2) % 2 == 0
    for stride in (2, 4):
        side = 128 // stride
        assert torch.equal(token_mask(checkers, (side, side)), checkers[::stride, ::stride].flatten())


def test_grids_need_not_be_square_or_divide_the_mask():
    mask = torch.zeros(96, 160, dtype=torch.bool)
    mask[:48, 80:] = True
    tokens = token_mask(mask, (24, 40)).view(24, 40)
    assert tokens[:12, 20:].all() and tokens.sum() == 12 * 20
    assert token_mask(mask, (9, 6)).shape == (54,)


def test_a_speck_survives_coarse_layers_and_an_empty_mask_stays_empty():
    speck = torch.zeros(512, 512, dtype=torch.bool)
    speck[101:104, 205:208] = True
    for side in (64, 32, 8):
        assert token_mask(speck, (side, side)).sum() == 1
    assert token_mask(torch.zeros(64, 64, dtype=torch.bool), (8, 8)).sum() == 0


@pytest.mark.parametrize("shape", [(8, 6), (1, 8, 6), (8, 6, 3), (1, 8, 6, 3), (1, 8, 6, 4), (8, 6, 1)])
def test_masks_come_in_many_shapes(shape):
    assert as_mask(torch.ones(shape)).shape == (8, 6)


@pytest.mark.parametrize("shape", [(2, 8, 6), (2, 8, 6, 3), (8,), (0, 6)])
def test_several_or_no_masks_are_refused(shape):
    with pytest.raises(ValueError, match="mask: expected one mask"):
        as_mask(torch.ones(shape))


def test_thresholds():
    soft = torch.tensor([[0.0, 0.4, 254 / 255]])
    assert binarize(soft, 0.5).tolist() == [[False, False, True]]
    assert binarize(soft, 0.0).tolist() == [[False, True, True]]
    assert binarize(None, 0.5, (2, 3)).all()


def test_feathering_stays_inside():
    mask = torch.zeros(40, 40)
    mask[10:30, 10:30] = 1
    soft = feather(mask, 6)
    assert (soft <= mask).all() and soft[20, 20] > 0.999 and 0 <= soft[10, 20] < 0.5
    assert torch.equal(feather(mask, 0), mask)


def test_subject_fills_in_its_prompt_and_drops_alpha():
    assert Subject(PICTURE, " dog ").prompt == "a dog"
    assert Subject(PICTURE, "owl", prompt="an owl on a branch").prompt == "an owl on a branch"
    assert Subject(torch.rand(8, 8, 4), "dog").image.shape == (8, 8, 3)


def test_encodings_are_added_to_a_new_subject():
    subject = Subject(PICTURE, "dog")
    encoded = subject.with_encoding("clip", 1)
    assert dict(encoded.encodings) == {"clip": 1} and not subject.encodings
    assert encoded.image is subject.image or torch.equal(encoded.image, subject.image)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image": torch.rand(2, 8, 8, 3)}, "image: expected one color picture .*, got \\(2, 8, 8, 3\\)"),
        ({"image": torch.rand(8, 8, 1)}, "image: expected one color picture"),
        ({"image": torch.full((8, 8, 3), float("nan"))}, "image: expected finite values"),
        ({"noun": "  "}, "noun: expected a word"),
        ({"weight": -1.0}, "weight: expected a number from 0 .* got -1"),
        ({"weight": 11.0}, "weight: expected a number from 0 .* got 11"),
        ({"weight": float("nan")}, "weight: expected a number from 0"),
        ({"mask": torch.ones(2, 48, 32)}, "mask: expected one mask"),
        ({"mask": torch.ones(48, 48)}, "mask: expected the shape of the picture \\(32x48\\), got 48x48"),
        ({"mask": torch.full((48, 32), float("inf"))}, "mask: expected finite values"),
        ({"target_mask": torch.ones(3, 8, 8)}, "target_mask: expected one mask"),
    ],
)
def test_bad_subjects_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Subject(**{"image": PICTURE, "noun": "dog", **changes})
    assert "\n" not in str(caught.value)


def test_a_mask_of_another_size_but_equal_aspect_passes_and_an_empty_one_does_not():
    Subject(PICTURE, "dog", mask=torch.ones(24, 16))
    with pytest.raises(ValueError, match="mask: expected white on the subject, got an empty mask"):
        Subject(PICTURE, "dog", mask=torch.zeros(64, 64))


def test_paste_puts_the_cutout_into_its_box():
    image = torch.zeros(20, 20, 3)
    image[5:15, 5:15] = torch.tensor([1.0, 0.0, 0.0])
    mask = torch.zeros(20, 20)
    mask[5:15, 5:15] = 1
    picture, seen = paste(torch.zeros(40, 60, 3), [(image, mask)], [Box(10, 4, 20, 20)])
    assert bounding_box(seen[0] > 0.5) == (10, 4, 20, 20)
    assert torch.equal(picture[..., 0], seen[0])


def test_later_pastes_hide_earlier_ones():
    red, blue = torch.zeros(8, 8, 3), torch.zeros(8, 8, 3)
    red[..., 0], blue[..., 2] = 1, 1
    picture, seen = paste(torch.zeros(10, 20, 3), [(red, None), (blue, None)], [Box(0, 0, 10, 10), Box(5, 0, 10, 10)])
    assert bounding_box(seen[0] > 0.5) == (0, 0, 5, 10) and bounding_box(seen[1] > 0.5) == (5, 0, 10, 10)
    assert picture[5, 7].tolist() == [0, 0, 1]


def test_scale_flip_and_the_edges_of_the_context():
    image = torch.zeros(8, 8, 3)
    image[:, :4] = 1
    picture, seen = paste(torch.zeros(16, 16, 3), [(image, None)], [Box(-4, 0, 16, 16)], scale=0.5, flip=True)
    assert bounding_box(seen[0] > 0.5) == (0, 4, 8, 8)
    assert picture[8, 6, 0] == 1 and picture[8, 1, 0] == 0
    _, outside = paste(torch.zeros(16, 16, 3), [(image, None)], [Box(100, 100, 8, 8)])
    assert not outside.any()


def test_collage_refuses_empty_masks_boxes_and_wrong_counts():
    context, image = torch.zeros(8, 8, 3), torch.zeros(8, 8, 3)
    with pytest.raises(ValueError, match="at least one pixel"):
        paste(context, [(image, torch.zeros(8, 8))], [Box(0, 0, 4, 4)])
    with pytest.raises(ValueError, match="positive size"):
        paste(context, [(image, None)], [Box(0, 0, 0, 4)])
    with pytest.raises(ValueError, match="1 for 2 subjects"):
        paste(context, [(image, None)] * 2, [Box(0, 0, 4, 4)])


def test_unplaced_subjects_stand_side_by_side():
    assert row_of_boxes(2, 10, 30) == [Box(0, 0, 15, 10), Box(15, 0, 15, 10)]
