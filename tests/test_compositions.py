"""What a picture is taken apart into and what is done with the parts: published numbers, round trips, reductions."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conceptloom.compositions import composition as compositions
from conceptloom.compositions import files, sketch
from conceptloom.compositions.color import lab_to_srgb, srgb_to_lab
from conceptloom.compositions.composition import (
    CAPTION,
    DEPTH,
    INSTANCES,
    INTENSITY,
    LOCAL,
    MASK,
    NAMES,
    PALETTE,
    SEMANTICS,
    SKETCH,
    Caption,
    Composition,
    Part,
    align,
    interpolate,
    merge,
    pick,
)
from conceptloom.compositions.decompose import decompose, decompose_subject, subject_of
from conceptloom.compositions.depth import normalized_depth
from conceptloom.compositions.instance_map import ADE20K, CODINGS, GRAYS, OWN, ade_class, coded, instance_map
from conceptloom.compositions.intensity import WEIGHTS, intensity
from conceptloom.compositions.luma import MODES, luma_merge
from conceptloom.compositions.palette import (
    LAYOUTS,
    TABLES,
    Palette,
    areas,
    palette_of_colors,
    palette_of_picture,
    palette_picture,
    read_colors,
    table_colors,
)
from conceptloom.compositions.region import Region, grown
from conceptloom.compositions.semantics import Semantics, between, slerp
from conceptloom.compositions.sheet import contact_sheet
from conceptloom.subjects.pictures import resized_strokes
from conceptloom.subjects.subject import Subject


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def flat(*color, side=8):
    return torch.tensor(color, dtype=torch.float64).expand(side, side, 3)


class TestColor:
    def test_known_colors(self):
        given = torch.tensor([[1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0]], dtype=torch.float64)
        expected = [[100, -0.0025, 0.0047], [53.3890, -0.0015, 0.0028], [53.2406, 80.0923, 67.2028]]
        torch.testing.assert_close(srgb_to_lab(given), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)

    def test_back_and_forth(self):
        colors = noise(1000, 3).double()
        torch.testing.assert_close(lab_to_srgb(srgb_to_lab(colors)), colors, rtol=0, atol=1e-12)


class TestPalette:
    @pytest.mark.parametrize(
        ("table", "color", "largest", "share", "total"),
        [
            # Computed for the published tables apart from this code.
            ("156 colors", (1, 0, 0), 5, 0.5982, 0.9371),
            ("156 colors", (1, 1, 1), 143, 0.2604, 0.9720),
            ("156 colors", (0, 0, 0), 155, 0.4893, 0.8958),
            ("156 colors", (0.5, 0.5, 0.5), 149, 0.2643, 1.1060),
            ("156 colors", (0, 1, 0), 57, 0.4325, 0.9294),
            ("156 colors", (0, 0, 1), 96, 0.4158, 0.8745),
            ("156 colors", (0.87, 0.68, 0.57), 23, 0.4346, 1.0191),
            ("180 colors", (1, 0, 0), 5, 0.5453, 0.9177),
            ("180 colors", (1, 1, 1), 165, 0.2426, 0.9671),
            ("180 colors", (0, 0, 0), 179, 0.4347, 0.8787),
            ("180 colors", (0.5, 0.5, 0.5), 172, 0.2192, 1.0963),
            ("180 colors", (0, 1, 0), 65, 0.4086, 0.9143),
            ("180 colors", (0, 0, 1), 110, 0.3833, 0.8522),
        ],
    )
    def test_flat_colors(self, table, color, largest, share, total):
        found = palette_of_picture(flat(*color), None, table).histogram
        assert int(found.argmax()) == largest
        assert float(found.max()) == pytest.approx(share, abs=2e-4)
        assert float(found.sum()) == pytest.approx(total, abs=2e-4)

    @pytest.mark.parametrize(("table", "size"), [("156 colors", 156), ("180 colors", 180)])
    def test_every_entry_is_its_own_nearest(self, table, size):
        colors = table_colors(table)
        assert len(torch.unique(colors, dim=0)) == len(colors) == size
        for i in range(0, size, 7):
            strict = palette_of_colors(colors[i : i + 1], torch.ones(1), table, sigma=0).histogram
            assert int(strict.argmax()) == i and float(strict.sum()) == 1

    def test_rows_of_the_table(self):
        colors = table_colors("156 colors")
        for i, expected in {0: (1, 0.8333, 0.8333), 12: (0.52, 0.312, 0.312), 13: (1, 0.91663, 0.83333)}.items():
            torch.testing.assert_close(colors[i], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)
        assert colors[143].tolist() == [1, 1, 1] and colors[155].tolist() == [0, 0, 0]

    def test_values_that_are_not_finite(self):
        with pytest.raises(ValueError, match="image: expected finite values, got NaN or infinity"):
            palette_of_picture(torch.full((4, 4, 3), float("nan")))

    def test_a_palette_does_not_depend_on_places(self):
        image = noise(40, 30, 3)
        shuffled = image.flatten(0, 1)[torch.randperm(1200)].view(40, 30, 3)
        own = palette_of_picture(image).histogram
        for other in (shuffled, image.flip(0), image.movedim(0, 1)):
            torch.testing.assert_close(palette_of_picture(other).histogram, own, rtol=0, atol=1e-9)
        half = torch.cat([flat(1, 0, 0), flat(1, 1, 1)])
        strict = palette_of_picture(half, sigma=0).histogram
        assert {int(i): float(strict[i]) for i in strict.nonzero()} == {5: 0.5, 143: 0.5}
        both = [palette_of_picture(flat(*color)).histogram for color in ((1, 0, 0), (1, 1, 1))]
        torch.testing.assert_close(palette_of_picture(half).histogram, sum(both) / 2, rtol=0, atol=1e-5)

    def test_masks_and_alpha_choose_the_pixels(self):
        image = torch.cat([flat(1, 0, 0), flat(0, 0, 1)])
        mask = torch.cat([torch.ones(8, 8), torch.zeros(8, 8)])
        red, blue = palette_of_picture(flat(1, 0, 0)), palette_of_picture(flat(0, 0, 1))
        assert palette_of_picture(image, mask).distance(red) == 0
        assert palette_of_picture(torch.cat([image, 1 - mask[..., None].double()], -1)).distance(blue) == 0
        large = torch.zeros(600, 600, 3)
        large[300, 301] = torch.tensor([1.0, 0, 0])
        small = torch.zeros(600, 600)
        small[300, 301] = 1
        assert palette_of_picture(large, small).distance(red) < 1e-6, "a region between the pixels that are read"
        with pytest.raises(ValueError, match="mask: expected white on some pixels that are not transparent, got none"):
            palette_of_picture(image, torch.zeros(16, 8))
        with pytest.raises(ValueError, match=r"mask: expected the shape of the picture \(8x16\), got 8x8"):
            palette_of_picture(image, torch.ones(8, 8))
        assert palette_of_picture(image, F.interpolate(mask[None, None], scale_factor=4)[0, 0]).distance(red) == 0

    def test_picked_colors_are_a_picture_of_them(self):
        colors, shares = read_colors("#f00, #0000ff 3;")
        assert colors.tolist() == [[1, 0, 0], [0, 0, 1]] and shares.tolist() == [1, 3]
        picture = torch.cat([flat(1, 0, 0), *[flat(0, 0, 1)] * 3])
        assert palette_of_colors(colors, shares).distance(palette_of_picture(picture)) < 1e-9
        for text, got in (("#ff", "#ff"), ("red", "red"), ("#ff0000 0", "#ff0000 0"), ("#ff0000, #12345g", "#12345g")):
            with pytest.raises(ValueError, match=f"colors: expected entries such as .* got '{re.escape(got)}'"):
                read_colors(text)
        with pytest.raises(ValueError, match="colors: expected at least one"):
            read_colors(" , ")

    @pytest.mark.parametrize(("layout", "table"), itertools.product(LAYOUTS, TABLES))
    def test_a_picture_of_a_palette_has_its_areas(self, layout, table):
        palette = palette_of_picture(noise(60, 60, 3, seed=2), None, table)
        shares, colors = palette.main_colors(12)
        picture = palette_picture(palette, 50, 40, layout, 12, seed=4)
        assert picture.shape == (40, 50, 3)
        found = palette_of_picture(picture, None, table, sigma=0).histogram
        index = [int((table_colors(table) - color).abs().sum(1).argmin()) for color in colors]
        torch.testing.assert_close(found[index], shares, rtol=0, atol=1 / (50 * 40))
        assert float(found.sum() - found[index].sum()) == 0
        again = palette_picture(palette, 50, 40, layout, 12, seed=5)
        assert torch.equal(picture, again) == (layout == LAYOUTS[0])

    def test_areas_sum_to_the_picture(self):
        assert areas([1 / 3] * 3, 10) == [4, 3, 3] and areas([0.9, 0.1], 1) == [1, 0]

    def test_mixtures_and_distances(self):
        red, blue = palette_of_picture(flat(1, 0, 0)), palette_of_picture(flat(0, 0, 1))
        assert red.mixed(blue, 0.0).distance(red) == 0 and red.mixed(blue, 1.0).distance(blue) == 0
        torch.testing.assert_close(red.mixed(blue, 0.5).histogram, (red.histogram + blue.histogram) / 2)
        assert red.distance(blue) > 1.9
        with pytest.raises(ValueError, match=r"palette: expected one over the same table and sigma \(156 colors, 10\)"):
            red.mixed(palette_of_picture(flat(1, 0, 0), None, "180 colors"), 0.5)
        with pytest.raises(ValueError, match=r"palette: expected 156 shares for 156 colors, got \(180,\)"):
            Palette(torch.ones(180))


class TestSketch:
    def test_a_flat_picture_has_no_contours(self):
        for level in (0.0, 0.2, 0.7, 1.0):
            assert not sketch.contours(torch.full((64, 64, 3), level)).any()

    def test_a_step_is_marked_on_its_dark_side(self):
        step = torch.zeros(64, 64, 3)
        step[:, 32:] = 1
        found = sketch.contours(step)
        assert found[20].nonzero().flatten().tolist() == list(range(26, 32))
        assert torch.equal(found, found[:1].expand(64, -1))

    def test_polarity(self):
        strokes = torch.zeros(16, 16, 3)
        strokes[4] = 1
        for given, polarity in (
            (strokes, sketch.AUTO),
            (1 - strokes, sketch.AUTO),
            (strokes, sketch.WHITE_ON_BLACK),
            (1 - strokes, sketch.BLACK_ON_WHITE),
        ):
            assert torch.equal(sketch.as_sketch(given, polarity), strokes[..., 0])
        assert torch.equal(sketch.as_sketch(strokes, sketch.BLACK_ON_WHITE), 1 - strokes[..., 0])

    def test_simplified_strokes_are_thin_and_without_specks(self):
        drawn = torch.zeros(128, 128)
        drawn[20:27, 10:120] = 1
        drawn[20:27, 60] = 0
        drawn[90, 90] = 1
        found = sketch.simplified(drawn)
        assert not found[80:100].any(), "the speck is gone"
        columns = found[:, 16:112].sum(0)
        assert columns.min() >= 1 and columns.max() <= 2, "a line of one pixel, without the gap"
        wide = sketch.simplified(drawn, width=3)
        assert 4 <= wide[:, 40].sum() <= 6
        assert not sketch.simplified(torch.zeros(32, 32)).any()

    def test_a_long_thin_stroke_is_no_speck(self):
        drawn = torch.zeros(512, 512)
        drawn[200, 100:200] = 1
        assert sketch.simplified(drawn)[200].sum() > 90

    def test_thin_strokes_outlive_a_smaller_size(self):
        drawn = torch.zeros(64, 64)
        drawn[21], drawn[:, 40] = 1, 1
        drawn = drawn[None, None]
        found = resized_strokes(drawn, (32, 32))[0, 0]
        assert (found[10] == 1).all() and (found[:, 20] == 1).all() and int(found.sum()) == 63
        assert torch.equal(resized_strokes(drawn, (64, 64)), drawn)
        for size in ((128, 128), (64, 24), (63, 60)):
            made = resized_strokes(drawn, size)[0, 0]
            # Of each stroke something stays wherever it was, at about half of full white or more.
            assert (made.amax(0) > 0.49).all() and (made.amax(1) > 0.49).all()
        near = resized_strokes(drawn, (63, 63))[0, 0] > 0.5
        assert int(near[:, 0].sum()) == 1, "a side that shrinks a little makes no stroke wider"
        given = align(Composition((64, 64), {SKETCH: Part(drawn[0, 0])}), (32, 32))
        assert torch.equal(given[SKETCH], found)

    def test_canny_finds_the_border_of_a_square(self):
        pytest.importorskip("kornia", reason="kornia is not installed (pip install kornia)")
        square = torch.zeros(32, 32, 3)
        square[8:24, 8:24] = 1
        found = sketch.canny(square)
        assert found.any() and not found[12:20, 12:20].any() and not found[:4].any()


class TestInstances:
    def masks(self):
        large, small, other = (torch.zeros(16, 16) for _ in range(3))
        large[2:14, 2:14], small[6:10, 6:10], other[2:14, 14:] = 1, 1, 1
        return torch.stack([small, large, other])

    def test_the_smaller_thing_is_in_front(self):
        found = instance_map(self.masks(), ["cup", "table", "table"])
        assert (
            found.labels[8, 8] == 1 and found.labels[3, 3] == 2 and found.labels[3, 15] == 3 and found.labels[0, 0] == 0
        )
        assert torch.equal(found.mask(0), self.masks()[0])
        with pytest.raises(ValueError, match="names: expected one for each of 3 masks, got 2"):
            instance_map(self.masks(), ["cup", "table"])
        with pytest.raises(ValueError, match="masks: expected white on each thing, got an empty mask for cup"):
            instance_map(torch.zeros(1, 8, 8), ["cup"])

    @pytest.mark.parametrize("coding", CODINGS)
    def test_things_are_told_apart_on_black(self, coding):
        found = instance_map(self.masks(), ["cup", "wall", "door"])
        picture = coded(found, coding)
        assert not picture[0, 0].any()
        colors = {tuple(color) for color in picture.flatten(0, 1).tolist()}
        assert len(colors) == 4
        for number in range(3):
            inside = picture[found.mask(number) > 0]
            assert len(torch.unique(inside, dim=0)) == 1

    def test_things_of_one_noun_have_one_hue_and_a_line_between_them(self):
        picture = coded(instance_map(self.masks(), ["cup", "table", "table"]), OWN)
        first, second = picture[3, 3], picture[3, 15]
        torch.testing.assert_close(second / second.max(), first / first.max())
        assert float(second.max() / first.max()) == pytest.approx(0.8)
        assert not picture[3, 13].any(), "the line"
        assert picture[8, 10].any(), "none between things of other nouns"

    @pytest.mark.parametrize("name", ["star", ""])
    def test_every_thing_has_a_color_of_its_own(self, name):
        apart = torch.zeros(40, 1, 80)
        apart[range(40), 0, range(0, 80, 2)] = 1
        picture = coded(instance_map(apart, [name] * 40), OWN)
        assert len({tuple(color) for color in (picture[0] * 255).round().tolist() if any(color)}) == 40

    def test_classes_of_ade20k(self):
        assert [ade_class(name) for name in ("dog", "Trees", "boxes", "mug", "spaceship")] == [
            *("animal", "tree", "box", "glass", None)
        ]
        picture = coded(instance_map(torch.ones(1, 2, 2), ["sky"]), ADE20K)
        assert (picture[0, 0] * 255).round().tolist() == [6, 230, 230]
        assert coded(instance_map(torch.ones(1, 2, 2), ["spaceship"]), ADE20K)[0, 0].tolist() == [0.5] * 3
        assert coded(instance_map(torch.ones(1, 2, 2), [""]), GRAYS)[0, 0].tolist() == [1.0] * 3


class TestDepthAndIntensity:
    def test_depth_is_1_where_it_is_near(self):
        ramp = torch.linspace(2, 50, 100).expand(10, -1)
        found = normalized_depth(ramp)
        assert (found.diff(dim=1) >= 0).all() and found[0, 0] == 0 and found[0, -1] == 1
        torch.testing.assert_close(normalized_depth(1 / ramp, metric=True), found, rtol=0, atol=1e-4)
        assert not normalized_depth(torch.full((4, 4), 3.0)).any()
        outlier = ramp.clone()
        outlier[0, 0] = 1e9
        torch.testing.assert_close(normalized_depth(outlier)[1:], found[1:], rtol=0, atol=0.02)
        with pytest.raises(ValueError, match="depth: expected finite values, got none"):
            normalized_depth(torch.full((4, 4), float("nan")))
        with pytest.raises(ValueError, match="depth: expected distances above 0, got 0"):
            normalized_depth(torch.zeros(4, 4), metric=True)

    def test_intensity(self):
        for weights in WEIGHTS.values():
            assert sum(weights) == pytest.approx(1)
            gray = torch.full((4, 4, 3), 0.3)
            torch.testing.assert_close(intensity(gray, weights), gray[..., 0])
        assert float(intensity(flat(1, 0, 0))[0, 0]) == pytest.approx(0.299)
        torch.testing.assert_close(intensity(noise(4, 4, 3), (2, 2, 2)), noise(4, 4, 3).mean(-1))
        with pytest.raises(ValueError, match="weights: expected numbers from 0 on"):
            intensity(gray, (1, -1, 1))
        assert torch.equal(intensity(torch.full((2, 2, 1), 0.5)), torch.full((2, 2), 0.5))


class TestSemantics:
    def test_slerp(self):
        a, b = (v / v.norm() for v in noise(2, 768).double() - 0.5)
        torch.testing.assert_close(slerp(a, b, 0.0), a)
        torch.testing.assert_close(slerp(a, b, 1.0), b)
        middle = slerp(a, b, 0.5)
        assert float(middle.norm()) == pytest.approx(1, abs=1e-12) and float(torch.lerp(a, b, 0.5).norm()) < 0.9
        torch.testing.assert_close(middle @ a, middle @ b)
        torch.testing.assert_close(slerp(a, a, 0.3), a)
        assert torch.isfinite(slerp(a, -a, 0.5)).all() and float(slerp(a, -a, 0.5).norm()) == pytest.approx(1)

    def test_what_adapters_take_has_unit_variance(self):
        given = Semantics(torch.randn(768) * 7)
        assert float(given.embedding.norm()) == pytest.approx(1, abs=1e-5)
        assert float(given.scaled.square().mean()) == pytest.approx(1, abs=1e-4)
        tokens = [noise(5, 6, seed=seed) for seed in (1, 2)]
        both = between(*(Semantics(noise(9, seed=i), tokens[i]) for i in range(2)), 0.5)
        torch.testing.assert_close(both.tokens, sum(tokens) / 2)
        assert between(Semantics(noise(9), tokens[0]), Semantics(noise(9, seed=1)), 0.5).tokens is None
        with pytest.raises(
            ValueError, match="semantics: expected embeddings of the same vision tower, got widths 9 and"
        ):
            between(Semantics(noise(9)), Semantics(noise(8)), 0.5)
        with pytest.raises(ValueError, match="semantics: expected one finite image embedding"):
            Semantics(torch.zeros(9))


class TestRegion:
    def test_a_hole_is_gray_and_the_rest_is_kept(self):
        image, mask = noise(8, 8, 3), torch.zeros(8, 8)
        mask[2:4, 2:4] = 0.9
        found = Region(image, mask)
        assert found.mask.unique().tolist() == [0, 1] and found.mask.sum() == 4
        assert (found.shown[2:4, 2:4] == 0.5).all()
        assert torch.equal(found.shown[found.mask == 0], image[found.mask == 0])
        for given, said in (
            (torch.ones(8, 8), "everything: leave the mask out"),
            (torch.zeros(8, 8), "nothing: paint"),
        ):
            with pytest.raises(ValueError, match=f"mask: expected white on a part .* covers {said}"):
                Region(image, given)

    def test_grown(self):
        mask = torch.zeros(16, 16)
        mask[6:10, 6:10] = 1
        assert grown(mask, 2).sum() == 64 and torch.equal(grown(grown(mask, 2), -2), mask)
        assert torch.equal(grown(mask, 0), mask)
        assert grown(torch.ones(8, 8), -2).all(), "the picture's border is no edge"


def whole(size=(32, 48), seed=0):
    """A composition with all representations."""
    mask = torch.zeros(size)
    mask[4:20, 4:20] = 1
    values = {
        CAPTION: Caption((("a star", 1.0),)),
        SEMANTICS: Semantics(noise(16, seed=seed) - 0.5, noise(3, 16, seed=seed)),
        PALETTE: palette_of_picture(noise(8, 8, 3, seed=seed)),
        SKETCH: (noise(*size, seed=seed) > 0.9).float(),
        INSTANCES: instance_map(torch.stack([mask, mask.flip(1)]), ["star", "mug"]),
        DEPTH: noise(*size, seed=seed + 1),
        INTENSITY: noise(*size, seed=seed + 2),
        MASK: Region(noise(*size, 3, seed=seed), mask),
    }
    return Composition(size, {name: Part(value) for name, value in values.items()}, noise(*size, 3, seed=seed))


def tensors(value):
    """The tensors of a representation."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in vars(value).values() if isinstance(v, torch.Tensor)]


