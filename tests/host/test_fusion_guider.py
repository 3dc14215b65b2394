"""Fusion Guider and Fusion Sampler in the host's sampling: what is evaluated when, and what comes out."""

import pytest
import torch
from conceptloom.samplers.fusion import Levels

STEPS = 3


@pytest.fixture
def draw(toy):
    """Samples with a guider: (guider, sampler, size, batch, mask) to latents; `toy.rows` then counts."""
    import comfy.sample
    import comfy.samplers

    def run(guider, sampler=None, size=(8, 8), batch=1, seed=3, latent=None, mask=None, sigmas=None, callback=None):
        toy.rows.clear()
        latent = torch.zeros(batch, 4, *size) if latent is None else latent
        noise = comfy.sample.prepare_noise(torch.zeros_like(latent), seed)
        if sigmas is None:
            sampling = toy.model.get_model_object("model_sampling")
            sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", STEPS)
        return guider.sample(noise, latent, sampler or base("euler"), sigmas, mask, callback, True, seed)

    return run


def base(name):
    import comfy.samplers

    return comfy.samplers.sampler_object(name)


def fusion(repeats=1, eta=1.0, start=0.0, end=1.0, sampler="euler"):
    from conceptloom.host.model.window import Window
    from conceptloom.host.profusion.sampler import fusion_sampler

    return fusion_sampler(base(sampler), repeats, eta, Window(start, end))


@pytest.fixture
def guide(toy):
    """A FusionGuider of the toy: (subjects, scales) to guider."""
    from conceptloom.host.profusion.guider import FusionGuider, Guidance

    def make(*subjects, model=None, text=None, **scales):
        model, text = toy.model if model is None else model, toy.positive if text is None else text
        return FusionGuider(model, text, toy.negative, subjects, Guidance(**scales))

    return make


@pytest.fixture
def plain(toy):
    """The host's guider of the toy."""
    import comfy.samplers

    def make(positive=None, cfg=5.0):
        guider = comfy.samplers.CFGGuider(toy.model)
        guider.set_conds(toy.positive if positive is None else positive, toy.negative)
        guider.set_cfg(cfg)
        return guider

    return make


@pytest.fixture
def subject(toy):
    """A subject's conditioning, with values of its entry: (text, mask=...)."""

    def make(text="a dog with a red hat", **extras):
        return [[states, {**given, **extras}] for states, given in toy.clip.encode_from_tokens_scheduled(text)]

    return make


