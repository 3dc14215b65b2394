"""Variants of a picture: what moves where, and what stays a hole."""

import pytest
import torch
import torch.nn.functional as F
from conceptloom.subjects.variants import Motion, make_variants

STILL = Motion(degrees=0, translate=0, smallest=1, largest=1, flip=False)


def disc(side=64, radius=12, x=32, y=32):
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return (((columns - x) ** 2 + (rows - y) ** 2) < radius**2).float()


def picture(side=64):
    return torch.rand(side, side, 3, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25


def center(mask):
    rows, columns = mask.nonzero().float().unbind(1)
    return float(columns.mean()), float(rows.mean())


def test_without_motion_the_subject_stays_as_it_is():
    image, mask = picture(), disc()
    made = make_variants(image, mask, 2, 64, 0, STILL, with_photo=False)
    torch.testing.assert_close(made.images, (image * mask[..., None]).expand(2, -1, -1, -1), rtol=0, atol=1e-5)
    assert torch.equal(made.masks, mask.expand(2, -1, -1)) and torch.equal(made.holes, 1 - made.masks)


def test_scale_turn_shift_and_mirror_are_within_their_ranges_and_reach_them():
    mask = disc(128, 20, 64, 64)
    image = mask[..., None].expand(-1, -1, 3)
    made = make_variants(image, mask, 300, 128, 5, Motion(degrees=0, translate=0.2, flip=False), with_photo=False)
    areas = made.masks.sum((1, 2)) / mask.sum()
    scales = areas.sqrt()
    assert 0.58 < float(scales.min()) < 0.65 and 0.95 < float(scales.max()) < 1.02
    centers = torch.tensor([center(one) for one in made.masks])
    shifts = (centers - 63.5).abs().amax(0) / 128
    assert (shifts < 0.21).all() and (shifts > 0.18).all()


def test_turning_and_mirroring():
    """A bar from the center to the right: its end tells the angle."""
    mask = torch.zeros(128, 128)
    mask[60:68, 64:120] = 1
    image = mask[..., None].expand(-1, -1, 3)
    made = make_variants(
        image, mask, 200, 128, 1, Motion(degrees=10, translate=0, smallest=1, largest=1), with_photo=False
    )
    centers = torch.tensor([center(one) for one in made.masks]) - 63.5
    mirrored = centers[:, 0] < 0
    assert 60 < int(mirrored.sum()) < 140
    angles = torch.rad2deg(torch.atan2(centers[:, 1], centers[:, 0].abs()))
    assert 8.5 < float(angles.max()) < 10.5 and -10.5 < float(angles.min()) < -8.5


def test_no_background_bleeds_into_the_subject():
    image, mask = torch.zeros(64, 64, 3), disc()
    image[..., 0], image[..., 2] = mask, 1 - mask  # red on blue
    made = make_variants(image, mask, 20, 64, 0, with_photo=False)
    inside = made.images[made.masks > 0]
    assert float(inside[:, 2].max()) < 0.02 and float(inside[:, 0].min()) > 0.5
    assert (made.images[made.holes > 0] == 0).all()


def test_each_variant_depends_on_the_seed_and_its_number_alone():
    image, mask = picture(), disc()
    few, many = (
        make_variants(image, mask, 2, 64, 7, with_photo=False),
        make_variants(image, mask, 5, 64, 7, with_photo=False),
    )
    assert torch.equal(few.images, many.images[:2]) and not torch.equal(many.images[0], many.images[1])
    assert not torch.equal(few.images, make_variants(image, mask, 2, 64, 8, with_photo=False).images)


def test_a_subject_at_the_edge_stays_in_every_variant():
    mask = disc(64, 4, 58, 8)
    made = make_variants(picture(), mask, 100, 64, 0, Motion(translate=0.5), with_photo=False)
    assert (made.masks.sum((1, 2)) > 0).all()


def test_the_middle_square_is_used():
    image, mask = picture(64).repeat(1, 2, 1), torch.zeros(64, 128)
    mask[:, 32:96] = disc()
    made = make_variants(image, mask, 1, 64, 0, STILL, with_photo=False)
    assert torch.equal(made.masks[0], disc())


@pytest.mark.parametrize(
    ("mask", "motion", "message"),
    [
        (torch.ones(32, 64), {}, "mask: expected the picture's size 64 x 64, got 64 x 32"),
        (torch.zeros(64, 64), {}, "mask: expected white on the subject in the middle square"),
        (disc(), {"smallest": 1.2}, "smallest: expected a scale from 0 to largest"),
        (disc(), {"smallest": 0.0}, "smallest: expected a scale from 0 to largest"),
    ],
)
def test_what_is_refused(mask, motion, message):
    with pytest.raises(ValueError, match=message):
        make_variants(picture(), mask, 1, 64, 0, Motion(**motion), with_photo=False)


def test_the_picture_itself_comes_first():
    image, mask = picture(64).repeat(1, 2, 1), torch.zeros(64, 128)
    mask[:, 32:96] = disc()
    whole, alone = make_variants(image, mask, 2, 32, 7), make_variants(image, mask, 2, 32, 7, with_photo=False)
    for one, other in zip(whole, alone, strict=True):
        assert len(one) == 3 and torch.equal(one[1:], other)
    square = F.interpolate(image[None, :, 32:96].movedim(-1, 1), (32, 32), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(whole.images[0], square.movedim(0, -1).clamp(0, 1), rtol=0, atol=1e-5)
    assert not whole.holes[0].any() and 0 < float(whole.masks[0].mean()) < 0.3