class TestComposition:
    def test_absent_is_absent(self):
        given = whole()
        assert tuple(given.parts) == NAMES
        picked = pick(given, (SKETCH, CAPTION))
        assert tuple(picked.parts) == (CAPTION, SKETCH) and picked.get(DEPTH) is None and DEPTH not in picked
        assert not pick(given, NAMES, strength=0).parts
        assert pick(given, [SKETCH], 0.5, 0.1, 0.9).parts[SKETCH].end_percent == 0.9
        assert str(pick(given, [SKETCH], 0.5, 0.1, 0.9)) == "sketch: 48 x 32; strength 0.5; from 0.1 to 0.9"
        assert str(Composition((8, 8))) == "nothing"

    def test_merging(self):
        given, other = whole(), whole(seed=5)
        sketch_of, rest = pick(given, [SKETCH]), pick(other, set(NAMES) - {SKETCH})
        for pair in ((sketch_of, rest), (rest, sketch_of)):
            both = merge(*pair)
            assert tuple(both.parts) == NAMES and both[SKETCH] is given[SKETCH] and both[DEPTH] is other[DEPTH]
        assert merge(given, other, "first")[DEPTH] is given[DEPTH]
        assert merge(given, other, "second")[DEPTH] is other[DEPTH]
        with pytest.raises(
            ValueError, match="composition2: expected representations that composition1 does not have, got"
        ):
            merge(given, other)
        small = whole((16, 16))
        with pytest.raises(ValueError, match="canvas of composition1, 48 x 32, got 16 x 16; connect Align Composition"):
            merge(sketch_of, pick(small, [DEPTH]))
        # Things are cut out of the picture in which they were found.
        assert merge(pick(given, [SKETCH]), pick(other, [INSTANCES])).picture is other.picture
        assert pick(given, [PALETTE]).picture is None
        # One from no picture takes the other's canvas.
        nowhere = Composition(compositions.NO_CANVAS, pick(given, [CAPTION]).parts)
        palette = pick(other, [PALETTE])
        for made in (merge(nowhere, palette), merge(palette, nowhere), interpolate(nowhere, palette, 0.5)):
            assert made.size == (32, 48)
        # Global representations have no canvas.
        assert (
            merge(pick(small, [PALETTE]), sketch_of).size == merge(sketch_of, pick(small, [PALETTE])).size == (32, 48)
        )

    @pytest.mark.parametrize("fit", compositions.FITS)
    def test_aligning(self, fit):
        given = whole()
        found = align(given, (64, 64), fit)
        for name in LOCAL:
            assert compositions.size_of(found[name]) == (64, 64)
        assert found[PALETTE] is given[PALETTE] and found[SEMANTICS] is given[SEMANTICS]
        assert set(found[INSTANCES].labels.unique().tolist()) <= {0, 1, 2}, "labels are never mixed"
        assert found[MASK].mask.unique().tolist() == [0, 1]
        if fit == compositions.PAD:
            # 64 x 43 of the picture, with 10 rows of canvas above it and 11 below.
            assert found[MASK].mask[0].all() and not found[INSTANCES].labels[0].any()
            torch.testing.assert_close(found[INTENSITY][0], found[INTENSITY][10], rtol=0, atol=1e-6)
            assert not found[SKETCH][:10].any(), "strokes do not go on"
        assert align(given, given.size) is given
        corner = torch.zeros(32, 48)
        corner[:4, :4] = 1
        for name, value in ((SKETCH, corner), (INSTANCES, instance_map(corner[None], ["cup"]))):
            at_the_side = Composition((32, 48), {name: Part(value)})
            if fit == compositions.CROP:
                with pytest.raises(ValueError, match=f"fit: expected one that keeps a part of the {name}, got crop"):
                    align(at_the_side, (32, 32), fit)
            else:
                assert name in align(at_the_side, (32, 32), fit)
        odd = align(given, (49, 65), fit)
        assert odd.size == compositions.size_of(odd[DEPTH]) == (49, 65)

    def test_cropping_keeps_the_middle_and_nothing_is_stretched(self):
        disc = ((torch.arange(64)[:, None] - 31.5) ** 2 + (torch.arange(96) - 47.5) ** 2 < 20**2).float()
        found = align(Composition((64, 96), {DEPTH: Part(disc)}), (128, 128))[DEPTH]
        ys, xs = (found > 0.5).nonzero(as_tuple=True)
        assert (int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1) == (80, 80)
        assert (float(ys.float().mean()), float(xs.float().mean())) == (63.5, 63.5)

    def test_interpolation(self):
        a, b = whole(), whole(seed=7)
        b = b.with_part(CAPTION, Caption((("a mug", 1.0),)))
        for share, end in ((0.0, a), (1.0, b)):
            found = interpolate(a, b, share)
            torch.testing.assert_close(found[SEMANTICS].embedding, end[SEMANTICS].embedding)
            torch.testing.assert_close(found[PALETTE].histogram, end[PALETTE].histogram)
            assert found[CAPTION] == end[CAPTION]
        middle = interpolate(a, b, 0.25, "second")
        assert middle[DEPTH] is b[DEPTH] and interpolate(a, b, 0.25)[DEPTH] is a[DEPTH]
        assert middle[CAPTION].texts == (("a star", 0.75), ("a mug", 0.25))
        assert str(middle[CAPTION]) == "75% 'a star', 25% 'a mug'"
        assert interpolate(a, a, 0.4)[CAPTION] == a[CAPTION]
        early, late = pick(a, [PALETTE], 10.0, 0.0, 0.5), pick(b, [PALETTE], 10.0, 0.5, 1.0)
        part = interpolate(early, late, 0.08).parts[PALETTE]
        assert part.strength == 10 and (part.start_percent, part.end_percent) == pytest.approx((0.04, 0.54))
        assert interpolate(pick(a, [PALETTE]), pick(b, [CAPTION]), 0.5).get(CAPTION) == b[CAPTION]

    def test_a_file_holds_all_of_it(self, tmp_path):
        given = merge(pick(whole(), [SKETCH], 0.5, 0.1, 0.9), pick(whole(), set(NAMES) - {SKETCH}))
        files.save(given, tmp_path / "one.safetensors")
        found = files.load(tmp_path / "one.safetensors")
        assert found.size == given.size and str(found) == str(given) and torch.equal(found.picture, given.picture)
        for name in NAMES[1:]:
            for own, read in zip(tensors(given[name]), tensors(found[name]), strict=True):
                torch.testing.assert_close(own, read, rtol=0, atol=1e-7)
        shared = given.picture
        files.save(
            replace(given, parts={**given.parts, MASK: Part(Region(shared, given[MASK].mask))}), tmp_path / "two"
        )
        assert torch.equal(files.load(tmp_path / "two")[MASK].image, shared)
        files.save(Composition((8, 8)), tmp_path / "empty.safetensors")
        assert not files.load(tmp_path / "empty.safetensors").parts

    def test_other_files_are_refused(self, tmp_path):
        from safetensors.torch import save_file

        file = tmp_path / "other.safetensors"
        for metadata, said in (
            ({}, "which is another kind of file"),
            ({"format": files.FORMAT, "version": "2"}, "got other.safetensors with version 2"),
            (
                {"format": files.FORMAT, "version": "1", "size": "[8, 8]", "parts": '{"depth": {"strength": 1}}'},
                "without 'depth'",
            ),
        ):
            save_file({"a": torch.ones(1)}, file, metadata)
            with pytest.raises(ValueError, match=f"file: expected .*{re.escape(said)}"):
                files.load(file)

    def test_bad_parts_are_refused(self):
        for name, value, said in (
            (
                DEPTH,
                torch.ones(4, 4),
                "depth: expected the canvas's size 48 x 32, got 4 x 4; connect Align Composition",
            ),
            (PALETTE, torch.ones(156), "palette: expected a Palette, got a Tensor"),
            ("pose", torch.ones(4, 4), "composition: expected representations from caption"),
        ):
            with pytest.raises(ValueError, match=re.escape(said)):
                whole().with_part(name, value)
        for numbers, said in (
            ((11.0,), "strength: expected a number above 0, at most 10, got 11"),
            ((1.0, 0.8, 0.2), "start_percent: expected at most end_percent"),
        ):
            with pytest.raises(ValueError, match=said):
                pick(whole(), [DEPTH], *numbers)

    def test_the_sheet_shows_all_of_it(self):
        sheet = contact_sheet(whole())
        assert sheet.shape == (2 * 274, 4 * 256, 3)
        tiles = [tile for row in sheet.split(274) for tile in row.split(256, 1)]
        assert all(tile.std() > 0.02 for tile in tiles)
        assert contact_sheet(Composition((8, 8))).shape == (274, 256, 3)