def half(left=True, side=16):
    mask = torch.zeros(1, side, side)
    mask[..., : side // 2] = 1
    return mask if left else 1 - mask


def close(a, b, tolerance=1e-5):
    return float((a - b).abs().max() / b.abs().max()) < tolerance


class TestReductions:
    def test_a_subject_without_mask_or_strength_is_the_untouched_host(self, draw, guide, plain, subject):
        expected = draw(plain(cfg=5.0))
        for absent in (subject(mask=torch.zeros(1, 16, 16)), subject(strength=0.0)):
            for sampler in (None, fusion(0), fusion(2)):
                assert torch.equal(draw(guide(absent), sampler), expected)
        assert torch.equal(draw(guide(subject(), subject_scale=0.0), fusion()), expected)

    @pytest.mark.parametrize("name", ["euler", "euler_ancestral", "heun", "dpmpp_2s_ancestral"])
    def test_without_fusion_every_sampler_is_the_hosts(self, draw, guide, subject, name):
        expected = draw(guide(subject()), base(name))
        made = draw(guide(subject()), fusion(0, sampler=name))
        assert torch.equal(made, expected)

    def test_a_subject_that_says_the_text_is_plain_guidance_by_the_sum(self, toy, draw, guide, plain):
        made = draw(guide(toy.positive, subject_scale=3.0, text_scale=2.0))
        assert close(made, draw(plain(cfg=5.0)))

    def test_one_subject_alone_is_plain_guidance(self, draw, guide, plain, subject):
        expected = draw(plain(subject(), cfg=3.0))
        assert torch.equal(draw(guide(subject(), subject_scale=3.0, text_scale=0.0)), expected)

    def test_a_foreign_guider_gets_its_noise_renewed(self, draw, plain):
        made = draw(plain(), fusion())
        assert not close(made, draw(plain())) and torch.isfinite(made).all()


@pytest.mark.usefixtures("idle")
class TestEvaluations:
    @pytest.mark.parametrize(
        ("count", "repeats", "scales", "expected"),
        [
            (1, 0, {}, 3),
            (1, 1, {}, 5),
            (1, 2, {}, 7),
            (3, 1, {}, 9),
            (1, 1, {"fusion_scale": 1.0}, 4),
            (1, 1, {"text_scale": 0.0}, 4),
            (1, 0, {"text_scale": 0.25, "subject_scale": 0.75}, 2),
            (1, 0, {"text_scale": 0.0, "subject_scale": 1.0}, 1),
            (1, 1, {"reuse": True}, 4),
            (2, 1, {"reuse": True}, 6),
            (1, 3, {"reuse": True}, 8),
            (1, 1, {"subject_scale": 0.0}, 2),
        ],
    )
    def test_none_is_wasted(self, toy, draw, guide, subject, count, repeats, scales, expected):
        guider = guide(*[subject(f"thing {j}") for j in range(count)], **scales)
        draw(guider, fusion(repeats))
        assert sum(toy.rows) == guider.evaluations == STEPS * expected

    def test_all_entries_of_a_conditioning_count(self, toy, draw, guide, subject, caplog):
        late = [[states, {**extras, "start_percent": 0.5}] for states, extras in subject("a tree")]
        guider = guide(subject(), text=[*toy.positive, *late])
        with caplog.at_level("INFO"):
            draw(guider, fusion())
        # Plain guidance sees two prompts, and three in two of the steps.
        assert sum(toy.rows) == guider.evaluations == 3 * 5 + 2
        assert "UNet evaluations: 17, 2.12 times the 8 of plain guidance" in caplog.text

    def test_a_sampler_that_looks_twice_is_compared_with_itself(self, draw, guide, subject, caplog):
        with caplog.at_level("INFO"):
            draw(guide(subject()), fusion(sampler="heun"))
        # Its last step, to 0, looks once.
        assert "UNet evaluations: 21, 2.10 times the 10 of plain guidance" in caplog.text

    def test_a_stage_is_one_batch(self, toy, draw, guide, subject):
        draw(guide(subject(), subject("another")), fusion())
        assert toy.rows == [3, 4] * STEPS

    def test_a_range_saves_its_steps(self, toy, draw, guide, subject):
        draw(guide(subject()), fusion(1, 1.0, 0.5, 1.0))
        assert toy.rows == [3, 2, 3, 2, 3]

    def test_a_subject_out_of_its_time_costs_nothing(self, toy, draw, guide, subject):
        late = subject(start_percent=0.5)
        draw(guide(late), fusion())
        assert toy.rows == [2, 2, 3, 2, 3]


class TestEquations:
    @pytest.fixture
    def denoised(self, draw, plain):
        """What the host's guider, or another, makes of latents at a noise level: (x, sigma, guider, stage)."""
        import comfy.samplers
        from conceptloom.samplers.fusion import STAGE

        def evaluate(x, sigma, guider, stage=None):
            found = []

            def look(model, noise, sigmas, extra_args=None, callback=None, disable=None):
                options = extra_args["model_options"] | ({} if stage is None else {STAGE: stage})
                rows = x.new_full((len(x),), sigma)
                found.append(model(x, rows, extra_args["denoise_mask"], model_options=options, seed=1))
                return noise

            sigmas = torch.tensor([sigma, 0.0])
            draw(guider, comfy.samplers.KSAMPLER(look), latent=torch.zeros_like(x), sigmas=sigmas)
            return found[0]

        return evaluate

    def test_both_stages_are_the_weighted_sums(self, toy, denoised, guide, plain, subject):
        from conceptloom.samplers.fusion import FUSION, REFINEMENT

        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
        left, right = half(), torch.zeros(1, 16, 16)
        right[..., 4:] = 1
        masked = subject("a dog", mask=left), subject("a hat", mask=right, mask_strength=0.5)
        guider = guide(*masked, subject_scale=4.0, text_scale=3.0, fusion_scale=2.0)
        c, u = denoised(x, 3.0, plain(cfg=1.0)), denoised(x, 3.0, plain(toy.negative, cfg=1.0))
        a, b = (denoised(x, 3.0, plain(subject(text), cfg=1.0)) for text in ("a dog", "a hat"))
        first, second = 4 * left, 2 * right
        refined = u + first * (a - u) + second * (b - u) + 3 * (c - u)
        assert close(denoised(x, 3.0, guider, REFINEMENT), refined)
        assert close(denoised(x, 3.0, guider), refined), "and for any sampler that knows no stage"
        w = first / (first + second)
        assert close(denoised(x, 3.0, guider, FUSION), u + 2 * (w * (a - u) + (1 - w) * (b - u)))

    def test_an_area_is_a_region(self, toy, denoised, guide, plain, subject):
        """Of a subject that is evaluated on the whole picture; the host would evaluate the area alone."""
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
        c, u, a = (denoised(x, 3.0, plain(one, cfg=1.0)) for one in (toy.positive, toy.negative, subject("a dog")))
        whole = guide(subject("a dog", area=(16, 8, 0, 0)), subject_scale=4.0, text_scale=3.0)
        percent = guide(subject("a dog", area=("percentage", 1.0, 0.5, 0.0, 0.0)), subject_scale=4.0, text_scale=3.0)
        made = denoised(x, 3.0, whole)
        assert torch.equal(made, denoised(x, 3.0, percent))
        assert close(made[..., :6], (u + 4 * (a - u) + 3 * (c - u))[..., :6])
        assert close(made[..., 8:], (u + 3 * (c - u))[..., 8:])

    def test_a_text_that_does_not_act_pulls_nowhere(self, toy, denoised, draw, guide, plain, subject):
        """The host's estimate of a conditioning is 0 where its mask is 0 and out of its part of the schedule."""
        x, sigma = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)) * 3, 2.0
        left = half(side=8)
        positive, negative = (denoised(x, sigma, plain(one, cfg=1.0)) for one in (toy.positive, toy.negative))
        seen = denoised(x, sigma, plain(subject(), cfg=1.0))
        expected = negative + 5.0 * left * (positive - negative) + 4.0 * (seen - negative)
        scales = {"subject_scale": 4.0, "text_scale": 5.0}
        masked = [[states, {**extras, "mask": left}] for states, extras in toy.positive]
        assert close(denoised(x, sigma, guide(subject(), text=masked, **scales)), expected)
        late = [[states, {**extras, "start_percent": 0.99}] for states, extras in toy.positive]
        alone = denoised(x, sigma, guide(subject(), text_scale=0.0, subject_scale=4.0))
        assert torch.equal(denoised(x, sigma, guide(subject(), text=late, **scales)), alone)
        # Without a subject it is the host's picture, whatever that is.
        absent = guide(subject(strength=0.0), text=late, **scales)
        assert torch.equal(draw(absent), draw(plain(late, cfg=5.0)))

    def test_areas_of_text_and_negative_are_not_the_subjects(self, toy, denoised, guide, subject):
        """The host gives every side, the negative too, a part of each other side's area."""
        from conceptloom.samplers.fusion import FUSION

        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
        part = [[states, {**extras, "area": (16, 4, 0, 12)}] for states, extras in toy.positive]
        for one in (subject("a dog", mask=half()), subject("a dog")):
            plain, local = guide(one), guide(one, text=[*toy.positive, *part])
            for stage in (FUSION, None):
                made, expected = denoised(x, 3.0, local, stage), denoised(x, 3.0, plain, stage)
                assert close(made[..., :12], expected[..., :12])

    def test_gamma_weakens_the_rows_of_the_subject_in_fusion_alone(self, denoised, guide, plain, subject):
        from conceptloom.host.words import SUBJECT_ROWS
        from conceptloom.samplers.fusion import FUSION, REFINEMENT

        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
        strong = subject("a dog", **{SUBJECT_ROWS: (2, 4)})
        weak = subject("a dog")
        weak[0][0][:, [2, 4]] *= 0.3
        guider = guide(strong, gamma=0.3, fusion_scale=1.0)
        assert close(denoised(x, 3.0, guider, FUSION), denoised(x, 3.0, plain(weak, cfg=1.0)))
        same = guide(subject("a dog"), gamma=0.3)
        assert torch.equal(denoised(x, 3.0, guider, REFINEMENT), denoised(x, 3.0, same, REFINEMENT))

    def test_reuse_keeps_the_differences_of_the_fusion_stage(self, toy, denoised, guide, plain, subject):
        """With eta 0 the latents do not move between the stages, so nothing is lost."""
        import comfy.samplers
        from conceptloom.samplers.fusion import FOLLOWING, FUSION, REFINEMENT, STAGE

        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 3
        found = []

        def both(model, noise, sigmas, extra_args=None, callback=None, disable=None):
            options, rows = {**extra_args["model_options"], FOLLOWING: REFINEMENT}, x.new_full((1,), 3.0)
            for stage in (FUSION, REFINEMENT):
                found.append(model(x, rows, None, model_options={**options, STAGE: stage}, seed=1))
            return noise

        guider = guide(subject("a dog"), subject("a hat", mask=half()), reuse=True)
        expected = denoised(x, 3.0, guide(subject("a dog"), subject("a hat", mask=half())), REFINEMENT)
        guider.sample(x * 0, x * 0, comfy.samplers.KSAMPLER(both), torch.tensor([3.0, 0.0]), None, None, True, 1)
        assert close(found[1], expected)

    def test_regions_act_where_they_are(self, toy, draw, guide, subject, plain):
        """What is not covered by a subject follows the text alone, if the model sees each place by itself."""
        sigmas = torch.tensor([3.0, 0.0])
        made, text = (draw(one, size=(16, 16), sigmas=sigmas) for one in (guide(subject(mask=half())), plain()))
        assert close(made[..., 8:], text[..., 8:])
        assert not close(made[..., :8], text[..., :8], 1e-2)


