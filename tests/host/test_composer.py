"""The Composer adapter on a UNet with SD 1.5's topology: exact absence, sums, areas, ranges and guidance."""

import pytest
import torch

SIDE = 128
"""Of the pictures of compositions, for latents of 16 cells."""


@pytest.fixture(scope="module")
def toy(toy_type):
    return toy_type()


def make_adapter(trained=True, **changes):
    from conceptloom.compositions.palette import table_colors
    from conceptloom.encoders.composer_adapter import ComposerAdapter, ComposerAdapterConfig, table_hash
    from conceptloom.host.composer.adapter import wrap

    config = {
        "levels": (32, 64, 128, 128),
        "context_width": 64,
        "sentence_width": 1280,
        "semantics_width": 16,
        "table": table_hash(table_colors("156 colors")),
        "local_width": 8,
        "body": (8, 16, 16, 16),
    }
    torch.manual_seed(0)
    net = ComposerAdapter(ComposerAdapterConfig(**{**config, **changes})).eval().requires_grad_(False)
    if trained:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.1)
    return wrap(net)


@pytest.fixture(scope="module")
def adapter(host):
    return make_adapter()


def composition(*names, seed=0, size=(SIDE, SIDE)):
    """A composition with some representations, or all of them."""
    from conceptloom.compositions import composition as c
    from conceptloom.compositions.instance_map import instance_map
    from conceptloom.compositions.palette import palette_of_picture
    from conceptloom.compositions.region import Region
    from conceptloom.compositions.semantics import Semantics

    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(*size, 3, generator=generator)
    mask = torch.zeros(size)
    mask[16:80, 16:80] = 1
    values = {
        c.CAPTION: c.Caption((("a dog and a hat", 1.0),)),
        c.SEMANTICS: Semantics(torch.randn(16, generator=generator)),
        c.PALETTE: palette_of_picture(image),
        c.SKETCH: (torch.rand(size, generator=generator) > 0.9).float(),
        c.INSTANCES: instance_map(mask[None], ["dog"]),
        c.DEPTH: torch.rand(size, generator=generator),
        c.INTENSITY: image.mean(-1),
        c.MASK: Region(image, mask),
    }
    return c.Composition(size, {n: c.Part(v) for n, v in values.items() if not names or n in names})


def encode(toy, adapter, given, conditioning=None):
    from conceptloom.host.composer.adapter import encode

    return encode(adapter, toy.clip, given, conditioning)


@pytest.fixture
def model(toy):
    from conceptloom.host.composer.adapter import prepared

    return prepared(toy.model)


LOCALS = ("sketch", "instances", "depth", "intensity", "mask")


class TestNothing:
    def test_a_prepared_model_is_the_host_without_a_composition(self, toy, model):
        assert torch.equal(toy.sample(model), toy.sample())

    def test_a_composition_of_nothing_but_a_caption_is_its_prompt(self, toy, adapter, model):
        """But for the sentence, which the adapter adds to the timestep embedding."""
        without = make_adapter(sentence_width=0)
        found = toy.sample(model, positive=encode(toy, without, composition("caption")))
        assert torch.equal(found, toy.sample())
        sentence = toy.sample(model, positive=encode(toy, adapter, composition("caption")))
        assert not torch.equal(sentence, found)

    def test_a_new_adapter_adds_nothing_but_tokens(self, toy, model):
        new = make_adapter(trained=False)
        positive = encode(toy, new, composition("caption", *LOCALS))
        assert torch.equal(estimate(model, positive, *point()), estimate(toy.model, toy.positive, *point()))

    def test_nothing_is_left_behind(self, toy, adapter, model):
        before = toy.sample()
        toy.sample(model, positive=encode(toy, adapter, composition()))
        assert torch.equal(toy.sample(), before)


