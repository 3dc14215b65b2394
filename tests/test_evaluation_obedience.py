"""How well pictures obey representations, against values worked out by hand."""

import pytest
import torch
from conceptloom.compositions.instance_map import instance_map
from conceptloom.compositions.palette import palette_of_picture
from conceptloom.compositions.region import Region
from conceptloom.compositions.semantics import Semantics
from conceptloom.compositions.sketch import contours
from conceptloom.evaluation import obedience
from conceptloom.shapeland.judge import Reading
from conceptloom.shapeland.world import NOUNS, Mention

STAR, FISH = 1, 4


def reading(noun, mask):
    return Reading(noun, 1.0, 0, 1, 0, torch.zeros(14), torch.zeros(2), mask)


def square(top, left, side=16, size=64):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top : top + side, left : left + side] = True
    return mask


def flat(*color):
    return torch.tensor(color).expand(64, 64, 3)


def test_palette():
    red, blue = flat(1.0, 0, 0), flat(0, 0, 1.0)
    half = torch.cat([red[:32], blue[:32]])
    assert obedience.palette(red, palette_of_picture(red)) == pytest.approx(1)
    assert obedience.palette(red, palette_of_picture(blue)) < 0.05
    assert obedience.palette(half, palette_of_picture(red)) == pytest.approx(0.5, abs=0.05)


def test_sketch():
    picture = torch.ones(64, 64, 3)
    picture[20:40, 20:40] = 0
    own = contours(picture)
    assert obedience.sketch(picture, own) == 1
    assert obedience.sketch(picture, own.roll(2, 1)) == 1, "within the tolerance"
    assert obedience.sketch(picture, own.roll(20, 1)) < 0.6
    assert obedience.sketch(torch.ones(64, 64, 3), own) == 0
    assert obedience.sketch(torch.ones(64, 64, 3), torch.zeros(64, 64)) == 1


def test_instances_and_depth():
    target = instance_map(torch.stack([square(0, 0), square(40, 40)]).float(), [NOUNS[STAR], NOUNS[FISH]])
    right = [reading(STAR, square(0, 0)), reading(FISH, square(40, 40))]
    assert obedience.instances(right, target) == 1
    # Half of the first is beside it: 8 of 24 columns are shared; and the second is another thing.
    moved = [reading(STAR, square(0, 8)), reading(STAR, square(40, 40))]
    assert obedience.instances(moved, target) == pytest.approx((1 / 3 + 0) / 2)
    near = (square(0, 0) | square(40, 40)).float() / 3
    assert obedience.depth(right, near) == 1
    assert obedience.depth(moved[1:], near) == pytest.approx(0.5)
    assert obedience.depth([], near) == 0 and obedience.depth([], torch.zeros(64, 64)) == 1


def test_intensity_semantics_mask_and_caption():
    picture = torch.rand(64, 64, 3)
    gray = picture @ torch.tensor([0.299, 0.587, 0.114])
    assert obedience.intensity(picture, gray) == pytest.approx(1, abs=1e-5)
    assert obedience.intensity(picture, 1 - 0.5 * gray) == pytest.approx(-1, abs=1e-5)
    assert obedience.intensity(flat(0.5, 0.5, 0.5), gray) == 0
    a, b = Semantics(torch.tensor([1.0, 0])), Semantics(torch.tensor([0.6, 0.8]))
    assert obedience.semantics(a, b) == pytest.approx(0.6)
    region = Region(picture, square(0, 0, 32).float())
    changed = torch.where(square(0, 0, 32)[..., None], 1 - picture, picture)
    assert obedience.mask(changed, region) == 1
    assert obedience.mask(flat(0.0, 0, 0), Region(flat(0.25, 0.25, 0.25), region.mask)) == pytest.approx(0.75)
    readings = [reading(STAR, square(0, 0))]
    assert obedience.caption(readings, [Mention(STAR)]) == 1
    assert obedience.caption(readings, [Mention(STAR), Mention(FISH)]) == 0


def test_variety_is_one_minus_the_mean_cosine_of_pairs():
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    looks = [Semantics(vector) for vector in vectors]
    # The three pairs have the cosines 0, -1 and 0.
    assert obedience.variety(looks) == pytest.approx(1 + 1 / 3, abs=1e-6)
    assert obedience.variety(looks[:1]) == 0 and obedience.variety([looks[0]] * 3) == pytest.approx(0, abs=1e-6)