class TestCompany:
    def test_what_inpainting_keeps_is_kept_bit_by_bit_in_every_estimate(self, draw, guide, subject, toy):
        latent, seen = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5)), []
        made = draw(
            guide(subject()),
            fusion(),
            latent=latent,
            mask=half()[None],
            callback=lambda step, denoised, *_: seen.append(denoised.clone()),
        )
        kept = toy.base.process_latent_in(latent)
        assert len(seen) == STEPS and all(torch.equal(one[..., 8:], kept[..., 8:]) for one in seen)
        assert close(made[..., 8:], latent[..., 8:]) and not close(made[..., :8], latent[..., :8])

    def test_the_same_seed_is_the_same_picture_and_batches_do_not_matter(self, draw, guide, subject, monkeypatch):
        import comfy.model_base

        made = draw(guide(subject(), subject("another")), fusion(sampler="euler_ancestral"))
        assert torch.equal(made, draw(guide(subject(), subject("another")), fusion(sampler="euler_ancestral")))
        monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *_, **__: 1e18)
        assert close(draw(guide(subject(), subject("another")), fusion(sampler="euler_ancestral")), made)

    def test_noise_differs_from_step_to_step_and_from_stage_to_stage(self, monkeypatch, draw, guide, subject):
        from conceptloom.host.profusion import sampler

        drawn, true = [], sampler.default_noise_sampler

        def recorded(x, seed=None):
            draws = true(x, seed)

            def one(*levels):
                drawn.append(draws(*levels))
                return drawn[-1]

            return one

        monkeypatch.setattr(sampler, "default_noise_sampler", recorded)
        draw(guide(subject()), fusion(sampler="euler_ancestral"))
        assert len(drawn) == 2 * STEPS - 1
        assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])

    def test_control_of_the_text_acts_on_all_sides_that_have_none(self, idle, toy, draw, guide, subject):
        from comfy.controlnet import ControlBase
        from other_packs import controlled

        class Counting(ControlBase):
            def __init__(self):
                super().__init__()
                self.sides = []

            def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
                self.sides.append(batched_number)

            def get_models(self):
                return []

            def copy(self):
                return self

        control, other = Counting(), Counting()
        guider = guide(subject(), controlled(other, subject()), text=controlled(control, toy.positive))
        draw(guider, fusion())
        assert control.sides == [1, 2] * STEPS, "text and the first subject in one batch"
        assert other.sides == [1, 1] * STEPS

    def test_references_are_seen_by_subjects_alone(self, toy, draw, guide):
        """With the same prompt for both: what the references change is the difference that guidance goes along."""
        model = toy.apply(toy.subject(0))
        made = draw(guide(toy.positive, model=model, text_scale=2.0, subject_scale=2.0))
        assert not close(made, draw(guide(toy.positive, text_scale=2.0, subject_scale=2.0)), 1e-3)
        without = draw(guide(toy.positive, model=model, text_scale=2.0, subject_scale=0.0))
        assert torch.equal(without, draw(guide(toy.positive, text_scale=2.0, subject_scale=0.0)))

    def test_other_packs_are_told_which_rows_show_the_subject(self, toy, draw, guide, subject):
        seen = []

        def patch(n, context, value, options):
            seen.append(tuple(options["cond_or_uncond"]))
            return n, context, value

        model = toy.model.clone()
        model.set_model_attn2_patch(patch)
        draw(guide(subject(), subject("another"), model=model), fusion())
        assert set(seen) == {(0, 0, 1), (0, 0, 1, 1)} or set(seen) == {(1, 0, 0), (1, 1, 0, 0)}

    def test_guidance_patches_of_other_packs_act(self, toy, draw, guide, subject):
        from comfy_extras.nodes_model_advanced import RescaleCFG

        model = RescaleCFG().patch(toy.model, 0.7)[0]
        made = draw(guide(subject(), model=model), fusion())
        assert not close(made, draw(guide(subject()), fusion()), 1e-3)

    def test_it_leaves_no_trace(self, toy, draw, guide, plain, subject):
        before, options = draw(plain()), repr(toy.model.model_options)
        given = subject(mask=half())
        keys = [set(extras) for _, extras in given]
        guider = guide(given, gamma=0.5)
        first = draw(guider, fusion())
        assert torch.equal(draw(guider, fusion()), first), "a guider may be used again"
        assert torch.equal(draw(plain()), before) and repr(toy.model.model_options) == options
        assert [set(extras) for _, extras in given] == keys