def check_sums(toy, adapter, ends):
    """`ends`: the level that each block is the last of."""
    from conceptloom.compositions.inputs import conditions_of
    from conceptloom.host.composer.adapter import checked, prepared

    given, network = composition(), toy.base.diffusion_model
    checked(adapter.module, toy.model)
    ((states, extras),) = positive = encode(toy, adapter, given)
    seen = estimate(prepared(toy.model), positive, *point())
    features = adapter.module(conditions_of(given, extras["pooled_output"]), (16, 16))
    hooks = [network.time_embed.register_forward_hook(lambda _, __, out: out + features.time)]
    for block, level in ends.items():
        hook = network.input_blocks[block][-1].register_forward_hook(
            lambda _, __, out, level=level: out + features.levels[level]
        )
        hooks.append(hook)
    try:
        longer = [[torch.cat([states, features.tokens], 1), {"pooled_output": extras["pooled_output"]}]]
        expected = estimate(toy.model, longer, *point())
    finally:
        for hook in hooks:
            hook.remove()
    plain = estimate(toy.model, [[states, {"pooled_output": extras["pooled_output"]}]], *point())
    assert len(features.levels) == len(ends)
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-5)
    assert float((plain - expected).abs().max()) > 0.01


class TestEffect:
    @pytest.mark.parametrize("names", [LOCALS, ("sketch", "palette")])
    @pytest.mark.parametrize("patched", ["", "attention", "kernel"])
    def test_the_negative_prompt_shares_a_call(self, toy, adapter, model, names, patched):
        """Zeros for the prompt without maps change nothing in its row, and tokens are seen by their rows alone; but not
        where cross-attention or its kernel is another node's."""
        from comfy.patcher_extension import WrappersMP

        if patched == "attention":
            model.set_model_attn2_patch(lambda q, k, v, _: (q, k, v))
        elif patched:
            options = model.model_options["transformer_options"]
            options["optimized_attention_override"] = lambda kernel, *args, **more: kernel(*args, **more)
        rows, seen = {1 if patched and "palette" in names else 2}, []

        def watch(executor, x, *args, **kwargs):
            seen.append(len(x))
            return executor(x, *args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "rows", watch)
        toy.sample(model, positive=encode(toy, adapter, composition(*names)))
        assert set(seen) == rows

    def test_each_representation_changes_the_picture(self, toy, adapter, model):
        plain = toy.sample()
        pictures = {"all": toy.sample(model, positive=encode(toy, adapter, composition()))}
        for name in ("semantics", "palette", *LOCALS):
            positive = encode(toy, adapter, composition("caption", name))
            pictures[name] = toy.sample(model, positive=positive)
        far = [float((a - b).norm()) for a in pictures.values() for b in pictures.values() if a is not b]
        assert min(far) > 0 and all(not torch.equal(one, plain) for one in pictures.values())

    def test_the_call_is_the_unet_with_the_adapters_sums(self, toy, adapter):
        """The estimate of one call against hooks on the layers themselves."""
        check_sums(toy, adapter, {2: 0, 5: 1, 8: 2, 11: 3})

    def test_of_sdxl_too(self, toy_type):
        from conceptloom.evaluation.rigs import sdxl_unet

        with torch.inference_mode():
            toy = toy_type({**sdxl_unet(1), "model_channels": 32, "context_dim": 64}, family="SDXL", base="SDXL")
            check_sums(toy, make_adapter(levels=(32, 64, 128), body=(8, 16, 16)), {2: 0, 5: 1, 8: 2})

    def test_the_negatives_rows_are_the_hosts_own(self, toy, adapter, model):
        """In one call, whether it has a composition or not."""
        positive = encode(toy, adapter, composition())
        toy.sample(model, positive=positive, steps=1)
        assert toy.rows == [2]
        negative = encode(toy, adapter, composition(seed=4), toy.negative)
        both = toy.sample(model, positive=positive, negative=negative, steps=1)
        assert toy.rows == [2]
        one, other = (estimate(model, side, *point()) for side in (positive, negative))
        # Euler's only step from the first level to 0 ends at the guided estimate.
        assert not torch.equal(one, other) and torch.isfinite(both).all()

    @pytest.mark.parametrize("names", [None, ("semantics",), ("palette", "depth")])
    def test_a_row_sees_its_own_tokens_alone(self, toy, adapter, model, names):
        """Of a call with a prompt of eight, a negative without any or with four."""
        positive = encode(toy, adapter, composition("semantics", "palette", "sketch"), toy.positive)
        negative = encode(toy, adapter, composition(*names, seed=3), toy.negative) if names else toy.negative
        apart = [estimate(model, side, *point()) for side in (positive, negative)]
        toy.rows.clear()
        joined = [guided(model, positive, negative, cfg) for cfg in (0.0, 2.0)]
        assert toy.rows == [2, 2]
        torch.testing.assert_close(joined[0], apart[1], rtol=0, atol=1e-4)
        torch.testing.assert_close(joined[1], 2 * apart[0] - apart[1], rtol=0, atol=1e-4)

    def test_guidance_between_equal_compositions_is_none(self, toy, adapter, model):
        positive = encode(toy, adapter, composition())
        pictures = [toy.sample(model, positive=positive, negative=positive, cfg=cfg) for cfg in (2.0, 7.0)]
        torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)

    def test_a_part_of_the_schedule(self, toy, adapter, model):
        from conceptloom.compositions.composition import merge, pick

        whole = composition("depth")
        half = pick(whole, ["depth"], 1.0, 0.5, 1.0)
        calls = {}
        for name, given in (("whole", whole), ("half", half), ("none", pick(whole, ["depth"], 0))):
            calls[name] = estimate(model, encode(toy, adapter, given, toy.positive), *point(10.0))
            calls[f"{name} late"] = estimate(model, encode(toy, adapter, given, toy.positive), *point(0.3))
        plain = {s: estimate(toy.model, toy.positive, *point(s)) for s in (10.0, 0.3)}
        assert torch.equal(calls["half"], plain[10.0]) and torch.equal(calls["none"], plain[10.0])
        assert torch.equal(calls["half late"], calls["whole late"])
        assert not torch.equal(calls["whole late"], plain[0.3])
        both = merge(half, composition("palette"))
        early, late = (estimate(model, encode(toy, adapter, both, toy.positive), *point(s)) for s in (10.0, 0.3))
        palette = encode(toy, adapter, composition("palette"), toy.positive)
        assert torch.equal(early, estimate(model, palette, *point(10.0)))
        assert not torch.equal(late, estimate(model, palette, *point(0.3)))

    def test_the_schedule_is_that_of_the_clone_that_is_sampled(self, toy, adapter, model):
        """Whatever was loaded before: with another model_sampling, half of the schedule ends elsewhere."""
        from comfy.model_sampling import EDM, ModelSamplingContinuousEDM
        from conceptloom.compositions.composition import pick

        late = encode(toy, adapter, pick(composition("depth"), ["depth"], 1.0, 0.5, 1.0), toy.positive)
        other = model.clone()
        changed = type("Sampling", (ModelSamplingContinuousEDM, EDM), {})(toy.base.model_config)
        changed.set_parameters(0.002, 120.0, 1.0)
        other.add_object_patch("model_sampling", changed)
        # The middle of the discrete schedule is at 1.61, and that of the other at 0.49.
        here = point(1.0)
        for _ in range(2):
            assert not torch.equal(estimate(model, late, *here), estimate(model, toy.positive, *here))
            assert torch.equal(estimate(other, late, *here), estimate(other, toy.positive, *here))

    def test_areas_at_different_places_are_joined(self, toy, adapter, model):
        """A level may have one cell more of one area than of another of the same size."""
        parts = []
        for x, given in ((0, None), (5, composition("depth")), (10, composition("sketch", seed=1))):
            states = toy.positive if given is None else encode(toy, adapter, given, toy.positive)
            parts.append([[entry, {**extras, "area": (16, 6, 0, x)}] for entry, extras in states][0])
        toy.rows.clear()
        joined = estimate(model, parts, *point())
        assert max(toy.rows) > 1
        for x, part in zip((0, 5, 10), parts, strict=True):
            alone, own = estimate(model, [part], *point()), slice(x + (x > 0), x + 5)
            torch.testing.assert_close(joined[..., own], alone[..., own], rtol=0, atol=1e-3)

    def test_an_area_gets_its_part_of_the_maps(self, toy, adapter, model):
        """The left half of a latent with its area alone is a latent of that size with the left half of the maps."""
        given = composition(*LOCALS)
        sides = {"height": 16, "width": 8, "y": 0, "x": 0}
        area = (sides["height"], sides["width"], sides["y"], sides["x"])
        entries = [[states, {**extras, "area": area}] for states, extras in encode(toy, adapter, given, toy.positive)]
        x, sigma = point()
        left = estimate(model, entries, x, sigma)[..., :8]
        features = adapter.module
        seen = []
        handle = features.register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            estimate(model, encode(toy, adapter, given, toy.positive), x, sigma)
        finally:
            handle.remove()
        network = toy.base.diffusion_model
        hooks = [network.time_embed.register_forward_hook(lambda _, __, out: out + seen[0].time)]
        for block, level in ((2, 0), (5, 1), (8, 2), (11, 3)):
            cut = seen[0].levels[level][..., : 8 // 2**level]
            hooks.append(network.input_blocks[block][-1].register_forward_hook(lambda _, __, out, cut=cut: out + cut))
        try:
            expected = estimate(toy.model, toy.positive, x[..., :8], sigma)
        finally:
            for hook in hooks:
                hook.remove()
        torch.testing.assert_close(left, expected, rtol=0, atol=1e-4)

    def test_texts_of_other_lengths_do_not_weaken_the_tokens(self, toy, adapter, model):
        """ComfyUI repeats the shorter of two texts in a batch."""
        long = toy.clip.encode_from_tokens_scheduled("a dog and a hat " * 5)
        short = encode(toy, adapter, composition("semantics"), toy.positive)
        other = encode(toy, adapter, composition("semantics", seed=3), long)
        alone = estimate(model, short, *point())
        torch.testing.assert_close(guided(model, other, short, 0.0), alone, rtol=0, atol=1e-4)
        # Nor where the first of three has none, and both others fit it.
        maps = encode(toy, adapter, composition("depth"), toy.positive)
        positive = (estimate(model, maps, *point()) + alone) / 2
        expected = 2 * positive - estimate(model, long, *point())
        torch.testing.assert_close(guided(model, [*maps, *short], long, 2.0), expected, rtol=0, atol=1e-4)

    def test_an_area_of_the_positive_leaves_the_negative_alone(self, toy, adapter, model):
        area = {"area": (16, 8, 0, 0)}

        def sides(positive):
            return [[states, {**extras, **area}] for states, extras in positive], toy.negative

        composed = guided(model, *sides(encode(toy, adapter, composition(), toy.positive)), 0.0)
        plain = guided(toy.model, *sides(toy.positive), 0.0)
        torch.testing.assert_close(composed, plain, rtol=0, atol=1e-4)
        # And a negative's own composition stays in its share of the area.
        negative = encode(toy, adapter, composition("depth"), toy.negative)
        own = guided(model, sides(toy.positive)[0], negative, 0.0)
        assert not torch.allclose(own[..., :8], plain[..., :8], atol=1e-3)

    def test_batches_and_odd_sizes(self, toy, adapter, model):
        given = composition(size=(SIDE, SIDE))
        from conceptloom.compositions.composition import align

        odd = encode(toy, adapter, align(given, (104, 136)))
        assert torch.isfinite(toy.sample(model, positive=odd, size=(13, 17))).all()
        positive = encode(toy, adapter, given)
        x, sigma = point(batch=3)
        together = estimate(model, positive, x, sigma)
        for i in range(3):
            torch.testing.assert_close(
                together[i : i + 1], estimate(model, positive, x[i : i + 1], sigma), atol=1e-4, rtol=0
            )

    def test_loading_it_twice_does_not_add_twice(self, toy, adapter, model):
        from conceptloom.host.composer.adapter import prepared

        positive = encode(toy, adapter, composition())
        assert torch.equal(toy.sample(prepared(model), positive=positive), toy.sample(model, positive=positive))

    def test_it_runs_once_in_a_sampling(self, toy, adapter, model):
        runs = []
        handle = adapter.module.register_forward_hook(lambda *_: runs.append(1))
        try:
            toy.sample(model, positive=encode(toy, adapter, composition()), steps=4)
        finally:
            handle.remove()
        assert len(runs) == 1


def point(sigma=3.0, batch=1):
    """Latents at a noise level."""
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(2)) * sigma, torch.tensor([sigma])


