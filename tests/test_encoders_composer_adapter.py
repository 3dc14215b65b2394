"""The Composer adapter: what is absent adds exactly nothing, sums do not depend on order, files hold all of it."""

import json
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conceptloom.encoders.composer_adapter import (
    FORMAT,
    INPUT,
    INTENSITY,
    LEVELS,
    LOCAL_CHANNELS,
    MASK,
    PALETTE,
    SEMANTICS,
    SENTENCE,
    ComposerAdapter,
    ComposerAdapterConfig,
    Conditions,
    load,
    save,
    tone_shares,
)

TINY = ComposerAdapterConfig((32, 64, 64, 64), 24, 20, 16, 12, local_width=8, body=(8, 16, 16, 16))
SIZE = (8, 12)


def adapter(trained=True, **changes):
    torch.manual_seed(0)
    net = ComposerAdapter(replace(TINY, **changes)).eval().requires_grad_(False)
    if trained:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return net


def given(n=2, names=None, strengths=None, side=(32, 48)):
    generator = torch.Generator().manual_seed(1)
    widths = {SENTENCE: 20, SEMANTICS: 16, PALETTE: 12}
    found = {name: torch.randn(n, width, generator=generator) for name, width in widths.items()}
    maps = {name: torch.rand(n, c, *side, generator=generator) for name, c in LOCAL_CHANNELS.items()}
    if names is not None:
        found = {name: value for name, value in found.items() if name in names}
        maps = {name: value for name, value in maps.items() if name in names}
    return Conditions(found, maps, strengths or {})


