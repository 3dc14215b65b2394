"""FreeCustom on a toy of SD 1.5's topology, through the host's own samplers (spec: oracles 12 to 21)."""

import gc
import math
import weakref

import pytest
import torch


def close(a, b, tolerance=2e-5):
    """Equal within a tolerance relative to the size of the values."""
    return float((a - b).abs().max() / b.abs().max()) <= tolerance


def differs(a, b):
    return float((a - b).abs().max() / b.abs().max()) > 1e-3


@pytest.fixture
def plain(toy):
    return toy.sample()


class TestUntouched:
    """Oracle 12."""

    def test_nothing_to_see_gives_the_hosts_bits(self, toy, plain):
        for model in (
            toy.apply(),
            toy.apply(toy.subject(weight=0.0)),
            toy.apply(toy.subject(weight=0.0), toy.subject(1, weight=0.0), formula="paper"),
            toy.apply(toy.subject(), start_percent=1.0),
        ):
            assert torch.equal(toy.sample(model), plain)
            assert toy.rows == [2] * toy.steps

    def test_references_change_the_picture_and_nothing_else(self, toy, plain):
        before = repr(toy.model.model_options), dict(toy.model.wrappers), dict(toy.model.attachments)
        model = toy.apply(toy.subject())
        assert differs(toy.sample(model), plain)
        assert (repr(toy.model.model_options), toy.model.wrappers, toy.model.attachments) == before
        assert torch.equal(toy.sample(), plain)

    def test_same_run_twice(self, toy):
        model = toy.apply(toy.subject(), toy.subject(1))
        assert torch.equal(toy.sample(model), toy.sample(model))

    def test_the_samplers_random_numbers_stay_as_they_are(self, toy):
        toy.sample(sampler="euler_ancestral")
        state = torch.get_rng_state()
        toy.sample(toy.apply(toy.subject(), toy.subject(1)), sampler="euler_ancestral")
        assert torch.equal(torch.get_rng_state(), state)