def estimate(model, positive, x, sigma):
    """What a MODEL predicts of x at a noise level, in a sampling."""
    import comfy.samplers

    found, guider = [], comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)

    def once(denoise, x, sigmas, extra_args, **_):
        found.append(denoise(given, sigma.expand(len(given)), **extra_args))
        return x

    given = x
    guider.sample(x, torch.zeros_like(x), comfy.samplers.KSAMPLER(once), torch.tensor([float(sigma), 0.0]))
    return found[0]


def test_the_trained_adapter_is_the_sampled_one(host, tmp_path):
    """diffusers' UNet with the training's hooks against ComfyUI's with its file, of one composition with all
    representations."""
    pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")
    from conceptloom.compositions.composition import CAPTION, SEMANTICS, Caption
    from conceptloom.compositions.inputs import conditions_of, local_map
    from conceptloom.encoders.composer_adapter import LOCAL_CHANNELS, save
    from conceptloom.host import shapeland
    from conceptloom.host.composer.adapter import encode, load, prepared
    from conceptloom.nodes.compositions import look
    from conceptloom.training.base import open_base
    from conceptloom.training.composer.model import ComposerTraining, config_of

    base = open_base("shapeland")
    training = ComposerTraining(base, config_of(base, "Shapeland", "levels", 8, 8)).eval()
    for p in training.adapter.parameters():
        # Of values that the file holds.
        p.data = torch.nn.init.normal_(p, std=0.05).half().float()
    save(training.adapter, tmp_path / "adapter.safetensors")
    caption, t = "a star on a navy background", 600
    with torch.inference_mode():
        model, clip, vision = shapeland.load_model(), shapeland.load_clip(), shapeland.load_clip_vision()
        adapter = load(str(tmp_path / "adapter.safetensors"), model)
        assert adapter.module.config.prediction == "v_prediction"
        given = composition(*LOCALS, "palette", size=(64, 64))
        given = given.with_part(CAPTION, Caption(((caption, 1.0),))).with_part(
            SEMANTICS, look(vision, given["mask"].image)
        )
        positive = encode(adapter, clip, given)
        sigma = model.model.model_sampling.sigma(torch.tensor([float(t)]))
        x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(2)) * sigma
        sampled = estimate(prepared(model), positive, x, sigma)
        plain = estimate(model, clip.encode_from_tokens_scheduled(clip.tokenize(caption)), x, sigma)

        batch = {name: local_map(name, given[name]) for name in LOCAL_CHANNELS}
        batch |= {"target": given["mask"].image.movedim(-1, 0)[None] * 2 - 1, "kept": torch.ones(1, 8)}
        batch["palette"] = conditions_of(given).globals["palette"]
        states, sentences = training.read(torch.tensor([[base.vocabularies[0].row(caption)]]))
        features = training.adapter(training.conditions(batch, sentences), (16, 16))
        noisy = x / (1 + sigma**2).sqrt()
        v = training.predict(noisy, torch.tensor([t]), states, features)
        trained = x / (1 + sigma**2) - v * sigma / (1 + sigma**2).sqrt()
    far = float((plain - sampled).norm())
    assert far > 0.5 and float((trained - sampled).norm()) < 2e-3 * far


