"""The judge's own arithmetic, on truth; how well its weights read is measured by their training."""

import numpy as np
import pytest
import torch
from conceptloom.shapeland import report, world
from conceptloom.shapeland.judge import CROP, EMBEDDING, Reading, centers_of, crop_thing, group_votes
from conceptloom.shapeland.score import assign, score_picture, summarize


def reading(noun, color=0, second=1, embedding=0, pixels=100):
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask.view(-1)[:pixels] = True
    return Reading(noun, 0.9, color, second, 0, torch.zeros(14), torch.eye(EMBEDDING)[embedding], mask)


def true_votes(picture):
    """What a perfect segmenter says of a picture: where things are, and the offset of each pixel to its center."""
    ys, xs = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    masks = torch.from_numpy(picture.masks) > 0.5
    offsets = torch.zeros(2, 64, 64)
    for thing, mask in zip(picture.scene.things, masks, strict=True):
        offsets[0][mask], offsets[1][mask] = (thing.x - xs)[mask], (thing.y - ys)[mask]
    return masks, offsets


def test_votes_of_a_perfect_segmenter_give_the_true_things():
    for seed in range(60):
        picture = world.render(world.random_scene(np.random.default_rng(seed)))
        masks, offsets = true_votes(picture)
        masks = masks[masks.sum((1, 2)) >= 40]
        found = group_votes(masks.any(0), offsets)
        assert len(found) == len(masks)
        for mask in masks:
            assert any(torch.equal(mask, other) for other in found)


def test_stray_pixels_are_no_thing():
    foreground = torch.zeros(64, 64, dtype=torch.bool)
    foreground[5, 3:20] = True
    assert group_votes(foreground, torch.zeros(2, 64, 64)) == []


def test_crop_shows_the_thing_at_its_own_scale_and_nothing_else():
    picture = torch.rand(1, 3, 64, 64)
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 10:30, 2:12] = True
    crop = crop_thing(picture, mask, torch.tensor([[5.0, 20.0]]))
    assert crop.shape == (1, 4, CROP, CROP)
    # The thing's center lands in the middle of the window; parts beyond the picture's edge are blank.
    half = CROP // 2
    assert torch.equal(crop[0, :3, half, half], picture[0, :, 20, 5])
    assert crop[0, 3].sum() == mask.sum()
    assert crop[0, :, :, : half - 5].abs().sum() == 0
    assert crop[0, :3][:, crop[0, 3] == 0].abs().sum() == 0


def test_centers_are_centroids():
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[0, 10:21, 30:33] = True
    assert torch.equal(centers_of(mask), torch.tensor([[31.0, 15.0]]))


def test_scores_count_nouns_colors_patterns_and_twins():
    red_star, pair, plain = world.Mention(1, color=0), world.Mention(0, count=2, color=3), world.Mention(4)
    right = score_picture([red_star, plain], [reading(4, color=5), reading(1, color=0)])
    assert (right.nouns_right, right.described, right.described_right) == (True, 1, 1)
    assert not score_picture([red_star], [reading(1), reading(2)]).nouns_right
    assert not score_picture([pair], [reading(0)]).nouns_right
    twins = score_picture([pair], [reading(0, color=3, embedding=2), reading(0, color=4, embedding=2)])
    assert (twins.nouns_right, twins.described, twins.described_right, twins.twins) == (True, 2, 1, 1.0)
    missing = score_picture([red_star], [])
    assert (missing.described, missing.described_right, missing.twins) == (1, 0, None)
    said_both = world.Mention(1, color=0, second=2)
    assert score_picture([said_both], [reading(1, color=0, second=1)]).described_right == 0
    striped, dotted = world.Mention(1, pattern=0), world.Mention(0, count=2, pattern=1)
    patterns = score_picture([striped, dotted], [reading(1), reading(0), reading(0)])
    assert (patterns.things, patterns.patterned, patterns.patterned_right) == (3, 3, 1)
    total = summarize([right, twins, missing, patterns])
    assert total == {
        "nouns": pytest.approx(3 / 4),
        "nouns_1": 0.0,
        "nouns_2": 1.0,
        "nouns_3": 1.0,
        "colors": pytest.approx(2 / 4),
        "patterns": pytest.approx(1 / 3),
        "twins": 1.0,
    }
    assert all(np.isnan(v) for v in summarize([]).values())


def test_a_mention_takes_no_more_things_than_it_names():
    things = [reading(1, pixels=50), reading(1, pixels=40)]
    assert assign([world.Mention(1)], things) == [[things[0]]]


def test_report_says_what_is_there_and_how_alike():
    star, other = reading(1, embedding=3), reading(1, embedding=4)
    seen = "seen: red and orange striped star, 90% sure"
    assert report.describe([[star]]) == seen
    assert report.describe([[other, star], []], [[star], [reading(0)]], [other]).splitlines() == [
        "picture 1: star: likeness 1.00 of 1 (plain prompt 0.00)",
        "picture 1: ball: not seen (plain prompt not seen)",
        f"picture 1: {seen}",
        f"picture 1: {seen}",
        "picture 2: star: not seen (plain prompt 0.00)",
        "picture 2: ball: not seen (plain prompt not seen)",
        "picture 2: nothing is seen",
    ]
    with pytest.raises(ValueError, match="references: expected pictures with a thing of Shapeland"):
        report.describe([[star]], [[star], []])


def test_union_mask_covers_the_chosen_noun():
    things = [[reading(1, pixels=64), reading(2, pixels=128)]]
    assert report.union_mask(things, "star", (64, 64)).sum() == 64
    assert report.union_mask(things, "any", (64, 64)).sum() == 128
    assert report.union_mask(things, "fish", (64, 64)).sum() == 0
