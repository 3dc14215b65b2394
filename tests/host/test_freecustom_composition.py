"""FreeCustom beside other things people put on a model (spec: 2.6, oracles 17 and 18)."""

import logging

import pytest
import torch
from other_packs import controlled, perturbed, reference_control


def close(a, b, tolerance=2e-5):
    return float((a - b).abs().max() / b.abs().max()) <= tolerance


def differs(a, b):
    return float((a - b).abs().max() / b.abs().max()) > 1e-3


def host_nodes():
    from comfy_extras.nodes_freelunch import FreeU_V2
    from comfy_extras.nodes_hypertile import HyperTile
    from comfy_extras.nodes_nag import NAGuidance
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance
    from comfy_extras.nodes_sag import SelfAttentionGuidance
    from comfy_extras.nodes_tomesd import TomePatchModel

    return {
        "PAG": lambda m: PerturbedAttentionGuidance.execute(m, 3.0)[0],
        "SAG": lambda m: SelfAttentionGuidance.execute(m, 0.5, 2.0)[0],
        "ToMe": lambda m: TomePatchModel.execute(m, 0.3)[0],
        "HyperTile": lambda m: HyperTile.execute(m, 32, 2, 0, False)[0],
        "NAG": lambda m: NAGuidance.execute(m, 5.0, 0.5, 2.5)[0],
        "FreeU": lambda m: FreeU_V2.execute(m, 1.3, 1.4, 0.9, 0.2)[0],
    }


@pytest.mark.parametrize("name", ["PAG", "SAG", "ToMe", "HyperTile", "NAG", "FreeU"])
def test_host_patches_before_and_after_are_the_same(toy, name):
    patch = host_nodes()[name]
    subjects = toy.subject(0), toy.subject(1)
    after = toy.sample(patch(toy.apply(*subjects)), steps=2)
    before = toy.sample(toy.apply(*subjects, model=patch(toy.model)), steps=2)
    assert torch.equal(after, before)
    assert differs(after, toy.sample(patch(toy.model), steps=2))
    assert differs(after, toy.sample(toy.apply(*subjects), steps=2))


class TestForeignSelfAttention:
    """A replacement by another node wins where it stands, whoever came first, and is told nothing strange."""

    @staticmethod
    def foreign(model, blocks, calls):
        def replace(q, k, v, extra_options):
            calls.append((len(q), k.shape == v.shape == q.shape, len(extra_options["cond_or_uncond"])))
            return v * 0.5

        model = model.clone()
        for block in blocks:
            model.set_model_attn1_replace(replace, "output", block)
        return model

    def test_on_all_our_layers_it_alone_counts(self, toy, caplog):
        calls, blocks = [], range(6, 12)
        only = toy.sample(self.foreign(toy.model, blocks, []))
        with caplog.at_level(logging.WARNING):
            after = toy.sample(self.foreign(toy.apply(toy.subject()), blocks, calls))
        assert torch.equal(after, only)
        assert sum("there it wins" in r.message for r in caplog.records) == 1
        assert torch.equal(toy.sample(toy.apply(toy.subject(), model=self.foreign(toy.model, blocks, calls))), only)
        assert set(calls) == {(2, True, 2)}

    def test_elsewhere_both_count(self, toy):
        subjects = toy.subject(), toy.subject(1)
        after = toy.sample(self.foreign(toy.apply(*subjects), [11], []))
        before = toy.sample(toy.apply(*subjects, model=self.foreign(toy.model, [11], [])))
        assert torch.equal(after, before)
        assert differs(after, toy.sample(self.foreign(toy.model, [11], [])))