class TestCaptions:
    def test_a_mixture_is_the_mean_of_its_texts(self, toy):
        from conceptloom.compositions.composition import Caption
        from conceptloom.host.composer.adapter import encode_caption

        a, b = (toy.clip.encode_from_tokens_scheduled(text)[0] for text in ("a dog", "a hat"))
        ((states, extras),) = encode_caption(toy.clip, Caption((("a dog", 0.25), ("a hat", 0.75))))
        torch.testing.assert_close(states, 0.25 * a[0] + 0.75 * b[0])
        torch.testing.assert_close(extras["pooled_output"], 0.25 * a[1]["pooled_output"] + 0.75 * b[1]["pooled_output"])
        long = "a hat " + "and a hat " * 8
        ((states, _),) = encode_caption(toy.clip, Caption((("a dog", 0.5), (long, 0.5))))
        empty = toy.clip.encode_from_tokens_scheduled("")[0][0]
        torch.testing.assert_close(
            states, (torch.cat([a[0], empty], 1) + toy.clip.encode_from_tokens_scheduled(long)[0][0]) / 2
        )

    def test_a_conditioning_stands_in_for_the_caption(self, toy, adapter):
        found = encode(toy, adapter, composition(), toy.positive)
        assert torch.equal(found[0][0], toy.positive[0][0])