def naive_batch(toy, subjects, style_fidelity, formula="official", cfg=5.0, seed=3):
    """The published algorithm from its equations: picture and references in one batch, masks as logits.

    Rows are [uncond picture, uncond references, cond picture, cond references]; references are noised afresh
    before each step, and their results are thrown away.
    """
    import comfy.sample
    import comfy.samplers
    from conceptloom.host.freecustom.references import reference_noise

    n = len(subjects)
    pixels = torch.stack([s.image for s in subjects])
    z0 = toy.base.process_latent_in(toy.vae.encode(pixels))
    context = torch.cat(
        [toy.negative[0][0]] * (1 + n)
        + [toy.positive[0][0]]
        + [toy.clip.encode_from_tokens_scheduled(s.prompt)[0][0] for s in subjects]
    )

    def layer(q, k, v, options):
        h, w = options["activations_shape"][-2:]
        heads = options["n_heads"]
        q, k, v = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        out = logits.softmax(-1) @ v
        masks = torch.cat([s.mask[:: 128 // h, :: 128 // w].reshape(-1) for s in subjects]).double()
        weights = torch.cat([torch.full((h * w,), s.weight) for s in subjects]).double()
        for row, is_cond in ((0, False), (1 + n, True)):
            keys = k[row + 1 : row + 1 + n].transpose(0, 1).flatten(1, 2)
            values = v[row + 1 : row + 1 + n].transpose(0, 1).flatten(1, 2)
            s = q[row] @ keys.mT / math.sqrt(q.shape[-1])
            s = torch.where(masks > 0, s + weights, -math.inf) if formula == "official" else s * masks * weights
            mixed = torch.cat([logits[row], s], -1).softmax(-1) @ torch.cat([v[row], values], -2)
            out[row] = mixed if is_cond else (1 - style_fidelity) * mixed + style_fidelity * out[row]
        return out.transpose(1, 2).flatten(2).float()

    layers = {("output", i, 0): layer for i in range(6, 12)}
    sigmas = comfy.samplers.calculate_sigmas(toy.base.model_sampling, "sgm_uniform", toy.steps)
    noise = comfy.sample.prepare_noise(torch.zeros(1, 4, 16, 16), seed)
    x = toy.base.model_sampling.noise_scaling(sigmas[0], noise, torch.zeros_like(noise), True)
    for i in range(toy.steps):
        eps = torch.cat([reference_noise(0, i, r, (4, 16, 16)) for r in range(n)])
        rows = torch.cat([x, z0 + sigmas[i] * eps] * 2)
        denoised = toy.base._apply_model(
            rows, sigmas[i].repeat(len(rows)), None, context, None, {"patches_replace": {"attn1": dict(layers)}}
        )
        guided = denoised[:1] + cfg * (denoised[1 + n : 2 + n] - denoised[:1])
        x = x + (x - guided) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return toy.base.process_latent_out(x)


@pytest.mark.parametrize("style_fidelity", [1.0, 0.4, 0.0])
def test_equals_the_published_batch(toy, style_fidelity):
    """Oracle 13."""
    subjects = [toy.subject(0), toy.subject(1, weight=2.0), toy.subject(2)]
    ours = toy.sample(toy.apply(*subjects, style_fidelity=style_fidelity))
    assert close(ours, naive_batch(toy, subjects, style_fidelity))


def test_papers_formula_equals_its_batch(toy):
    subjects = [toy.subject(0, weight=1.5), toy.subject(1, weight=1.5)]
    assert close(toy.sample(toy.apply(*subjects, formula="paper")), naive_batch(toy, subjects, 1.0, "paper"))


class TestSelfReference:
    """Oracle 14: a reference that is the picture itself, noised alike, adds nothing but copies of its own keys."""

    @pytest.fixture
    def sample(self, toy):
        import comfy.sample
        import comfy.samplers
        from conceptloom.host.freecustom.references import reference_noise

        subject = toy.subject(mask=None)
        z0 = toy.vae.encode(subject.image[None])

        def sample(**settings):
            weight = settings.pop("weight", 3.0)
            model = toy.apply(toy.subject(mask=None, weight=weight), **settings) if settings else toy.model
            return comfy.sample.sample_custom(
                model,
                reference_noise(0, 0, 0, (4, 16, 16)),
                4.0,
                comfy.samplers.ksampler("euler"),
                torch.tensor([5.0, 0.0]),
                toy.clip.encode_from_tokens_scheduled(subject.prompt),
                toy.negative,
                z0,
                disable_pbar=True,
            )

        return sample

    @pytest.mark.parametrize("weight", [0.5, 3.0, 8.0])
    def test_published_formula_is_plain_at_any_weight(self, sample, weight):
        assert close(sample(style_fidelity=0.0, weight=weight), sample())

    def test_papers_formula_is_plain_at_weight_one_only(self, sample):
        assert close(sample(style_fidelity=0.0, formula="paper", weight=1.0), sample())
        assert differs(sample(style_fidelity=0.0, formula="paper", weight=3.0), sample())


class TestPasses:
    """Oracles 15 and 16: how much of the model runs, and how often."""

    def test_stopping_early_leaves_the_same_keys(self, toy):
        short, long = (toy.apply(toy.subject(), blocks=b, bank_mib=8) for b in ("10-12", "10-15"))
        toy.sample(short)
        toy.sample(long)
        entries = [held_entries(model) for model in (short, long)]
        assert len(entries[0]) == toy.steps and entries[0].keys() == entries[1].keys()
        for name in entries[0]:
            assert len(entries[0][name]) == 3
            assert all(torch.equal(kv, entries[1][name][site]) for site, kv in entries[0][name].items())

    def test_references_stop_at_the_last_layer_that_needs_them(self, toy):
        rows = {8: [], 9: []}
        blocks = toy.base.diffusion_model.output_blocks
        # The host calls a block's layers one by one, so the watch stands on their first.
        hooks = [blocks[i][0].register_forward_pre_hook(lambda _, a, i=i: rows[i].append(len(a[0]))) for i in rows]
        toy.sample(toy.apply(*(toy.subject(i) for i in range(3)), blocks="10-12"))
        for hook in hooks:
            hook.remove()
        assert rows[8].count(3) == rows[9].count(2) == toy.steps and rows[9].count(3) == 0

    @pytest.mark.parametrize(("sampler", "passes"), [("heun", 3), ("dpmpp_2m", 3)])
    def test_one_pass_per_noise_level(self, toy, sampler, passes):
        model = toy.apply(*(toy.subject(i) for i in range(3)))
        toy.sample(model, steps=3, sampler=sampler)
        assert toy.rows.count(3) == passes

    def test_below_full_style_fidelity_the_negative_has_its_own(self, toy):
        subjects = [toy.subject(i) for i in range(3)]
        toy.sample(toy.apply(*subjects, style_fidelity=0.5))
        assert toy.rows.count(3) == 2 * toy.steps
        toy.sample(toy.apply(*subjects, style_fidelity=0.5, negative_references="share positive"))
        assert toy.rows.count(3) == toy.steps

    def test_outside_the_range_there_is_none(self, toy):
        toy.sample(toy.apply(*(toy.subject(i) for i in range(3)), start_percent=0.3, end_percent=0.7), steps=10)
        assert 3 <= toy.rows.count(3) <= 5

    def test_guidance_that_evaluates_again_adds_none(self, toy):
        from comfy_extras.nodes_pag import PerturbedAttentionGuidance
        from comfy_extras.nodes_sag import SelfAttentionGuidance

        model = toy.apply(*(toy.subject(i) for i in range(3)))
        model = PerturbedAttentionGuidance.execute(model, 3.0)[0]
        model = SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]
        toy.sample(model)
        assert toy.rows.count(3) == toy.steps and toy.rows.count(1) == 2 * toy.steps

    def test_subjects_of_one_picture_share_a_row(self, toy):
        from conceptloom.subjects.subject import Subject

        image = toy.subject(0).image
        masks = [torch.zeros(128, 128) for _ in range(2)]
        masks[0][:64], masks[1][64:] = 1, 1
        shared = [Subject(image[..., :3], noun, mask, "two things") for noun, mask in zip("ab", masks, strict=True)]
        together = toy.sample(toy.apply(*shared))
        assert toy.rows == [1, 2] * toy.steps
        whole = toy.sample(toy.apply(Subject(image, "ab", None, "two things")))
        assert close(together, whole)

    def test_long_prompts_and_other_proportions_run_apart(self, toy):
        long = toy.subject(1, prompt="a very " + "long " * 20 + "prompt")
        wide = toy.subject(2, size=(96, 192))
        toy.sample(toy.apply(toy.subject(0), toy.subject(3), long, wide))
        assert toy.rows == [2, 1, 1, 2] * toy.steps


def held_entries(model):
    """What the bank of a model holds, by noise level."""
    from conceptloom.host.freecustom.attention import KEY

    return {
        entry[0]: {site.index: kv for site, kv in tensors.items()}
        for group in model.get_attachment(KEY).bank.groups.values()
        for entry, tensors in group.entries.items()
    }


class TestBank:
    def test_further_seeds_and_prompts_run_no_reference_pass_and_give_the_same_bits(self, toy):
        subjects = [toy.subject(i) for i in range(3)]
        with_bank, without = toy.apply(*subjects, bank_mib=64), toy.apply(*subjects)
        other = toy.clip.encode_from_tokens_scheduled("something else")
        for changes, passes in (
            ({}, toy.steps),
            ({"seed": 9}, 0),
            ({"positive": other}, 0),
            ({"negative": other, "cfg": 3.0}, 0),
        ):
            banked = toy.sample(with_bank, **changes)
            assert toy.rows.count(3) == passes
            assert torch.equal(banked, toy.sample(without, **changes))

    def test_what_references_depend_on_runs_them_again(self, toy):
        subjects = [toy.subject(i) for i in range(3)]
        model = toy.apply(*subjects, bank_mib=64)
        toy.sample(model)
        for changes in ({"steps": 3}, {"size": (16, 24)}, {"scheduler": "karras"}):
            toy.sample(model, **changes)
            assert toy.rows.count(3) == changes.get("steps", toy.steps), changes
        assert toy.sample(model) is not None and toy.rows.count(3) == 0

    def test_lora_makes_its_own_entries(self, toy):
        subjects = [toy.subject(i) for i in range(3)]
        model = toy.apply(*subjects, bank_mib=64)
        without = toy.sample(model)
        lora = toy.lora(model)
        picture = toy.sample(lora)
        assert toy.rows.count(3) == toy.steps and differs(picture, without)
        assert torch.equal(picture, toy.sample(toy.apply(*subjects, model=toy.lora(toy.model))))
        for known in (lora, model):
            toy.sample(known)
            assert toy.rows.count(3) == 0

    def test_other_sampling_of_the_model_makes_its_own_entries(self, toy):
        from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

        model = toy.apply(*(toy.subject(i) for i in range(3)), bank_mib=64)
        toy.sample(model)
        toy.sample(ModelSamplingDiscrete().patch(model, "v_prediction", False)[0])
        assert toy.rows.count(3) == toy.steps

    def test_following_the_samplers_seed_keeps_nothing_between_seeds(self, toy):
        model = toy.apply(*(toy.subject(i) for i in range(3)), bank_mib=64, reference_seed=-1)
        first = toy.sample(model)
        toy.sample(model, seed=4)
        assert toy.rows.count(3) == toy.steps
        fixed = toy.sample(toy.apply(*(toy.subject(i) for i in range(3)), reference_seed=3))
        assert torch.equal(first, fixed)

    def test_negative_prompt_counts_when_references_see_it(self, toy):
        model = toy.apply(*(toy.subject(i) for i in range(3)), bank_mib=64, style_fidelity=0.5)
        toy.sample(model)
        toy.sample(model, seed=8)
        assert toy.rows.count(3) == 0
        toy.sample(model, negative=toy.clip.encode_from_tokens_scheduled("ugly"))
        assert toy.rows.count(3) == 2 * toy.steps

    def test_less_memory_in_between_splits_the_passes_and_changes_nothing(self, toy, monkeypatch):
        """The order of keys follows the batches, so entries of both must not meet."""
        model = toy.apply(*(toy.subject(i, weight=1.5) for i in range(3)), bank_mib=64, formula="paper")
        together = toy.sample(model)
        with monkeypatch.context() as tight:
            tight.setattr(toy.base, "memory_required", lambda shape, **_: 1e15 if shape[0] > 2 else 0)
            apart = toy.sample(model)
            assert toy.rows == [2, 1, 2] * toy.steps
        assert close(apart, together)

    def test_limit_holds_and_the_rest_is_computed(self, toy):
        from conceptloom.host.freecustom.attention import KEY

        subjects = [toy.subject(i, mask=None) for i in range(3)]
        plenty = toy.apply(*subjects, bank_mib=64)
        whole = toy.sample(plenty)
        needed = plenty.get_attachment(KEY).bank.size
        assert needed > 1 << 20
        tight = toy.apply(*subjects, bank_mib=1)
        fits = (1 << 20) // (needed // toy.steps)
        assert 0 < fits < toy.steps
        for passes in (toy.steps, toy.steps - fits, toy.steps - fits):
            picture = toy.sample(tight)
            assert toy.rows.count(3) == passes
            assert tight.get_attachment(KEY).bank.size <= 1 << 20
            assert torch.equal(picture, whole)

    def test_oldest_configuration_goes_first(self):
        from conceptloom.host.freecustom.bank import RAM, Bank

        bank = Bank(100, RAM)
        for name in "abc":
            bank.put(bank.open((name,), ()), (1,), {0: torch.zeros(40, dtype=torch.uint8)})
        assert [key[0] for key in bank.groups] == ["b", "c"]
        # What does not fit at all is not kept, nor is what was made for it.
        for name in "de":
            bank.put(bank.open((name,), ()), (1,), {0: torch.zeros(101, dtype=torch.uint8)})
        assert [key[0] for key in bank.groups] == ["b", "c", "e"]
        bank.open(("b",), ())
        bank.put(bank.open(("d",), ()), (1,), {0: torch.zeros(40, dtype=torch.uint8)})
        assert [key[0] for key in bank.groups] == ["b", "d"] and bank.size == 80
        group = bank.open(("d",), ())
        bank.put(group, (2,), {0: torch.zeros(80, dtype=torch.uint8)})
        assert list(group.entries) == [(1,)]


class TestFreed:
    """Oracle 20."""

    @pytest.fixture
    def tensors(self, monkeypatch):
        """Weak references to all keys and values that a run takes from references."""
        from conceptloom.attention.mrsa import KeyPlan

        seen, collect = [], KeyPlan.collect

        def watched(self, k, v):
            keys, values = collect(self, k, v)
            seen.extend((weakref.ref(keys), weakref.ref(values)))
            return keys, values

        monkeypatch.setattr(KeyPlan, "collect", watched)
        stack = torch.stack

        def stacked(tensors, *args, **kwargs):
            out = stack(tensors, *args, **kwargs)
            seen.append(weakref.ref(out))
            return out

        monkeypatch.setattr("conceptloom.host.freecustom.references.torch.stack", stacked)
        return seen

    @staticmethod
    def alive(seen):
        gc.collect()
        return sum(ref() is not None for ref in seen)

    def test_nothing_lives_on_after_a_run(self, toy, tensors):
        model = toy.apply(toy.subject())
        toy.sample(model)
        assert tensors and self.alive(tensors) == 0

    def test_nothing_lives_on_after_a_failure_and_the_next_run_is_clean(self, toy, tensors):
        model = toy.apply(toy.subject())
        whole = toy.sample(model)

        def fail(step, *_):
            if step == 0:
                raise KeyboardInterrupt

        options = repr(model.model_options)
        with pytest.raises(KeyboardInterrupt) as caught:
            toy.sample(model, callback=fail)
        assert caught.tb is not None, "the host keeps the traceback for a while, and with it all frames"
        assert self.alive(tensors) == 0
        assert repr(model.model_options) == options
        assert torch.equal(toy.sample(model), whole)

    def test_the_bank_goes_with_the_model(self, toy, tensors):
        model = toy.apply(toy.subject(), bank_mib=64)
        toy.sample(model)
        assert self.alive(tensors) > 0
        clone = model.clone()
        del model
        assert self.alive(tensors) > 0
        del clone
        assert self.alive(tensors) == 0


class TestBlocks:
    """Oracle 21: presets against the layer table, from the models' own structure."""

    CONFIGS = {
        "sd15": ({}, [(6, 9), (9, 12)], 1),
        "sd21": ({"context_dim": 1024, "use_linear_in_transformer": True}, [(6, 9), (9, 12)], 1),
        "sdxl": (
            {
                "channel_mult": [1, 2, 4],
                "num_res_blocks": [2, 2, 2],
                "transformer_depth": [0, 0, 2, 2, 10, 10],
                "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
                "transformer_depth_middle": 10,
                "context_dim": 2048,
                "use_linear_in_transformer": True,
                "adm_in_channels": 2816,
                "num_classes": "sequential",
            },
            [(0, 3), (3, 6)],
            None,
        ),
    }

    def sites(self, name):
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
        from conceptloom.evaluation.rigs import SD15_UNET
        from conceptloom.host.model.families.unet import UNetFamily

        changes, _, _ = self.CONFIGS[name]
        config = {**SD15_UNET, "num_heads": -1, "num_head_channels": 64, **changes}
        import comfy.ops

        return UNetFamily().sites(UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init))

    @pytest.mark.parametrize("name", ["sd15", "sd21"])
    def test_sixteen_layers(self, host, name):
        from conceptloom.host.model import sites as places

        sites = self.sites(name)
        own = [site for site in sites if site.kind == places.SELF]
        inputs = [f"input.{i}.0" for i in (1, 2, 4, 5, 7, 8)]
        assert [s.key for s in own] == [*inputs, "middle.0.0", *(f"output.{i}.0" for i in range(3, 12))]
        assert [s.block for s in own if s.in_decoder] == list(range(3, 12))
        assert {s.in_decoder for s in own[:7]} == {False}
        assert [s.key for s in sites if s.kind == places.CROSS] == [s.key for s in own]
        expected = {
            places.LAST_TWO_STAGES: range(10, 16),
            places.STAGE_BEFORE_LAST: range(10, 13),
            places.LAST_STAGE: range(13, 16),
            places.ALL_BLOCKS: range(16),
            "10-12, 15": [10, 11, 12, 15],
        }
        for blocks, layers in expected.items():
            assert [s.index for s in places.choose_self_attention(sites, blocks)] == list(layers)

    def test_seventy_layers_of_sdxl(self, host):
        from conceptloom.host.model import sites as places

        sites = self.sites("sdxl")
        own = [site for site in sites if site.kind == places.SELF]
        assert len(own) == 70
        assert own[4].key == "input.7.0" and own[33].key == "middle.0.9" and own[63].key == "output.2.9"
        assert [s.index for s in places.choose_self_attention(sites, places.LAST_TWO_STAGES)] == list(range(34, 70))
        assert [s.index for s in places.choose_self_attention(sites, places.LAST_STAGE)] == list(range(64, 70))


@pytest.mark.parametrize("name", ["attention_basic", "attention_pytorch", "attention_split", "attention_sub_quad"])
def test_every_kernel_adds_the_bias(host, name, monkeypatch):
    """Oracle 10."""
    from comfy.ldm.modules import attention
    from conceptloom.host.model.sites import host_attention

    q, k, v = torch.randn(2, 256, 160), torch.randn(2, 400, 160), torch.randn(2, 400, 160)
    bias = torch.randn(1, 1, 1, 400)
    monkeypatch.setattr(attention, "optimized_attention", getattr(attention, name))
    heads = [x.double().unflatten(-1, (4, -1)).transpose(1, 2) for x in (q, k, v)]
    logits = heads[0] @ heads[1].mT / math.sqrt(40) + bias
    expected = (logits.softmax(-1) @ heads[2]).transpose(1, 2).flatten(2)
    assert (host_attention(q, k, v, bias, heads=4, options={}) - expected).abs().max() < 2e-6


def test_kernels_that_drop_a_bias_are_not_given_one(host, monkeypatch):
    from comfy.ldm.modules import attention
    from conceptloom.host.model.sites import host_attention

    def flash(q, k, v, heads, mask=None, **_):
        assert mask is None
        return q

    monkeypatch.setattr(attention, "optimized_attention", flash)
    q, bias = torch.randn(1, 8, 16), torch.zeros(1, 1, 1, 8)
    assert host_attention(q, q, q, heads=2, options={}) is q
    assert not torch.equal(host_attention(q, q, q, bias, heads=2, options={}), q)
