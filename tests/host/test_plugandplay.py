"""Plug-and-Play injection on the host, against the same features copied by plain hooks on the modules."""

from contextlib import contextmanager

import pytest
import torch

STEPS = 3


@contextmanager
def hooked(pairs):
    """Forward hooks on modules for as long as the block runs."""
    handles = [module.register_forward_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def places(toy, numbers, branch=4):
    """The modules whose outputs Plug-and-Play copies: residual branch, queries, keys."""
    blocks = toy.base.diffusion_model.output_blocks
    attentions = [blocks[n][1].transformer_blocks[0].attn1 for n in numbers]
    return [blocks[branch][0].out_layers[-1]], [linear for a in attentions for linear in (a.to_q, a.to_k)]


def naive(toy, source, numbers, residual_until, attention_until):
    """The model with a wrapper that runs the source ahead of each call and copies its features into all rows."""
    branch, linears = places(toy, numbers)
    prompt = source.conditioning[0][0]
    calls = []

    def wrapper(apply_model, arguments):
        x, sigma, c = arguments["input"], arguments["timestep"], arguments["c"]
        levels = c["transformer_options"]["sample_sigmas"]
        step = int((levels[:-1] >= sigma[0] * (1 - 1e-4)).sum()) - 1
        chosen = (branch if step < residual_until else []) + (linears if step < attention_until else [])
        calls.append(step)
        seen = {}
        start = source.trajectory.at(float(sigma[0])).to(x)
        with hooked([(m, lambda m, _, out: seen.__setitem__(m, out.clone())) for m in chosen]):
            apply_model(start, sigma[:1].repeat(len(start)), c_crossattn=prompt.repeat(len(start), 1, 1))

        def copy(module, _, out):
            return seen[module].repeat(len(out) // len(start), *(1,) * (out.ndim - 1))

        with hooked([(m, copy) for m in chosen]):
            return apply_model(x, sigma, **c)

    model = toy.model.clone()
    model.set_model_unet_function_wrapper(wrapper)
    return model


@pytest.fixture
def source(toy):
    from conceptloom.host.structure.inversion import SourceTrajectory
    from conceptloom.samplers.inversion import Trajectory

    def make(batch=1, size=(16, 16), levels=(0.0, 0.5, 2.0, 8.0, 15.0)):
        generator = torch.Generator().manual_seed(4)
        picture, noise = torch.randn(2, batch, 4, *size, generator=generator)
        latents = torch.stack([picture + level * noise for level in levels])
        return SourceTrajectory(
            Trajectory(levels, latents), toy.clip.encode_from_tokens_scheduled("the source"), error=0.0
        )

    return make


def apply(toy, source, model=None, **settings):
    from conceptloom.host.structure.plugandplay import InjectionSettings, apply

    return apply(toy.model if model is None else model, source, InjectionSettings(**settings))


def comfy_levels(toy, steps):
    """The schedule of the toy's sampling."""
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(toy.base.model_sampling, "sgm_uniform", steps)


class TestFeatures:
    @pytest.mark.parametrize(
        ("blocks", "numbers"),
        [
            ("three blocks (paper)", (4, 7, 9)),
            ("all from the second on (published code)", range(4, 12)),
            ("3, 10-11", (3, 10, 11)),
        ],
    )
    def test_they_are_the_sources_at_the_same_noise_level(self, toy, source, blocks, numbers):
        given = source()
        expected = toy.sample(naive(toy, given, numbers, 2, 1), STEPS)
        drawn = toy.sample(apply(toy, given, blocks=blocks), STEPS)
        assert torch.allclose(drawn, expected, atol=1e-5)
        assert not torch.allclose(drawn, toy.sample(steps=STEPS), atol=1e-2)

    @pytest.mark.parametrize(("batch", "pictures", "cfg"), [(1, 2, 5.0), (2, 2, 5.0), (2, 2, 1.0)])
    def test_batches_and_cfg_1(self, toy, source, batch, pictures, cfg):
        given = source(batch)
        expected = toy.sample(naive(toy, given, (4, 7, 9), 2, 1), STEPS, cfg=cfg, batch=pictures)
        drawn = toy.sample(apply(toy, given), STEPS, cfg=cfg, batch=pictures)
        assert torch.allclose(drawn, expected, atol=1e-5)

    def test_odd_sizes(self, toy, source):
        given = source(size=(15, 21))
        expected = toy.sample(naive(toy, given, (4, 7, 9), 2, 1), STEPS, size=(15, 21))
        assert torch.allclose(toy.sample(apply(toy, given), STEPS, size=(15, 21)), expected, atol=1e-5)

    def test_a_source_equal_to_the_picture_changes_nothing(self, toy, source):
        """Oracle P3: one evaluation of a picture that is its own source, with the source's prompt."""
        from conceptloom.host.structure.inversion import SourceTrajectory
        from conceptloom.samplers.inversion import Trajectory

        levels = toy.base.model_sampling.sigma_max.item()
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        plain, same = [], []
        for model, kept in ((toy.model, plain), (None, same)):
            if model is None:
                start = noise * torch.sqrt(torch.tensor(1.0 + levels**2))
                trajectory = Trajectory((0.0, levels), torch.stack([start, start]))
                model = apply(toy, SourceTrajectory(trajectory, toy.positive, 0.0))
            kept.append(toy.sample(model, steps=1, cfg=1.0, seed=3))
        assert torch.allclose(plain[0], same[0], atol=1e-5)

    def test_one_source_pass_serves_conditionings_that_are_evaluated_apart(self, toy, source, monkeypatch):
        """Oracles E6 and E7."""

        together = toy.sample(apply(toy, source()), STEPS)
        assert toy.rows == [1, 2] * 2 + [2]
        monkeypatch.setattr(toy.base, "memory_required", lambda *_, **__: 1e15)
        apart = toy.sample(apply(toy, source()), STEPS)
        assert toy.rows == [1, 1, 1] * 2 + [1, 1]
        assert float((apart - together).norm() / together.norm()) < 2e-5


class TestNothingElse:
    def test_shares_of_zero_are_the_untouched_model(self, toy, source):
        model = apply(toy, source(), residual_until=0.0, attention_until=0.0)
        assert torch.equal(toy.sample(model, STEPS), toy.sample(steps=STEPS))
        assert toy.rows == [2] * STEPS

    def test_reading_a_branch_leaves_the_block_as_it_is(self, toy):
        """Oracle P2."""
        from conceptloom.host.model.families.unet import ResBlockCall

        layer = toy.base.diffusion_model.output_blocks[4][0]
        x = torch.randn(2, layer.channels, 4, 4)
        embedding = torch.randn(2, layer.emb_channels)
        call = ResBlockCall(layer, x, lambda: layer(x, embedding))
        out, branch = call.with_its_branch()
        assert torch.equal(out, layer(x, embedding))
        assert torch.equal(call.with_branch(branch), out)
        assert not layer.out_layers[-1]._forward_hooks

    def test_sites_are_looked_for_once_per_run(self, toy, source, monkeypatch):
        from conceptloom.host.model.families.unet import UNetFamily

        model, walks, walk = apply(toy, source()), [], UNetFamily.sites
        monkeypatch.setattr(UNetFamily, "sites", lambda self, network: walks.append(network) or walk(self, network))
        toy.sample(model, STEPS)
        assert walks == [toy.base.diffusion_model]

    def test_the_model_is_as_before_afterwards(self, toy, source):
        before = toy.sample(steps=STEPS)
        toy.sample(apply(toy, source()), STEPS)
        assert torch.equal(toy.sample(steps=STEPS), before)

    def test_cancelled_in_the_middle_it_leaves_no_trace(self, toy, source):
        from comfy.model_management import InterruptProcessingException

        plain, model = toy.sample(steps=STEPS), apply(toy, source())
        whole = toy.sample(model, STEPS)

        def cancel(step, *_):
            if step == 1:
                raise InterruptProcessingException()

        with pytest.raises(InterruptProcessingException):
            toy.sample(model, STEPS, callback=cancel)
        assert torch.equal(toy.sample(steps=STEPS), plain)
        assert torch.equal(toy.sample(model, STEPS), whole)


class TestCompany:
    def test_another_nodes_layer_patch_is_heard(self, toy, source):
        from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

        def double(layer, x, embedding, *_):
            return layer(x, embedding) * 1.5

        other = toy.model.clone()
        other.set_model_patch((ResBlock, double), "forward_timestep_embed_patch")
        drawn = toy.sample(apply(toy, source(), model=other), STEPS)
        assert not torch.allclose(drawn, toy.sample(apply(toy, source()), STEPS), atol=1e-3)
        alone = toy.sample(apply(toy, source(), model=other, residual_until=0.0, attention_until=0.0), STEPS)
        assert torch.equal(alone, toy.sample(other, STEPS))

    def test_references_of_free_custom_see_the_sources_queries(self, toy, source):
        subject = toy.subject()
        both = toy.sample(apply(toy, source(), model=toy.apply(subject)), STEPS)
        for one in (apply(toy, source()), toy.apply(subject)):
            assert not torch.allclose(both, toy.sample(one, STEPS), atol=1e-3)

    def test_controlnet_acts_on_the_picture_and_not_on_the_source(self, toy, source):
        from comfy.controlnet import ControlBase

        class Control(ControlBase):
            def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
                return {"middle": [torch.full((len(x_noisy), 128, 2, 2), 0.5)], "output": [], "input": []}

            def get_models(self):
                return []

        control, given = Control(), source()
        sides = {
            side: [[c, {**extra, "control": control}] for c, extra in getattr(toy, side)]
            for side in ("positive", "negative")
        }
        drawn = toy.sample(apply(toy, given), STEPS, **sides)
        expected = toy.sample(naive(toy, given, (4, 7, 9), 2, 1), STEPS, **sides)
        assert torch.allclose(drawn, expected, atol=1e-5)
        assert not torch.allclose(drawn, toy.sample(apply(toy, given), STEPS), atol=1e-2)


class TestRefusals:
    def test_more_keys_than_places(self, toy, source):
        from other_packs import controlled, reference_control

        control = reference_control(torch.randn(1, 4, 16, 16))
        with pytest.raises(ValueError, match="model: expected one whose layers see the whole picture and nothing else"):
            toy.sample(apply(toy, source()), STEPS, positive=controlled(control, toy.positive))

    def test_other_noise_levels_than_the_inversions_are_told_of(self, toy, source, caplog):
        caplog.set_level("WARNING")
        schedule = tuple(sorted(float(x) for x in comfy_levels(toy, STEPS)))
        toy.sample(apply(toy, source(levels=schedule)), STEPS)
        assert "other noise levels" not in caplog.text
        toy.sample(apply(toy, source()), STEPS)
        assert "goes by other noise levels than the inversion's" in caplog.text

    def test_noise_that_a_sampler_adds_is_told_of(self, toy, source, caplog):
        import comfy.samplers

        caplog.set_level("WARNING")
        schedule = comfy_levels(toy, STEPS)
        given = source(levels=tuple(sorted(float(x) for x in schedule)))
        latent = given.trajectory.latents[-1]

        def sample(name, noise):
            caplog.clear()
            guider = comfy.samplers.CFGGuider(apply(toy, given))
            guider.set_conds(toy.positive, toy.negative)
            guider.sample(noise, latent, comfy.samplers.sampler_object(name), schedule, disable_pbar=True, seed=0)
            return [record.message for record in caplog.records]

        assert sample("euler", torch.zeros_like(latent)) == []
        (said,) = sample("euler", torch.ones_like(latent))
        assert "adds noise to that of the inversion" in said
        (said,) = sample("euler_ancestral", torch.zeros_like(latent))
        assert "draws fresh noise in every step" in said

    def test_what_only_its_own_sampling_shows(self, toy, source):
        from dataclasses import replace

        from conceptloom.host.model.carried import carry

        ((states, extras),) = toy.positive
        given = replace(source(), conditioning=[[states, carry(extras, "test", 1, "")]])
        with pytest.raises(ValueError, match="trajectory: expected an inversion with a plain prompt, got one with a"):
            toy.sample(apply(toy, given))

    def test_a_trajectory_of_another_model(self, toy, source):
        from dataclasses import replace

        wider = replace(source(), conditioning=[[torch.zeros(1, 7, 96), {}]])
        with pytest.raises(
            ValueError, match="trajectory: expected one that was inverted with this model.*64 wide, got 96"
        ):
            toy.sample(apply(toy, wider), STEPS)

    def test_a_latent_of_another_size(self, toy, source):
        with pytest.raises(
            ValueError, match="Plug-and-Play Injection: latent: expected the size and batch of the inversion"
        ):
            toy.sample(apply(toy, source()), STEPS, size=(16, 24))

    def test_a_batch_that_does_not_fit(self, toy, source):
        with pytest.raises(ValueError, match="size and batch of the inversion"):
            toy.sample(apply(toy, source(2)), STEPS, batch=3)

    def test_blocks_without_attention(self, toy, source):
        with pytest.raises(
            ValueError, match="blocks: expected decoder blocks with attention, of this model 3 to 11, got 1"
        ):
            apply(toy, source(), blocks="1-4")


def test_sdxl_has_its_blocks_one_level_lower(host):
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from conceptloom.evaluation.rigs import sdxl_unet
    from conceptloom.host.model.families.unet import UNetFamily
    from conceptloom.host.structure.plugandplay import PAPER, PUBLISHED, choose_injected

    config = {**sdxl_unet(2), "num_heads": -1, "num_head_channels": 64}
    sites = UNetFamily().sites(UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init))
    for blocks, numbers in ((PAPER, {1, 4}), (PUBLISHED, {1, 2, 3, 4, 5})):
        branch, attention = choose_injected(sites, blocks)
        assert branch.key == "output.1.0"
        assert {site.block for site in attention} == numbers
        assert all(site.kind == "self" for site in attention)


@pytest.mark.parametrize("stages", [((3,), (6, 7), (9,)), ((3,),), ((3,), (6,), (9,), (12,))])
def test_stages_of_one_block_give_that_one(host, stages):
    from conceptloom.host.model.sites import RESIDUAL, SELF, Site
    from conceptloom.host.structure.plugandplay import PAPER, PUBLISHED, choose_injected

    numbers = [(n, i - len(stages)) for i, stage in enumerate(stages) for n in stage]
    sites = [Site(kind, f"output.{n}.0", n, n, True, stage) for kind in (RESIDUAL, SELF) for n, stage in numbers]
    branch, attention = choose_injected(sites, PAPER)
    assert branch.block == 3
    seconds = [stage[-1] for stage in stages[:2]] + [stage[0] for stage in stages[2:3]]
    assert [site.block for site in attention] == seconds
    assert [site.block for site in choose_injected(sites, PUBLISHED)[1]] == [n for n, _ in numbers]
    with pytest.raises(ValueError, match="model: expected one with self-attention in its decoder"):
        choose_injected([], PAPER)
    with pytest.raises(ValueError, match="expected one residual layer in its decoder block 3"):
        choose_injected([site for site in sites if site.kind == SELF], PAPER)


def test_samplers_that_draw_noise_are_known(host):
    """Of all of the host's, told apart by two seeds that lead to two pictures."""
    from types import SimpleNamespace

    import comfy.model_sampling
    import comfy.samplers
    from conceptloom.host.model.noise import adds_noise
    from conceptloom.host.model.window import Window
    from conceptloom.host.profusion.sampler import fusion_sampler

    class Discrete(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.EPS):
        pass

    sampling = Discrete()
    patcher = SimpleNamespace(get_model_object=lambda _name: sampling)
    inner = SimpleNamespace(model_patcher=patcher, model_sampling=sampling)

    class Denoiser:
        inner_model = SimpleNamespace(inner_model=inner, model_patcher=patcher, model_sampling=sampling)

        def __call__(self, x, sigma, model_options, **_):
            for told in model_options.get("sampler_post_cfg_function", []):
                told({"denoised": x * 0.3, "uncond_denoised": x * 0.2, "cond_denoised": x * 0.3})
            return x * 0.3

    noise = 5 * torch.randn(1, 4, 4, 4)
    schedule = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.0])
    for name in comfy.samplers.SAMPLER_NAMES:
        for options in ({}, {"eta": 0.0}) if "ancestral" in name else ({},):
            sampler = comfy.samplers.sampler_object(name)
            sampler.extra_options = {**sampler.extra_options, **options}
            results = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                extra = {"seed": seed, "model_options": {}}
                results.append(
                    sampler.sampler_function(
                        Denoiser(), noise, schedule, extra, None, disable=True, **sampler.extra_options
                    )
                )
            assert adds_noise(sampler) == (not torch.equal(*results)), name
    churning = comfy.samplers.ksampler("euler", {"s_churn": 1.0})
    assert adds_noise(churning) and not adds_noise(object())
    for name, eta, expected in (("euler", 1.0, True), ("euler", 0.0, False), ("euler_ancestral", 0.0, True)):
        assert adds_noise(fusion_sampler(comfy.samplers.sampler_object(name), 1, eta, Window())) == expected