class TestFeatures:
    def test_shapes(self):
        features = adapter()(given(), SIZE)
        assert features.time.shape == (2, 128) and features.tokens.shape == (2, 8, 24) and features.kept is None
        assert {i: tuple(f.shape) for i, f in features.levels.items()} == {
            0: (2, 32, 8, 12), 1: (2, 64, 4, 6), 2: (2, 64, 2, 3), 3: (2, 64, 1, 2),
        }  # fmt: skip
        assert {i: tuple(f.shape) for i, f in adapter(mode=INPUT, body=())(given(), SIZE).levels.items()} == {
            -1: (2, 32, 8, 12)
        }
        # Odd latents, as a convolution with stride 2 halves them, and maps of any size.
        odd = adapter()(given(side=(37, 21)), (65, 49)).levels
        assert [tuple(odd[i].shape[-2:]) for i in range(4)] == [(65, 49), (33, 25), (17, 13), (9, 7)]

    def test_what_is_absent_adds_nothing(self):
        net = adapter()
        nothing = net(Conditions(), SIZE)
        assert nothing.time is None and nothing.tokens is None and not nothing.levels
        some = net(given(names=(PALETTE, "depth")), SIZE)
        assert some.tokens.shape == (2, 4, 24)

    @pytest.mark.parametrize("mode", [LEVELS, INPUT])
    def test_a_new_adapter_changes_nothing_but_by_its_tokens(self, mode):
        features = adapter(trained=False, mode=mode, body=TINY.body if mode == LEVELS else ())(given(), SIZE)
        assert not features.time.any() and not any(f.any() for f in features.levels.values())
        assert features.tokens.any()

    @pytest.mark.parametrize("mode", [LEVELS, INPUT])
    def test_a_row_of_strength_0_is_a_row_without(self, mode):
        """Bit for bit, for each representation and for all of them, whatever is in the other rows."""
        net = adapter(mode=mode, body=TINY.body if mode == LEVELS else ())
        names = (SENTENCE, SEMANTICS, PALETTE, *LOCAL_CHANNELS)
        for off in ((SENTENCE,), (PALETTE,), ("depth",), ("mask", "sketch"), tuple(LOCAL_CHANNELS), names):
            strengths = {name: torch.tensor([1.0, 0.0]) for name in off}
            both = net(given(strengths=strengths), SIZE)
            rest = [name for name in names if name not in off]
            alone = net(given(names=rest), SIZE)
            for level in both.levels:
                other = alone.levels.get(level, torch.zeros_like(both.levels[level]))
                assert torch.equal(both.levels[level][1], other[1])
            time = torch.zeros_like(both.time) if alone.time is None else alone.time
            assert torch.equal(both.time[1], time[1])
            if both.kept is not None:
                kept = both.tokens[1][both.kept[1]]
                tokens = alone.tokens[1] if alone.tokens is not None else kept[:0]
                assert torch.equal(kept, tokens)

    def test_the_sum_does_not_depend_on_order(self):
        net, whole = adapter().double(), given()
        whole = Conditions(*({k: v.double() for k, v in part.items()} for part in (whole.globals, whole.maps)))
        turned = Conditions(whole.globals, dict(reversed(whole.maps.items())))
        for level, value in net(whole, SIZE).levels.items():
            torch.testing.assert_close(net(turned, SIZE).levels[level], value, rtol=0, atol=1e-12)

    def test_strength_scales_the_map(self):
        net = adapter(mode=INPUT, body=())
        one, half = (
            net(given(names=("depth",), strengths={"depth": torch.full((2,), s)}), SIZE).levels[-1] for s in (1.0, 0.5)
        )
        torch.testing.assert_close(half, one / 2)

    def test_a_thin_stroke_is_as_strong_on_a_large_canvas(self):
        """A line of one pixel, where a cell of the latent is 32 pixels wide and where it is 4."""
        net, line = adapter(), torch.zeros(1, 1, 32, 48)
        line[..., 20] = 1
        large = torch.zeros(1, 1, 256, 384)
        large[..., 20 * 8 + 3] = 1
        expected, made = (net(Conditions({}, {"sketch": one}), SIZE).levels for one in (line, large))
        assert all(torch.equal(made[level], expected[level]) for level in expected)

    def test_maps_that_are_not_finite_are_mended(self):
        broken = given(names=("depth",))
        broken.maps["depth"][0, 0, 0, 0] = float("nan")
        assert all(torch.isfinite(f).all() for f in adapter()(broken, SIZE).levels.values())

    def test_tones_are_the_shares_of_a_histogram(self):
        picture = torch.tensor([[0.0, 0.0, 0.0, 1.0, 0.5, 0.25, 0.35, 1.0]])[None, None]
        # Tones at 0, .25, .5, .75 and 1; .35 is for 6 tenths the second and for 4 tenths the third.
        expected = torch.tensor([[3.0, 1.6, 1.4, 0.0, 2.0]]) / 8 * 5**0.5
        torch.testing.assert_close(tone_shares(picture, 5), expected)
        random = torch.rand(3, 1, 9, 7, generator=torch.Generator().manual_seed(0))
        mean = tone_shares(random, 16) @ torch.linspace(0, 1, 16) / 4
        torch.testing.assert_close(mean, random.mean((1, 2, 3)))

    def test_tones_of_a_masked_picture_are_those_of_what_is_left(self):
        """Each channel has its own, whatever lies in the hole."""
        picture, kept = torch.rand(2, 3, 6, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 1, 6, 8)
        kept[0, 0, :, :5] = 1
        left = tone_shares(picture[:1, :, :, :5], 7).unflatten(1, (3, 7))
        each = [tone_shares(picture[:1, i : i + 1, :, :5], 7) for i in range(3)]
        assert torch.equal(left, torch.stack(each, 1))
        found = tone_shares(picture, 7, kept)
        torch.testing.assert_close(found[:1].unflatten(1, (3, 7)), left)
        assert not found[1].any()

    def test_intensity_and_mask_enter_the_timestep_embedding_by_their_tones(self):
        net, strengths = adapter(tones=5), {INTENSITY: torch.tensor([1.0, 0.5])}
        one = given(names=(INTENSITY,), strengths=strengths)
        expected = net.add[INTENSITY](tone_shares(one.maps[INTENSITY], 5)) * torch.tensor([[1.0], [0.5]])
        torch.testing.assert_close(net(one, SIZE).time, expected)
        both = given(names=(INTENSITY, PALETTE, "depth"), strengths=strengths)
        torch.testing.assert_close(net(both, SIZE).time, expected + net.add[PALETTE](both.globals[PALETTE]))
        assert net(given(names=("depth",)), SIZE).time is None
        hole = given(names=(MASK,))
        picture, kept = hole.maps[MASK][:, :3], hole.maps[MASK][:, 3:]
        shares = tone_shares((picture / kept + 1) / 2, 5, kept)
        torch.testing.assert_close(net(hole, SIZE).time, net.add[MASK](shares))
        # One color, whose map is made smaller at the edge of a hole.
        kept = torch.ones(1, 1, 75, 99)
        kept[..., 13:38] = 0
        picture = torch.tensor([0.2, -0.6, 0.4])[None, :, None, None] * kept
        shares = tone_shares((picture[:, :, :1, :1] + 1) / 2, 5)
        seen = net(Conditions({}, {MASK: torch.cat([picture, kept], 1)}), SIZE).time
        torch.testing.assert_close(seen, net.add[MASK](shares), rtol=1e-4, atol=1e-4)
        assert adapter(tones=0)(one, SIZE).time is None

    def test_adding_behind_the_first_convolution_is_a_convolution_of_both(self):
        """conv(cat[x, l]; [W, V], b) = conv(x; W, b) + conv(l; V): what the paper concatenates."""
        net = adapter(mode=INPUT, body=()).double()
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2, 4, *SIZE, generator=generator).double()
        first = torch.nn.Conv2d(4, 32, 3, padding=1).double()
        seen = []
        net.out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        whole = given()
        whole = Conditions({}, {k: v.double() for k, v in whole.maps.items()})
        added = first(x) + net(whole, SIZE).levels[-1]
        wide = F.conv2d(torch.cat([x, seen[0]], 1), torch.cat([first.weight, net.out.weight], 1), first.bias, padding=1)
        torch.testing.assert_close(added, wide, rtol=0, atol=1e-13)