class TestSubjects:
    """The systems share one notion of a thing."""

    def masks(self):
        masks = torch.zeros(2, 24, 32)
        masks[0, 4:12, 4:12], masks[1, 10:20, 16:30] = 1, 1
        return masks

    def test_a_thing_of_a_composition_is_a_subject(self):
        image, things = noise(24, 32, 3), instance_map(self.masks(), ["cup", "table"])
        given = decompose(image, "a cup on a table", instances=things)
        found = subject_of(given, "Table", 1.5)
        assert torch.equal(found.image, image) and torch.equal(found.mask, self.masks()[1])
        assert (found.noun, found.prompt, found.weight) == ("Table", "a cup on a table", 1.5)
        assert subject_of(given, "").noun == "cup", "the first"
        with pytest.raises(ValueError, match=re.escape("one of the composition's things (cup, table), got 'dog'")):
            subject_of(given, "dog")
        with pytest.raises(ValueError, match="composition: expected one with instances, got one without"):
            subject_of(decompose(image), "cup")

    def test_a_subject_is_a_composition_again(self):
        """Its colors are those inside of its mask, whatever is around it."""
        mask = self.masks()[0]
        image = torch.where(mask[..., None] > 0, torch.tensor([0.9, 0.1, 0.1]), torch.tensor([0.1, 0.1, 0.9]))
        found = decompose_subject(Subject(image, "cup", mask), Semantics(torch.ones(4)))
        assert str(found["caption"]) == Subject(image, "cup", mask).prompt
        assert found["instances"].names == ("cup",) and torch.equal(found["instances"].mask(0), mask)
        red = palette_of_picture(torch.tensor([0.9, 0.1, 0.1]).expand(8, 8, 3))
        torch.testing.assert_close(found["palette"].histogram, red.histogram, rtol=0, atol=1e-5)
        again = subject_of(found, "cup")
        assert torch.equal(again.image, image) and torch.equal(again.mask, mask) and again.noun == "cup"

    def test_a_subject_without_a_mask_is_its_whole_picture(self):
        found = decompose_subject(Subject(noise(8, 8, 3), "cup"))
        assert found["instances"].mask(0).all() and "semantics" not in found


