"""Representations for ControlNets and other consumers, and CoAdapter, on a UNet with SD 1.5's topology."""

import pytest
import torch

CHANNELS = (32, 64, 128, 128)


@pytest.fixture(scope="module")
def toy(toy_type):
    return toy_type()


@pytest.fixture
def adapter(host):
    """T2I-Adapters with random weights: ComfyUI's own, of the toy's channels."""
    import comfy.controlnet
    import comfy.t2i_adapter.adapter as t2i

    def make(seed, channels=3, **changes):
        torch.manual_seed(seed)
        net = t2i.Adapter(
            cin=64 * channels, channels=list(CHANNELS), nums_rb=2, ksize=1, sk=True, use_conv=False, xl=False
        )
        for name, value in changes.items():
            setattr(net, name, value)
        return comfy.controlnet.T2IAdapter(net.eval().requires_grad_(False), channels, 8, "nearest-exact")

    return make


@pytest.fixture
def fuser(host):
    from conceptloom.encoders.coadapter import CoAdapterFuser

    torch.manual_seed(0)
    net = CoAdapterFuser(CHANNELS, 64).eval().requires_grad_(False)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def hint(seed=0, side=128):
    return torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(seed))


def condition(adapter, kind="sketch", seed=0, weight=1.0):
    from conceptloom.host.composer.coadapter import Condition

    return Condition(kind, adapter(seed), hint(seed), weight)


def chained(toy, *conditions):
    from nodes import ControlNetApplyAdvanced

    sides = toy.positive, toy.negative
    for one in conditions:
        sides = ControlNetApplyAdvanced().apply_controlnet(*sides, one.adapter, one.image, one.weight, 0.0, 1.0)
    return sides