class TestWarningsAreTrue:
    """Layers that another node takes in one evaluation and leaves in another of the same step have seen references."""

    def test_guidance_that_replaces_self_attention_in_an_evaluation_of_its_own(self, toy, caplog):
        caplog.set_level(logging.WARNING)
        model = toy.apply(toy.subject(), toy.subject(1))
        drawn = toy.sample(perturbed(model, 8, 11))
        assert differs(drawn, toy.sample(model)) and differs(drawn, toy.sample(perturbed(toy.model, 8, 11)))
        assert not caplog.records

    @pytest.mark.parametrize("settings", [{}, {"style_fidelity": 0.4}])
    def test_reference_only_control_that_attends_once_more_for_the_negative(self, toy, caplog, settings):
        caplog.set_level(logging.WARNING)
        control = reference_control(torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(8)))
        sides = {side: controlled(control, getattr(toy, side)) for side in ("positive", "negative")}
        model = toy.apply(toy.subject(), toy.subject(1), **settings)
        drawn = toy.sample(model, **sides)
        assert differs(drawn, toy.sample(model)) and differs(drawn, toy.sample(**sides))
        assert not caplog.records

    def test_target_masks_that_one_of_two_evaluations_could_not_place(self, toy, caplog):
        """Sliding windows evaluate parts of the picture beside the whole one; a part alone is told of."""
        import comfy.samplers

        def windows(told):
            (left,) = comfy.samplers.calc_cond_batch(
                told["model"], [told["cond"]], told["input"][..., :8], told["sigma"], told["model_options"]
            )
            return told["denoised"] + 0.0 * left.sum()

        half = torch.zeros(8, 8)
        half[:, :4] = 1
        model = toy.apply(toy.subject(target_mask=half))
        model.set_model_sampler_post_cfg_function(windows)
        with caplog.at_level(logging.WARNING):
            toy.sample(model)
            assert not caplog.records
            part = [[c, {**extra, "area": (16, 8, 0, 0)}] for c, extra in toy.positive]
            toy.sample(toy.apply(toy.subject(target_mask=half)), positive=toy.positive + part)
        assert sum("target masks cannot be placed" in r.message for r in caplog.records) == 1