class TestRefusals:
    def test_a_model_that_is_not_prepared(self, toy, adapter):
        with pytest.raises(ValueError, match="Composer Conditioning: model: expected one from Load Composer Adapter"):
            toy.sample(positive=encode(toy, adapter, composition()))

    def test_a_model_that_is_not_prepared_for_a_part_of_the_schedule(self, toy, adapter):
        late = [[s, {**extras, "start_percent": 0.0}] for s, extras in encode(toy, adapter, composition())]
        with pytest.raises(ValueError, match="Composer Conditioning: model: expected one from Load Composer Adapter"):
            toy.sample(positive=late)

    def test_a_second_composition_another_model_and_another_text_encoder(self, toy, adapter, model):
        with pytest.raises(
            ValueError, match="^conditioning: expected one without a composition, got one with it; conn"
        ):
            encode(toy, adapter, composition(), encode(toy, adapter, composition()))
        with pytest.raises(ValueError, match="^clip: expected a text encoder with sentences of width 768 for this"):
            encode(toy, make_adapter(sentence_width=768), composition())
        other = make_adapter(levels=(64, 64, 128, 128))
        with pytest.raises(ValueError, match="^Composer Conditioning: model: expected one for this adapter"):
            toy.sample(model, positive=encode(toy, other, composition()))

    def test_what_the_adapter_does_not_understand(self, toy, model):
        from conceptloom.compositions.palette import palette_of_picture

        def colored(table="156 colors", sigma=10.0):
            return composition("depth").with_part(
                "palette", palette_of_picture(torch.rand(8, 8, 3), None, table, sigma)
            )

        other = "expected a palette of 156 colors for this adapter, got one of"
        for adapter, given, said in (
            (make_adapter(semantics_width=8), composition(), "expected semantics of width 8 for this adapter, got 16"),
            (make_adapter(table="another"), composition(), other),
            (make_adapter(table=""), colored("180 colors"), f"{other} 180 colors"),
            (make_adapter(), colored(sigma=5.0), "expected a palette of sigma 10 for this adapter, got 5"),
        ):
            with pytest.raises(ValueError, match=f"^composition: {said}"):
                encode(toy, adapter, given)

    def test_maps_of_another_shape(self, toy, adapter, model):
        wide = encode(toy, adapter, composition("depth", size=(128, 192)))
        said = r"composition: expected the shape of the latent \(16x16\), got 192x128; connect Align Composition"
        with pytest.raises(ValueError, match=f"^Composer Conditioning: {said}"):
            toy.sample(model, positive=wide)
        colors = encode(toy, adapter, composition("palette", size=(128, 192)))
        assert torch.isfinite(toy.sample(model, positive=colors)).all()

    def test_another_model(self, toy):
        from conceptloom.host.composer.adapter import checked

        assert checked(make_adapter().module, toy.model)
        for changes in ({"context_width": 768}, {"levels": (320, 640, 1280, 1280)}):
            with pytest.raises(
                ValueError, match="model: expected one for this adapter .*, got a model of text width 64"
            ):
                checked(make_adapter(**changes).module, toy.model)
        assert checked(make_adapter(prediction="epsilon").module, toy.model)
        said = "model: expected one that predicts v_prediction for this adapter, got one that predicts epsilon"
        with pytest.raises(ValueError, match=said):
            checked(make_adapter(prediction="v_prediction").module, toy.model)