class TestCoAdapter:
    def apply(self, toy, fuser, conditions, **options):
        from conceptloom.host.composer.coadapter import apply

        return apply(fuser, conditions, toy.positive, toy.negative, **options)

    def sample(self, toy, sides, **options):
        return toy.sample(positive=sides[0], negative=sides[1], steps=2, **options)

    def test_a_fuser_that_scales_nothing_is_a_chain_of_adapters(self, toy, fuser, adapter):
        for layer in fuser.spatial_ch_projs:
            torch.nn.init.zeros_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        conditions = [condition(adapter), condition(adapter, "depth", 1, 0.6)]
        found = self.sample(toy, self.apply(toy, fuser, conditions))
        expected = self.sample(toy, chained(toy, *conditions))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        assert float((found - toy.sample(steps=2)).abs().max()) > 1e-2

    def test_a_sketch_has_no_gray(self, adapter):
        made = condition(adapter)
        gray = hint().mean(-1, keepdim=True)
        assert torch.equal(made.image, (gray > gray.max() / 2).float().expand_as(hint()))
        assert torch.equal(condition(adapter, "depth").image, hint())

    def test_adapters_see_one_another(self, toy, fuser, adapter):
        conditions = [condition(adapter), condition(adapter, "depth", 1)]
        found = self.sample(toy, self.apply(toy, fuser, conditions))
        assert not torch.allclose(found, self.sample(toy, chained(toy, *conditions)), atol=1e-3)
        other = [condition(adapter), condition(adapter, "canny", 1)]
        assert not torch.allclose(found, self.sample(toy, self.apply(toy, fuser, other)), atol=1e-4)

    def test_style_comes_to_the_positive_alone(self, toy, fuser, adapter):
        style = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(3))
        positive, negative = self.apply(toy, fuser, [condition(adapter)], style=style)
        assert positive[0][0].shape[1] == toy.positive[0][0].shape[1] + 8
        assert torch.equal(negative[0][0], toy.negative[0][0])
        alone, untouched = self.apply(toy, fuser, [], style=style)
        assert "control" not in alone[0][1] and untouched is toy.negative
        assert torch.isfinite(self.sample(toy, (positive, negative))).all()

    def test_it_chains_with_what_is_there_and_leaves_nothing(self, toy, fuser, adapter):
        plain = toy.sample(steps=2)
        before = chained(toy, condition(adapter, seed=5))
        from conceptloom.host.composer.coadapter import apply

        sides = apply(fuser, [condition(adapter)], *before)
        both = self.sample(toy, sides)
        assert not torch.equal(both, self.sample(toy, self.apply(toy, fuser, [condition(adapter)])))
        assert before[0][0][1]["control"].previous_controlnet is None
        assert torch.equal(toy.sample(steps=2), plain)
        # A second time, at another size, it is made anew.
        wide = self.sample(toy, sides, size=(16, 24))
        assert wide.shape[-1] == 24 and torch.equal(self.sample(toy, sides), both)

    def test_a_part_of_the_schedule(self, toy, fuser, adapter):
        late = self.apply(toy, fuser, [condition(adapter)], start_percent=0.999, end_percent=1.0)
        plain = toy.sample(scheduler="normal")
        torch.testing.assert_close(self.sample(toy, late, scheduler="normal"), plain, rtol=1e-4, atol=1e-2)

    def test_a_further_device_has_networks_of_its_own(self, toy, fuser, adapter):
        """Threads of two devices would move the same ones away from each other."""
        first = self.apply(toy, fuser, [condition(adapter)])[0][0][1]["control"]
        second = first.deepclone_multigpu(torch.device("cpu"), autoregister=True)
        assert first.multigpu_clones == {torch.device("cpu"): second}
        assert second.fuser is not first.fuser
        (one,), (other,) = first.conditions, second.conditions
        assert one.adapter.t2i_model is not other.adapter.t2i_model and torch.equal(one.image, other.image)
        made, expected = (control.fused((64, 64))[0]["input"] for control in (second, first))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(made, expected, strict=True))

    def test_refusals(self, toy, fuser, adapter):
        from conceptloom.encoders.coadapter import CoAdapterFuser
        from conceptloom.host.composer.coadapter import Condition

        with pytest.raises(ValueError, match="conditions: expected one of each kind, got two of sketch"):
            self.apply(toy, fuser, [condition(adapter), condition(adapter, seed=1)])
        with pytest.raises(ValueError, match="style_model: expected one of width 64, got 32"):
            self.apply(toy, fuser, [], style=torch.ones(1, 8, 32))
        for given in (object(), adapter(0, xl=True)):
            with pytest.raises(ValueError, match="control_net: expected a T2I-Adapter for Stable Diffusion 1.5"):
                Condition("sketch", given, hint())
        other = CoAdapterFuser((320, 640, 1280, 1280), 64)
        with pytest.raises(ValueError, match="^conditions: expected maps of .*320.* channels for the fuser, got .*32"):
            self.apply(toy, other, [condition(adapter)])
        with pytest.raises(ValueError, match=r"^start_percent: expected at most end_percent \(0.2\), got 0.8"):
            self.apply(toy, fuser, [condition(adapter)], start_percent=0.8, end_percent=0.2)
        off = self.apply(toy, fuser, [condition(adapter, weight=0.0)])
        assert off == (toy.positive, toy.negative)