class TestFiles:
    def test_all_of_it_is_read_again(self, tmp_path):
        net = adapter().half().float()
        save(net, tmp_path / "one.safetensors", trained_steps="5")
        found = load(tmp_path / "one.safetensors")
        assert found.config == net.config and not any(p.requires_grad for p in found.parameters())
        own, read = net(given(), SIZE), found(given(), SIZE)
        assert torch.equal(own.time, read.time) and torch.equal(own.tokens, read.tokens)
        assert all(torch.equal(own.levels[i], read.levels[i]) for i in own.levels)

    def test_the_size_for_stable_diffusion(self):
        """The published widths of the added part: 7.09 million weights for SD 1.5, 7.42 for SD 2.1."""
        for width, sentence, semantics, expected in ((768, 768, 768, 7.09), (1024, 1024, 768, 7.42)):
            widths = {"context_width": width, "sentence_width": sentence, "semantics_width": semantics}
            config = ComposerAdapterConfig(**widths, tones=0)
            with torch.device("meta"):
                net = ComposerAdapter(config)
            assert sum(p.numel() for p in net.add.parameters()) / 1e6 == pytest.approx(expected, abs=0.01)

    @pytest.mark.parametrize(
        ("metadata", "said"),
        [
            ({}, "file: expected a Composer adapter, got one.safetensors, which is another kind of file"),
            ({"format": FORMAT, "version": "9"}, "file: expected version 1 of the format, got one.safetensors with 9"),
            ({"format": FORMAT, "version": "1"}, "file: expected a whole Composer adapter, got one.safetensors"),
            (
                {"format": FORMAT, "version": "1", "config": json.dumps({"wings": 2})},
                "file: expected a whole Composer adapter, got one.safetensors",
            ),
            (
                {"format": FORMAT, "version": "1", "config": json.dumps(asdict(TINY))},
                "file: expected the weights of a Composer adapter, got nothing for add.caption.0.weight",
            ),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, metadata, said):
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, tmp_path / "one.safetensors", metadata)
        with pytest.raises(ValueError, match=f"^{said}"):
            load(tmp_path / "one.safetensors")