class TestLumaMerge:
    @pytest.mark.parametrize("mode", MODES)
    def test_a_picture_with_itself_is_itself(self, mode):
        image = noise(16, 16, 3)
        torch.testing.assert_close(luma_merge(image, image, mode), image, rtol=0, atol=1 / 255)
        assert torch.equal(luma_merge(1 - image, image, mode, strength=0.0), image)

    @pytest.mark.parametrize("mode", MODES)
    def test_one_channel_is_a_gray_picture(self, mode):
        gray, color = noise(8, 8, 1), noise(8, 8, 3, seed=1)
        assert torch.equal(luma_merge(gray, color, mode), luma_merge(gray.expand(-1, -1, 3), color, mode))

    def test_lightness_is_the_sources_and_color_the_others(self):
        light, color = 0.3 + 0.4 * noise(32, 32, 3), 0.35 + 0.3 * noise(32, 32, 3, seed=1)
        merged = luma_merge(light, color)
        lab, source, given = (srgb_to_lab(one.double()) for one in (merged, light, color))
        unclipped = ((merged > 0) & (merged < 1)).all(-1)
        assert unclipped.float().mean() > 0.7
        assert (lab - source)[unclipped][:, 0].abs().max() < 0.5
        assert (lab - given)[unclipped][:, 1:].abs().max() < 0.5
        luma = luma_merge(light, color, "Rec. 601")
        kept = ((luma > 0) & (luma < 1)).all(-1)
        torch.testing.assert_close(intensity(luma)[kept], intensity(light)[kept], rtol=0, atol=1e-5)
        assert np.isfinite(luma.numpy()).all()
