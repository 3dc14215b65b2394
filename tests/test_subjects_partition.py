"""Concept Weaver's partition: the assembly rule against a naive reading of it, its sum, and what is said of bad input
(spec: D2, D3, G1, G4 masks, oracle M1)."""

import random
import time

import pytest
import torch
from conceptloom.subjects.partition import (
    LATER_IN_FRONT,
    OVERLAPS,
    SMALLER_IN_FRONT,
    SURER_IN_FRONT,
    assemble,
    dilate,
    divide,
    layer_masks,
    picture,
    soften,
)


def naive(masks, radius, overlap, scores):
    """The rule, pixel by pixel, in float64."""
    count, height, width = masks.shape
    areas = masks.sum((1, 2)).tolist()
    measure = {SMALLER_IN_FRONT: [-a for a in areas], SURER_IN_FRONT: scores, LATER_IN_FRONT: [0] * count}[overlap]
    points = [m.nonzero().tolist() for m in masks]
    out = torch.zeros(count + 1, height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            near = [i for i in range(count) if any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in points[i])]
            claims = near if len(near) == 1 else [i for i in near if masks[i, y, x]]
            out[max(claims, key=lambda i: (measure[i], i)) if claims else count, y, x] = 1
    return out


def random_masks(rng, count, height, width):
    """Rectangles and specks, now and then nothing or the full frame."""
    masks = torch.zeros(count, height, width, dtype=torch.bool)
    for mask in masks:
        kind = rng.random()
        if kind < 0.1:
            continue
        if kind < 0.2:
            mask[:] = True
            continue
        for _ in range(rng.randint(1, 3)):
            y, x = rng.randrange(height), rng.randrange(width)
            mask[y : y + rng.randint(1, max(1, height // 2)), x : x + rng.randint(1, width // 2)] = True
    return masks


def test_random_masks_are_divided_by_the_rule():
    """Sum exactly 1, zeros and ones alone, and the core of what nothing reaches stays whole; radius 0 keeps what does
    not overlap."""
    rng = random.Random(0)
    for _ in range(60):
        count, radius = rng.randint(1, 5), rng.choice([0, 1, 2, 3, 7, 40])
        masks = random_masks(rng, count, rng.randint(1, 17), rng.randint(2, 19))
        scores = [rng.choice([0.2, 0.5, 0.9]) for _ in masks]
        for overlap in OVERLAPS:
            partition = divide(masks, radius, overlap, scores)
            assert torch.equal(partition.double(), naive(masks, radius, overlap, scores))
        assert (partition.sum(0) == 1).all() and ((partition == 0) | (partition == 1)).all()
        for i, mask in enumerate(masks):
            others = torch.cat([masks[:i], masks[i + 1 :]]).any(0)
            assert partition[i][mask & ~others].all()
            if radius == 0:
                assert torch.equal(partition[i][~others].bool(), mask[~others])


def block(*boxes, size=(40, 40)):
    """Masks of one rectangle each: top, bottom, left, right."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (top, bottom, left, right) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def test_disjoint_masks_grow_by_a_disk():
    partition = divide(block((10, 11, 10, 11), (30, 31, 30, 31)), 5)
    ys, xs = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    assert torch.equal(partition[0].bool(), (ys - 10) ** 2 + (xs - 10) ** 2 <= 25)
    assert partition[2].sum() == 1600 - 2 * partition[0].sum()


@pytest.mark.parametrize("radius", [60, 131])
def test_a_large_disk_is_as_large_as_it_should_be_within_its_cells(radius):
    masks = block((150, 151, 200, 201), (0, 2, 300, 303), size=(301, 407))
    ys, xs = torch.meshgrid(torch.arange(301), torch.arange(407), indexing="ij")
    for mask, grown in zip(masks, dilate(masks, radius), strict=True):
        distance = torch.stack([(ys - y) ** 2 + (xs - x) ** 2 for y, x in mask.nonzero().tolist()]).amin(0).sqrt()
        off = 1.5 * (radius // 24)
        assert grown[distance <= radius - off].all() and not grown[distance > radius + off].any()


def test_two_concepts_at_4096_pixels_stay_within_their_budget():
    """A second of the wall clock on two cores; processor time is counted, for other processes do not lengthen it, and
    with room for slow machines: what takes time in proportion to the width of the blend takes a minute here."""
    ys, xs = torch.meshgrid(*[torch.arange(4096, dtype=torch.float32)] * 2, indexing="ij")
    masks = [((xs - at).square() + (ys - 2000).square() < 900**2).float() for at in (1300, 2700)]
    began = time.process_time()
    partition = assemble(masks, 0.03, 0.03)
    seen = picture(partition)
    assert time.process_time() - began < 6
    assert partition.shape == (3, 4096, 4096) and max(seen.shape) <= 512
    torch.testing.assert_close(partition[:, ::64].sum(0), torch.ones(64, 4096), atol=1e-5, rtol=0)
    # Straight through the first disk, whose left edge has grown by 123 pixels and is blended over 123 to either side.
    row = partition[0, 2000]
    assert row[: 400 - 256 - 12].max() == 0 and row[400 + 12 : 1600].min() > 0.999
    assert (row[150:400].diff() >= -1e-6).all() and abs(float(row[400 - 123]) - 0.5) < 0.1


def test_blending_in_cells_is_near_that_by_pixels():
    hard = divide(block((40, 300, 30, 200), (100, 280, 230, 390), size=(400, 420)), 10)
    expected = hard.double()
    for half in (24, 24):
        for dim in (1, 2):
            padded = torch.cat([torch.zeros_like(expected.narrow(dim, 0, 1)), expected.cumsum(dim)], dim)
            length = expected.shape[dim]
            ends = torch.arange(length)
            low, high = (ends - half).clamp(min=0), (ends + half + 1).clamp(max=length)
            shape = [1, 1, 1]
            shape[dim] = length
            expected = (padded.index_select(dim, high) - padded.index_select(dim, low)) / (high - low).view(shape)
    assert (soften(hard, 48).double() - expected).abs().max() < 0.04


def test_where_halos_meet_neither_takes_the_other_s_place():
    left, right = block((10, 30, 5, 18), (10, 30, 22, 35))
    partition = divide(torch.stack([left, right]), 6)
    assert partition[0][left].all() and partition[1][right].all()
    assert partition[2][20, 18:22].all() and not partition[2][20, :5].all()


def test_a_contained_object_lies_in_front_of_what_holds_it():
    whole, part = block((0, 40, 0, 20), (10, 20, 5, 15))
    for order in ([whole, part], [part, whole]):
        partition = divide(torch.stack(order), 2)
        inner = 1 if order[0] is whole else 0
        assert torch.equal(partition[inner].bool(), part)
        assert torch.equal(partition[1 - inner].bool(), (dilate(whole[None], 2)[0]) & ~part)


def test_three_that_meet_go_to_the_front_one_by_each_rule():
    masks = block((0, 20, 0, 20), (10, 30, 10, 30), (15, 19, 15, 19))
    owner = {rule: divide(masks, 3, rule, [0.5, 0.9, 0.1])[:, 17, 17].argmax().item() for rule in OVERLAPS}
    assert owner == {SMALLER_IN_FRONT: 2, SURER_IN_FRONT: 1, LATER_IN_FRONT: 2}
    assert divide(masks[[2, 0, 1]], 3, LATER_IN_FRONT)[:, 17, 17].argmax() == 2


def test_two_masks_of_one_thing_are_refused():
    one, other, inside = block((5, 35, 5, 35), (6, 35, 5, 35), (5, 35, 5, 27)).float()
    with pytest.raises(ValueError, match="mask 3: expected a place of its own, got that of mask 1"):
        assemble([one, torch.zeros_like(one), other])
    assert (assemble([one, inside, torch.zeros_like(one)]).sum(0) == 1).all()


def test_an_empty_mask_leaves_its_concept_out_and_a_full_one_leaves_no_background():
    empty, full, some = torch.zeros(20, 30), torch.ones(20, 30), torch.zeros(20, 30)
    some[5:9, 5:9] = 1
    partition = assemble([empty, some])
    assert not partition[0].any() and torch.equal(partition[1:].sum(0), torch.ones(20, 30))
    partition = assemble([full, some])
    assert not partition[2].any() and torch.equal(partition[1], some)
    assert torch.equal(divide(torch.stack([empty]).bool(), 3), torch.stack([empty, full]))


def test_feathering_keeps_the_sum_and_blends_only_near_borders():
    masks = block((0, 40, 0, 20), (10, 30, 25, 40))
    hard = divide(masks, 2)
    soft = soften(hard, 5)
    torch.testing.assert_close(soft.sum(0), torch.ones(40, 40), atol=1e-6, rtol=0)
    assert soft.min() >= 0 and ((soft > 0) & (soft < 1)).any()
    for before, after in zip(hard.bool(), soft, strict=True):
        far = ~dilate(before[None], 8)[0]
        assert not after[far].any()
        assert torch.equal(after[0, :12], before[0, :12].float())
    edge = soft[0, 0, 10:34]
    assert (edge.diff() <= 1e-6).all()
    assert torch.equal(soften(hard, 0), hard)


def test_feathering_is_two_moving_averages_over_the_pixels_there_are():
    hard = divide(block((0, 1, 0, 2), (0, 1, 5, 6), size=(1, 14)), 1)
    expected = hard[:, 0].double()
    for half in (2, 3):
        windows = [expected[:, max(0, x - half) : x + half + 1].mean(1) for x in range(14)]
        expected = torch.stack(windows, 1)
    torch.testing.assert_close(soften(hard, 5)[:, 0].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(64, 48), (33, 25), (25, 100)])
@pytest.mark.parametrize("grid", [(33, 25), (9, 7), (5, 4), (1, 1), (40, 31), (8, 6)])
def test_layers_of_any_size_get_means_that_add_up_to_one(size, grid):
    partition = divide(random_masks(random.Random(1), 4, *size), 2)
    for source in (partition, soften(partition, 4)):
        masks = layer_masks(source, grid)
        assert masks.shape == (5, *grid) and masks.min() >= 0
        torch.testing.assert_close(masks.sum(0), torch.ones(grid), atol=1e-6, rtol=0)
    if size[0] % grid[0] == 0 and size[1] % grid[1] == 0:
        down, across = size[0] // grid[0], size[1] // grid[1]
        means = partition.double().unfold(1, down, down).unfold(2, across, across).mean((-1, -2))
        torch.testing.assert_close(layer_masks(partition, grid).double(), means, atol=1e-6, rtol=0)


def test_masks_of_several_resolutions_show_the_same_scene():
    small, large = torch.zeros(8, 12), torch.zeros(32, 48)
    small[2:4, 3:6] = 1
    large[20:28, 30:40] = 1
    partition = assemble([small, large, torch.zeros(64, 64)], dilation=0)
    assert partition.shape == (4, 32, 48)
    assert partition[0, 8:16, 12:24].all() and partition[0].sum() == 8 * 12
    assert torch.equal(partition[1], large) and not partition[2].any()


def test_dilation_and_feather_are_shares_of_the_shorter_side():
    mask = torch.zeros(100, 200)
    mask[40:60, 80:120] = 1
    assert torch.equal(assemble([mask])[0].bool(), dilate(mask[None].bool(), 3)[0])
    feathered = assemble([mask], dilation=0.05, feather=0.1)
    assert torch.equal(feathered, soften(divide(mask[None].bool(), 5), 10))


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(masks=[]), "masks: expected at least one"),
        (dict(masks=[torch.zeros(4, 4)] * 2), "masks: expected white in at least one, got 2 black all over"),
        (dict(masks=[torch.full((4, 4), 0.4)]), "masks: expected white in at least one, got 1 black all over"),
        (
            dict(masks=[torch.ones(4, 4), torch.ones(4, 8)]),
            r"mask 1: expected the shape of the largest mask \(8x4\), got 4x4",
        ),
        (dict(masks=[torch.ones(4, 4), torch.full((4, 4), torch.nan)]), "mask 2: expected finite values"),
        (dict(masks=[torch.ones(2, 5, 6)]), "mask 1: expected one mask"),
        (dict(masks=[torch.ones(4, 4)], overlap="none"), "overlap: expected one of smaller in front"),
        (dict(masks=[torch.ones(4, 4)], overlap=SURER_IN_FRONT), "got none for 1 masks"),
        (dict(masks=[torch.ones(4, 4)], overlap=SURER_IN_FRONT, scores=[1.0, 1.0]), "got 2 for 1 masks"),
    ],
)
def test_bad_input_gets_its_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        assemble(**arguments)


def test_the_preview_shows_each_concept_in_a_color_of_its_own():
    partition = divide(block(*((0, 10, 8 * i, 8 * i + 8) for i in range(5))), 0)
    seen = picture(partition)
    assert seen.shape == (40, 40, 3) and seen.min() >= 0 and seen.max() <= 1
    colors = torch.stack([seen[5, 8 * i + 4] for i in range(5)] + [seen[30, 30]])
    distances = torch.cdist(colors, colors) + torch.eye(6)
    assert distances.min() > 0.25
    over = picture(partition, torch.rand(80, 80, 3))
    assert over.shape == (40, 40, 3) and over.min() >= 0 and over.max() <= 1
    with pytest.raises(ValueError, match=r"image: expected the shape of the masks \(40x40\), got 80x40"):
        picture(partition, torch.rand(40, 80, 3))
