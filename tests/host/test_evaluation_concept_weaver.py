"""The variants of Concept Weaver's report on the shipped Shapeland, in a few steps."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def studio(host):
    from conceptloom.evaluation.studio import Studio

    with torch.inference_mode():
        return Studio.open()


@pytest.fixture(scope="module")
def concepts(studio):
    """Two concepts of random differences with words of their own."""
    from conceptloom.encoders.concepts import Concept, Delta
    from conceptloom.host.weaver.weights import Weights

    generator = torch.Generator().manual_seed(3)

    def one(word):
        deltas = {}
        for layer, (key, part) in Weights.of(studio.model).layers.items():
            if part in "kv":
                rows, columns = studio.model.model.get_submodule(layer).weight.shape
                deltas.setdefault(key, {})[part] = Delta((torch.randn(rows, columns, generator=generator) * 0.03,))
        token = torch.randn(1, 128, generator=generator)
        return Concept(word, deltas, word, f"<{word}>", {"l": token})

    return {name: one(name) for name in ("house", "star", "background")}


def test_merged_weights_are_the_base_s_and_all_differences(studio, concepts):
    from conceptloom.evaluation.reports.concept_weaver import merged

    two = [concepts["house"], concepts["star"]]
    with torch.inference_mode():
        patched = merged(studio.model, two)
        name = "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_v.weight"
        base = studio.model.model.get_parameter(name).clone()
        patched.patch_model()
        found = patched.model.get_parameter(name).clone()
        patched.unpatch_model()
    added = sum(concept.deltas["middle.0.0"]["v"].matrix() for concept in two)
    assert torch.allclose(found.float(), base.float() + added, atol=1e-5)
    assert torch.equal(studio.model.model.get_parameter(name), base)


def test_the_joint_prompt_has_every_word_where_its_own_prompt_has_it(studio, concepts):
    from conceptloom.evaluation.reports.concept_weaver import joint_conditioning
    from conceptloom.host.weaver.prompts import encode_text

    text = "a house and a star on a navy background"
    with torch.inference_mode():
        one = joint_conditioning(studio, text, [concepts["house"]])
        own = encode_text(studio.clip, "a <house> house and a star on a navy background", concepts["house"])
        assert torch.equal(one[0][0], own[0][0])
        both = joint_conditioning(studio, text, [concepts["house"], concepts["star"]])[0][0]
        # Causal text: up to the second word both are the same, from there on they are not.
        same = (both == one[0][0]).all(-1)[0]
        assert same[:6].all() and not same[6:].any()


def test_variants_are_drawn_from_one_noise_and_differ(studio, concepts, monkeypatch):
    from conceptloom.evaluation.reports import concept_weaver
    from conceptloom.evaluation.templates import template_case
    from conceptloom.host.structure.inversion import invert, renew
    from conceptloom.subjects.partition import assemble

    monkeypatch.setattr(concept_weaver, "STEPS", 2)
    case = next(c for c in (template_case(2, i) for i in range(200)) if set(c.names) == {"house", "star"})
    with torch.inference_mode():
        drawn = concept_weaver.draw_variants(studio, concepts, case, 1)
        assert all(picture.shape == (1, 64, 64, 3) and picture.isfinite().all() for picture in drawn.values())
        latent = {"samples": studio.vae.encode(torch.from_numpy(case.template.image)[None])}
        inverted = invert(studio.model, latent, studio.encode(case.prompt), 2, concept_weaver.SCHEDULER)
        partition = assemble(list(case.masks), concept_weaver.DILATION)
        start = renew(inverted.noise, partition, case.seed, concept_weaver.RENEWED)["samples"]
        plain = studio.redraw(studio.model, studio.encode(case.prompt), start, inverted.sigmas)
    assert torch.equal(drawn["plain"], plain)
    names = list(drawn)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(drawn[a], drawn[b]), (a, b)
    assert set(concept_weaver.SHOWN) <= set(names)


def test_the_report_has_all_metrics_and_perfect_pictures_score_as_such(studio, monkeypatch):
    """Variants replaced by the world's own drawings: what is measured of them is known."""
    from conceptloom.evaluation.reports import concept_weaver

    def drawn(_studio, _bank, case, count):
        truth = case.draw(count, [reference.identity for reference in case.references])
        names = sorted({*concept_weaver.SHOWN, "lambda_0.1"})
        return {name: case.draw(count, None) if name == "plain" else truth for name in names}

    monkeypatch.setattr(concept_weaver, "draw_variants", drawn)
    monkeypatch.setattr(concept_weaver, "load_bank", dict)
    monkeypatch.setattr(concept_weaver, "SUBJECTS", (2, 5))
    with torch.inference_mode():
        report = concept_weaver.report(studio, 3, 0.0, lambda _: None)
    found = {(row.subjects, row.variant, row.metric): row.mean for row in report.rows}
    for subjects in (2, 5):
        assert found[subjects, "default", "structure"] > 0.85
        assert found[subjects, "default", "identity"] > 0.8 > 0.4 > found[subjects, "plain", "identity"]
        assert found[subjects, "default", "prompt"] == 1.0
    assert "euler, ddim_uniform" in report.sampling