def test_a_cross_attention_adapter_acts_on_the_picture_alone(toy):
    """An IPAdapter-like patch divides its batch by the conditionings, and must never meet references."""
    batches = []

    def adapter(q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention

        batches.append((len(q), len(extra_options["cond_or_uncond"]), q.shape[1]))
        out = optimized_attention(q, k, v, extra_options["n_heads"])
        chunks = out.chunk(len(extra_options["cond_or_uncond"]))
        return torch.cat([c + (i == 0) * 0.3 for c, i in zip(chunks, extra_options["cond_or_uncond"], strict=True)])

    def patch(model):
        model = model.clone()
        for block in (("input", 1), ("middle", 0), ("output", 6), ("output", 9)):
            model.set_model_attn2_replace(adapter, *block)
        return model

    subjects = [toy.subject(i) for i in range(3)]
    after = toy.sample(patch(toy.apply(*subjects)))
    assert torch.equal(after, toy.sample(toy.apply(*subjects, model=patch(toy.model))))
    assert {rows for rows, _, _ in batches} == {2}
    assert differs(after, toy.sample(toy.apply(*subjects))) and differs(after, toy.sample(patch(toy.model)))


def test_controlnet_acts_on_the_picture_alone(toy):
    from comfy.controlnet import ControlBase

    class Control(ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            sizes.append(len(x_noisy))
            return {"middle": [torch.full((len(x_noisy), 128, 2, 2), 0.5)], "output": [], "input": []}

        def get_models(self):
            return []

        def copy(self):
            return self

    sizes, control = [], Control()
    controlled = {
        side: [[c, {**extra, "control": control}] for c, extra in getattr(toy, side)]
        for side in ("positive", "negative")
    }
    model = toy.apply(*(toy.subject(i) for i in range(3)), bank_mib=16)
    free = toy.sample(model)
    bound = toy.sample(model, **controlled)
    assert toy.rows.count(3) == 0, "control must not make references other than they were"
    assert differs(bound, free) and set(sizes) == {2}
    assert differs(bound, toy.sample(**controlled))


def test_lora_before_and_after_is_the_same(toy):
    subjects = [toy.subject(i) for i in range(2)]
    after = toy.sample(toy.lora(toy.apply(*subjects)))
    assert torch.equal(after, toy.sample(toy.apply(*subjects, model=toy.lora(toy.model))))
    assert differs(after, toy.sample(toy.apply(*subjects)))


def test_features_changed_for_all_rows_are_changed_for_references(toy):
    """FreeU belongs into the reference pass, or keys of picture and references would not compare."""
    rows = []

    def watch(h, hsp, options):
        rows.append(len(h))
        return h, hsp

    model = toy.model.clone()
    model.set_model_output_block_patch(watch)
    toy.sample(toy.apply(*(toy.subject(i) for i in range(3)), model=model))
    assert set(rows) == {2, 3}


def test_what_other_packs_add_to_the_pictures_features_stays_out_of_references(toy):
    """Fooocus inpainting and ControlNeXt add maps of the picture's size."""
    rows = []

    def add(h, options):
        rows.append(len(h))
        return h + torch.ones(1, 1, 16, 16) if options["block"] == ("input", 0) else h

    model = toy.model.clone()
    model.set_model_input_block_patch(add)
    toy.sample(toy.apply(*(toy.subject(i, size=(128, 64 + 64 * i)) for i in range(3)), model=model))
    assert set(rows) == {2}


class TestBatches:
    def test_first_of_a_batch_equals_a_single(self, toy):
        model = toy.apply(toy.subject(), toy.subject(1))
        batch = toy.sample(model, batch=2)
        assert close(batch[:1], toy.sample(model), 1e-4)
        assert differs(batch[:1], batch[1:])

    def test_separate_calls_for_both_sides(self, toy, monkeypatch):
        subjects = [toy.subject(i) for i in range(3)]
        for settings in ({}, {"style_fidelity": 0.4}):
            together = toy.sample(toy.apply(*subjects, **settings))
            with monkeypatch.context() as tight:
                tight.setattr(toy.base, "memory_required", lambda *_, **__: 1e15)
                apart = toy.sample(toy.apply(*subjects, **settings))
            assert set(toy.rows) == {1}
            assert close(apart, together, 1e-4)

    def test_without_guidance(self, toy):
        model = toy.apply(toy.subject())
        alone = toy.sample(model, cfg=1.0)
        assert toy.rows == [1, 1] * toy.steps
        assert differs(alone, toy.sample(cfg=1.0))

    @pytest.mark.parametrize("size", [(16, 24), (17, 12), (9, 31)])
    def test_any_size(self, toy, size):
        square, wide, tall = toy.subject(0), toy.subject(1, size=(96, 200)), toy.subject(2, size=(150, 70))
        picture = toy.sample(toy.apply(square, wide, tall), size=size)
        assert picture.shape[-2:] == size and differs(picture, toy.sample(size=size))

    def test_references_have_the_pictures_area_and_their_own_shape(self, host):
        from conceptloom.host.freecustom.attention import reference_size

        assert reference_size((1000, 1000), (64, 64)) == (64, 64)
        assert reference_size((1010, 1000), (64, 64)) == (64, 64)
        assert reference_size((400, 100), (64, 64)) == (128, 32)
        assert reference_size((500, 1000), (96, 48)) == (48, 96)


class TestConditionings:
    def test_an_area_of_the_full_size_is_no_area(self, toy):
        full = [[c, {**extra, "area": (16, 16, 0, 0)}] for c, extra in toy.positive]
        for settings in ({}, {"style_fidelity": 0.4}):
            model = toy.apply(toy.subject(), toy.subject(1), **settings)
            assert close(toy.sample(model, positive=full), toy.sample(model), 1e-6)

    def test_a_part_of_the_picture(self, toy):
        part = [[c, {**extra, "area": (8, 16, 0, 0)}] for c, extra in toy.positive]
        model = toy.apply(toy.subject(), toy.subject(1))
        picture = toy.sample(model, positive=toy.positive + part)
        assert differs(picture, toy.sample(positive=toy.positive + part))

    def test_negatives_share_of_an_area_stays_plain(self, toy):
        """The host gives it the positive's uuid; a role by uuid alone would let it see the references."""
        part = [[c, {**extra, "area": (8, 16, 0, 0)}] for c, extra in toy.positive]
        seen = []
        roles_of(toy, toy.apply(toy.subject()), seen, positive=part + toy.positive)
        in_one_step = sorted(role for call in seen[: len(seen) // toy.steps] for role in call)
        assert in_one_step == ["negative", "negative", "positive", "positive"]

    def test_several_positives(self, toy):
        more = toy.clip.encode_from_tokens_scheduled("a second prompt")
        picture = toy.sample(toy.apply(toy.subject()), positive=toy.positive + more)
        assert differs(picture, toy.sample(positive=toy.positive + more))
        doubled = toy.sample(toy.apply(toy.subject()), positive=toy.positive * 2)
        assert close(doubled, toy.sample(toy.apply(toy.subject())), 1e-4)

    def test_guidance_on_the_negative_alone_knows_its_role(self, toy):
        from comfy_extras.nodes_sag import SelfAttentionGuidance

        seen = []
        roles_of(toy, SelfAttentionGuidance.execute(toy.apply(toy.subject()), 0.5, 2.0)[0], seen)
        assert ("negative",) in seen and len(seen) == 2 * toy.steps

    def test_guiders_with_other_sides_go_by_name(self, toy):
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import Guider_DualCFG

        model = toy.apply(toy.subject())
        guider = Guider_DualCFG(model)
        guider.set_conds(toy.positive, toy.clip.encode_from_tokens_scheduled("between"), toy.negative)
        guider.set_cfg(5.0, 2.0)
        seen = []
        with watched_roles(seen):
            guider.sample(
                torch.randn(1, 4, 16, 16),
                torch.zeros(1, 4, 16, 16),
                comfy.samplers.ksampler("euler"),
                torch.tensor([5.0, 0.0]),
                seed=0,
                disable_pbar=True,
            )
        assert sorted(seen[0]) == ["middle", "negative", "positive"]

    def test_a_tag_names_the_role(self, toy):
        tagged = [[c, {**extra, "conceptloom_role": "negative"}] for c, extra in toy.positive]
        seen = []
        roles_of(toy, toy.apply(toy.subject()), seen, positive=tagged)
        assert set(seen[0]) == {"negative"}


def roles_of(toy, model, seen, **options):
    with watched_roles(seen):
        toy.sample(model, **options)


def watched_roles(seen):
    """Collects the roles of every evaluation of a run."""
    from conceptloom.host.freecustom.attention import ReferenceRun

    handlers = ReferenceRun.handlers

    def watch(self, evaluation):
        seen.append(evaluation.roles)
        return handlers(self, evaluation)

    context = pytest.MonkeyPatch.context()

    class Watching:
        def __enter__(self):
            context.__enter__().setattr(ReferenceRun, "handlers", watch)

        def __exit__(self, *error):
            context.__exit__(*error)

    return Watching()


class TestTargetMasks:
    def test_everywhere_is_as_without(self, toy):
        everywhere = toy.sample(toy.apply(toy.subject(target_mask=torch.ones(8, 8)), toy.subject(1)))
        assert close(everywhere, toy.sample(toy.apply(toy.subject(), toy.subject(1))), 1e-5)

    def test_nowhere_is_refused(self, toy):
        with pytest.raises(ValueError, match="^target_mask: expected white on the subject's place"):
            toy.subject(target_mask=torch.zeros(8, 8))
        faint = toy.subject(target_mask=torch.full((8, 8), 0.25))
        with pytest.raises(ValueError, match="^mask_threshold: expected at most 0.25, the largest value in the target"):
            toy.apply(faint)
        assert differs(toy.sample(toy.apply(faint, mask_threshold=0.2)), toy.sample())

    @pytest.mark.parametrize(("shape", "size"), [((8, 16), (16, 32)), ((128, 256), (16, 32)), ((135, 257), (16, 32))])
    def test_they_have_the_shape_of_the_picture(self, toy, shape, size):
        """A picture of 135x257 pixels fills 16x32 cells and has some to spare."""
        mask = torch.zeros(shape)
        mask[: shape[0] // 2] = 1
        model = toy.apply(toy.subject(target_mask=mask))
        toy.sample(model, size=size, steps=1)
        expected = r'target_mask of "thing0": expected the shape of the latent \(16x16\), got'
        with pytest.raises(ValueError, match=rf"^Multi-Reference Self-Attention \(FreeCustom\): {expected}"):
            toy.sample(model, steps=1)

    def test_on_merged_tokens_they_are_ignored_with_a_word(self, toy, caplog):
        half = torch.zeros(8, 8)
        half[:, :4] = 1
        tome = host_nodes()["ToMe"]
        with caplog.at_level(logging.WARNING):
            toy.sample(tome(toy.apply(toy.subject(target_mask=half))))
        assert sum("target masks cannot be placed" in r.message for r in caplog.records) == 1


class TestChaining:
    def test_subjects_of_two_nodes_add_up_and_the_last_settings_hold(self, toy):
        first, second = toy.subject(0), toy.subject(1)
        chained = toy.apply(second, model=toy.apply(first, blocks="all blocks", formula="paper"))
        assert torch.equal(toy.sample(chained), toy.sample(toy.apply(first, second)))

    def test_the_first_models_picture_stays(self, toy):
        model = toy.apply(toy.subject(0))
        before = toy.sample(model)
        toy.sample(toy.apply(toy.subject(1), model=model))
        assert torch.equal(toy.sample(model), before)

    def test_without_subjects_it_passes_the_model_on(self, toy):
        model = toy.apply(toy.subject(0))
        assert torch.equal(toy.sample(toy.apply(model=model)), toy.sample(model))


class TestOtherModels:
    def test_sdxl(self, toy_type):
        """Ten blocks deep, and its references bring the vector of sizes and pooled text that it asks for."""
        shape = {
            "channel_mult": [1, 2, 4],
            "num_res_blocks": [2, 2, 2],
            "transformer_depth": [0, 0, 1, 1, 2, 2],
            "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
            "transformer_depth_middle": 2,
            "use_linear_in_transformer": True,
            "adm_in_channels": 2816,
            "num_classes": "sequential",
        }
        with torch.inference_mode():
            toy = toy_type(shape, "SDXL", "SDXL")
            subjects = [toy.subject(i) for i in range(3)]
            model = toy.apply(*subjects, bank_mib=64)
            first = toy.sample(model)
            assert toy.rows == [3, 2] * toy.steps and differs(first, toy.sample())
            assert torch.equal(toy.sample(model), first) and toy.rows == [2] * toy.steps

    def test_v_prediction(self, toy_type):
        from comfy.model_base import ModelType

        with torch.inference_mode():
            toy = toy_type({"use_linear_in_transformer": True}, "SD20", model_type=ModelType.V_PREDICTION)
            assert differs(toy.sample(toy.apply(toy.subject(), toy.subject(1))), toy.sample())

    def test_inpainting_models_see_whole_references(self, toy_type):
        with torch.inference_mode():
            toy = toy_type({"in_channels": 9})
            toy.base.set_inpaint()
            assert differs(toy.sample(toy.apply(toy.subject(), toy.subject(1))), toy.sample())

    def test_layers_that_see_frames_are_refused(self, toy, monkeypatch):
        class VanillaTemporalModule(torch.nn.Identity):
            pass

        from conceptloom.host.model.families.unet import UNetFamily

        unet, applied = toy.base.diffusion_model, toy.apply(toy.subject())
        unet.output_blocks[3].append(VanillaTemporalModule())
        try:
            with pytest.raises(ValueError, match="video layers"):
                UNetFamily().sites(unet)
            with pytest.raises(ValueError, match="video layers"):
                toy.sample(applied)
        finally:
            del unet.output_blocks[3][-1]