def guided(model, positive, negative, cfg):
    """The guided estimate at a noise level."""
    import comfy.samplers

    found, (x, sigma) = [], point()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)

    def once(denoise, _x, sigmas, extra_args, **_):
        found.append(denoise(x, sigma, **extra_args))
        return x

    guider.sample(x, torch.zeros_like(x), comfy.samplers.KSAMPLER(once), torch.tensor([float(sigma), 0.0]))
    return found[0]


class TestGuidance:
    def test_it_is_the_papers_formula(self, toy, adapter, model):
        """w eps(c2) + (1 - w) eps(c1), for estimates as well."""
        from conceptloom.host.composer.guidance import guider_between

        one, two = composition("caption", "depth"), composition("caption", "depth", "palette")
        x, sigma = point()
        alone = [estimate(model, encode(toy, adapter, given), x, sigma) for given in (one, two)]

        def guided(scale):
            import comfy.samplers

            found = []

            def once(denoise, _x, sigmas, extra_args, **_):
                found.append(denoise(x, sigma, **extra_args))
                return x

            guider = guider_between(model, adapter, toy.clip, one, two, scale)
            guider.sample(x, torch.zeros_like(x), comfy.samplers.KSAMPLER(once), torch.tensor([3.0, 0.0]))
            return found[0]

        # In one batch, which rounds differently.
        torch.testing.assert_close(guided(1.0), alone[1], rtol=0, atol=1e-4)
        torch.testing.assert_close(guided(0.0), alone[0], rtol=0, atol=1e-4)
        # Not further: the rounding of each grows with the scale.
        torch.testing.assert_close(guided(2.0), 2 * alone[1] - alone[0], rtol=0, atol=1e-4)

    def test_an_edit_without_a_change_is_the_reconstruction(self, toy, adapter, model):
        from conceptloom.host.composer.guidance import edit

        latent = {
            "samples": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5)),
            "batch_index": [0, 1],
        }
        source = encode(toy, adapter, composition())
        target = encode(toy, adapter, composition("caption", "depth", seed=3))

        def edited(target, **changes):
            return edit(model, latent, source, target, toy.negative, 3, "ddim_uniform", **changes)

        same, other = edited(source), edited(target)
        assert same.latent["batch_index"] == [0, 1] and same.error == other.error
        far = [float((one.latent["samples"] - same.reconstruction["samples"]).norm()) for one in (same, other)]
        assert far[0] < 1e-2 * far[1]
        assert not torch.equal(edited(target, cfg=4.0).latent["samples"], other.latent["samples"])