def test_a_flow_model_is_fused_as_a_flow(toy, draw, guide, subject):
    import comfy.model_sampling
    import comfy.samplers
    from conceptloom.host.profusion.sampler import levels_of

    class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    flow = Flow()
    flow.set_noise_scale(2.0)
    assert levels_of(flow) == Levels(True, float(flow.sigmas[0]), 2.0)
    model = toy.model.clone()
    model.add_object_patch("model_sampling", flow)
    sigmas = comfy.samplers.calculate_sigmas(flow, "simple", STEPS)
    made = draw(guide(subject(), model=model), fusion(), sigmas=sigmas)
    assert toy.rows == [2, 3] * STEPS and torch.isfinite(made).all()
    assert not close(made, draw(guide(subject(), model=model), sigmas=sigmas), 1e-3)


class TestAdvice:
    def test_a_picture_that_nothing_guides_is_said(self, toy, draw, guide, plain, subject, caplog):
        made = draw(guide(subject(mask=torch.zeros(1, 16, 16)), text_scale=0.0), fusion())
        assert sum("nothing guides: text_scale is 0 and no subject acts" in r.message for r in caplog.records) >= 1
        assert torch.equal(made, draw(plain(toy.negative, cfg=1.0)))

    def test_fusion_without_guidance_is_said(self, idle, draw, guide, subject, caplog):
        draw(guide(subject(), fusion_scale=1.0), fusion())
        assert sum("fuses the subjects without guidance" in r.message for r in caplog.records) >= 1
        caplog.clear()
        draw(guide(subject(), fusion_scale=1.0))
        draw(guide(subject()), fusion())
        assert not caplog.records

    def test_differences_are_reused_only_where_subjects_cover_the_picture(self, toy, draw, guide, subject, caplog):
        part = subject(mask=half())
        made = draw(guide(part, reuse=True), fusion())
        assert sum("the subjects do not cover the whole picture" in r.message for r in caplog.records) >= 1
        assert torch.equal(made, draw(guide(part), fusion()))
        caplog.clear()
        draw(guide(part, subject("another", mask=half(False)), reuse=True), fusion())
        assert not caplog.records and toy.rows == [4, 2] * STEPS

    def test_the_evaluations_are_said(self, idle, draw, guide, subject, caplog):
        with caplog.at_level("INFO"):
            draw(guide(subject()), fusion())
        assert f"UNet evaluations: {5 * STEPS}, 2.50 times the {2 * STEPS} of plain guidance" in caplog.text


class TestRefusals:
    def test_no_subject(self, guide):
        with pytest.raises(ValueError, match="subjects: expected at least one"):
            guide()

    def test_scales_of_zero(self):
        from conceptloom.host.profusion.guider import Guidance

        with pytest.raises(
            ValueError, match="subject_scale: expected more than 0 here or in text_scale, got 0 in both"
        ):
            Guidance(text_scale=0.0, subject_scale=0.0)

    @pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2", "heunpp2"])
    def test_samplers_of_whole_schedules(self, name):
        with pytest.raises(ValueError, match="sampler: expected one that can run a single step"):
            fusion(sampler=name)

    @pytest.mark.parametrize("name", ["lms", "dpmpp_2m_sde", "dpmpp_sde", "euler_cfg_pp", "sa_solver"])
    def test_samplers_that_look_back_or_have_noise_of_their_own_run_step_by_step(self, draw, guide, subject, name):
        assert torch.isfinite(draw(guide(subject()), fusion(sampler=name), sigmas=torch.tensor([5.0, 1.0, 0.0]))).all()