class TestHints:
    def composition(self):
        from conceptloom.compositions import composition as c
        from conceptloom.compositions.instance_map import instance_map
        from conceptloom.compositions.palette import palette_of_picture
        from conceptloom.compositions.region import Region
        from conceptloom.compositions.semantics import Semantics

        image = torch.rand(64, 96, 3, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(64, 96)
        mask[8:40, 8:40] = 1
        values = {
            c.SKETCH: torch.rand(64, 96),
            c.DEPTH: torch.rand(64, 96),
            c.INSTANCES: instance_map(mask[None], ["sky"]),
            c.INTENSITY: image.mean(-1),
            c.MASK: Region(image, mask),
            c.PALETTE: palette_of_picture(image),
            c.SEMANTICS: Semantics(torch.randn(16) * 9, torch.randn(5, 12)),
        }
        return c.Composition((64, 96), {name: c.Part(value) for name, value in values.items()})

    def test_each_in_its_convention(self, host):
        from conceptloom.compositions.composition import Composition
        from conceptloom.host.composer.consumers import HINTS, hint_of

        given = self.composition()
        hints = {name: hint_of(given, name) for name in HINTS}
        assert all(one.shape == (1, 64, 96, 3) for one in hints.values())
        strokes = given["sketch"]
        assert torch.equal(hints["sketch"][0, ..., 2], strokes)
        assert torch.equal(hint_of(given, "sketch", binary=True)[0, ..., 0], (strokes > strokes.max() / 2).float())
        assert torch.equal(hints["depth"][0, ..., 1], given["depth"])
        sky = hints["instances"][0, 10, 10] * 255
        assert sky.round().tolist() == [6, 230, 230] and not hints["instances"][0, 0, 0].any()
        assert (hints["mask"][0, 10, 10] == -1).all() and torch.equal(hints["mask"][0, 0, 0], given["mask"].image[0, 0])
        assert len(torch.unique(hints["palette"].flatten(0, 2), dim=0)) == 16
        with pytest.raises(ValueError, match="^composition: expected one with depth, got one with nothing$"):
            hint_of(Composition((8, 8)), "depth")

    def test_a_net_gets_its_hint_strength_and_part_of_the_schedule(self, toy, adapter, host):
        from conceptloom.compositions.composition import pick
        from conceptloom.host.composer.consumers import apply_control, hint_of

        given = pick(self.composition(), ["depth"], 0.7, 0.1, 0.6)
        sides = apply_control(toy.positive, toy.negative, given, "depth", adapter(0))
        control = sides[0][0][1]["control"]
        assert (control.strength, control.timestep_percent_range) == (0.7, (0.1, 0.6))
        assert torch.equal(control.cond_hint_original.movedim(1, -1), hint_of(given, "depth"))
        assert sides[1][0][1]["control"] is control and "control" not in toy.positive[0][1]

    def test_a_net_for_inpainting_gets_the_mask_its_own_way(self, toy, adapter, host):
        from conceptloom.host.composer.consumers import apply_control

        given = self.composition()
        kept = 1 - given["mask"].mask
        net = adapter(0)
        sides = apply_control(toy.positive, toy.negative, given, "mask", net)
        assert sides[0][0][1]["control"].extra_concat_orig == []
        net.concat_mask = True
        control = apply_control(toy.positive, toy.negative, given, "mask", net)[0][0][1]["control"]
        (beside,) = control.extra_concat_orig
        assert torch.equal(beside[0, 0], kept)
        assert torch.equal(control.cond_hint_original[0].movedim(0, -1), given["mask"].image * kept[..., None])
        net.concat_mask, net.latent_format = False, object()
        with pytest.raises(ValueError, match="control_net: expected one for inpainting, got one that encodes its hint"):
            apply_control(toy.positive, toy.negative, given, "mask", net)

    def test_semantics_are_the_towers_own_again(self, host):
        from conceptloom.compositions.semantics import Semantics
        from conceptloom.host.composer.consumers import vision_output

        embedding, tokens = torch.randn(16) * 9, torch.randn(5, 12)
        given = self.composition().with_part("semantics", Semantics(embedding, tokens))
        found = vision_output(given)
        torch.testing.assert_close(found["image_embeds"], embedding[None])
        assert torch.equal(found["last_hidden_state"], tokens[None])

    def test_a_style_model_without_tokens_is_refused(self, host):
        """unCLIP takes the embedding alone, and so the semantics of a caption too."""
        from conceptloom.compositions.semantics import Semantics
        from conceptloom.host.composer.consumers import vision_output

        class StyleModel:
            def get_cond(self, output):
                return output.last_hidden_state

        found = vision_output(self.composition().with_part("semantics", Semantics(torch.ones(16))))
        assert found.image_embeds.shape == (1, 16)
        with pytest.raises(ValueError, match="clip_vision_output: expected the tokens of a picture for a style model"):
            StyleModel().get_cond(found)