class TestPrior:
    @pytest.fixture(scope="class")
    def parts(self, host):
        """Shapeland's CLIP, and a prior of its width with random weights."""
        from conceptloom.encoders.caption_prior import CaptionPrior, PriorConfig
        from conceptloom.host.composer.prior import wrap
        from conceptloom.host.shapeland import load_clip

        torch.manual_seed(0)
        net = CaptionPrior(PriorConfig(128, 32, 2, 2)).eval().requires_grad_(False)
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        with torch.inference_mode():
            return wrap(net), load_clip()

    def test_it_reads_the_text_as_in_training(self, parts):
        from conceptloom.host.composer.prior import draw
        from conceptloom.training.base import open_base
        from conceptloom.training.prior.model import PriorTraining

        prior, clip = parts
        training = PriorTraining(open_base("shapeland"), 32, 2, 1)
        seen = []
        handle = prior.module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
        try:
            draw(prior, clip, "a star on a navy background", 2, 0, 1, 3.0)
        finally:
            handle.remove()
        _, t, sentences, states, mask = seen[0]
        rows = [training.vocabulary.row(text) for text in ("a star on a navy background", "")]
        expected = training.read(torch.tensor(rows))
        assert t.tolist() == [999] * 4
        for given, own in zip((sentences, states, mask), expected, strict=True):
            # Text towers are in half precision in ComfyUI.
            torch.testing.assert_close(given[::2].float(), own.float(), rtol=0, atol=5e-3)

    def test_what_models_of_pictures_take_of_the_text_encoder_does_not_matter(self, parts, monkeypatch):
        """As of CLIP bigG, whose file has the tokenizers of both encoders of SDXL, and whose states are those of the
        layer before the last without the norm, with the pooled one projected already."""
        from conceptloom.host.composer.prior import draw

        prior, clip = parts
        expected = draw(prior, clip, "a star", 1, 0, 1, 1.0)[0].embedding
        encoder, tokenize = clip.cond_stage_model.clip_l, clip.tokenize
        settings = {
            "layer": "hidden",
            "layer_idx": -2,
            "return_projected_pooled": True,
            "options_default": ("hidden", -2, True),
        }
        for name, value in {**settings, "layer_norm_hidden_state": False}.items():
            monkeypatch.setattr(encoder, name, value)
        monkeypatch.setattr(clip, "tokenize", lambda text: {"g": tokenize(text)["l"], **tokenize(text)})
        assert torch.equal(draw(prior, clip, "a star", 1, 0, 1, 1.0)[0].embedding, expected)
        assert (encoder.layer, encoder.layer_idx, encoder.return_projected_pooled) == ("hidden", -2, True)

    def test_what_it_does_not_read_of_a_caption_is_said(self, parts, caplog):
        from conceptloom.host.composer.prior import draw

        def said(caption):
            caplog.clear()
            draw(*parts, caption, 1, 0, 1, 1.0)
            return [record.message for record in caplog.records]

        assert said("a star") == []
        assert said("a star on a mat " * 20) == [
            "Caption Prior: reads the first 75 tokens of the caption; the rest says nothing here"
        ]
        assert said("a (star:1.5)") == ["Caption Prior: reads the caption without weights such as (word:1.2)"]

    def test_draws_differ_by_seed_and_follow_guidance(self, parts):
        from conceptloom.host.composer.prior import draw

        def drawn(seed, guidance=3.0, count=2, caption="a star on a navy background"):
            return torch.stack([one.embedding for one in draw(*parts, caption, count, seed, 4, guidance)])

        one = drawn(0)
        assert torch.equal(one, drawn(0)) and not torch.equal(one[0], one[1])
        assert not torch.equal(one, drawn(1))
        torch.testing.assert_close(drawn(0, caption=""), drawn(0, 1.0, caption=""), rtol=0, atol=1e-4)
        assert not torch.equal(one, drawn(0, 1.0))

    def test_another_text_encoder_is_refused(self, parts):
        from conceptloom.encoders.caption_prior import CaptionPrior, PriorConfig
        from conceptloom.host.composer.prior import draw, wrap

        other = wrap(CaptionPrior(PriorConfig(64, 32, 2, 1)))
        with pytest.raises(
            ValueError, match="clip: expected a text encoder of width 64 for this prior, got one of 128 to"
        ):
            draw(other, parts[1], "a star", 1, 0, 1, 1.0)
