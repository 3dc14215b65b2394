"""Cases of Concept Weaver's report, against the world that draws them."""

import numpy as np
import pytest
import torch
from conceptloom.evaluation import templates
from conceptloom.evaluation.templates import BACKGROUND, IDENTITIES, NOUNS, drawings, structure, template_case
from conceptloom.shapeland import world
from conceptloom.shapeland.judge import Reading


def reading(noun, mask):
    return Reading(noun, 1.0, 0, 0, 0, torch.zeros(14), torch.zeros(32), mask > 0.5)


@pytest.mark.parametrize("subjects", [1, 2, 3, 5])
def test_masks_follow_the_mentions_and_truth_stands_in_the_template_s_places(subjects):
    case = template_case(subjects, 3)
    assert [world.NOUNS[m.noun] for m in case.mentions] == list(case.names) == [r.noun for r in case.references]
    truth = case.draw(2, [r.identity for r in case.references])
    assert torch.equal(truth[0], truth[1])
    template = torch.from_numpy(case.template.image)
    covered = case.masks.sum(0) > 0.02
    assert torch.equal(truth[0][~covered], template[~covered])
    for mask, thing in zip(case.masks, case.mentions, strict=True):
        found = next(t for t in case.scene.things if t.noun == thing.noun)
        ys, xs = (mask > 0.5).nonzero().float().mean(0).tolist()
        # A silhouette's middle is near its thing's, and far from the other things'.
        assert np.hypot(xs - found.x, ys - found.y) < found.radius * 0.6
        # The template has other looks.
        assert (truth[0] - template)[mask > 0.5].abs().mean() > 0.02


def test_structure_is_one_on_the_template_itself_and_counts_what_is_missing():
    case = template_case(3, 0)
    seen = [reading(m.noun, mask) for m, mask in zip(case.mentions, case.masks, strict=True)]
    assert structure(case, seen[::-1]) == 1.0
    assert structure(case, seen[1:]) == pytest.approx(2 / 3)
    moved = [reading(r.noun, r.mask.roll(64, 0).float() * 0) for r in seen]
    assert structure(case, moved) == 0.0


def test_draw_scene_shows_what_a_concept_looks_like():
    """The workflow's references have the concepts' identities by their seeds."""
    for noun, seed in IDENTITIES.items():
        picture, _ = world.draw_description(f"a {noun} on a white background", 0, seed)
        assert np.allclose(picture.scene.things[0].identity.vector(), templates.identity_of(noun).vector())


def test_a_concept_is_learnt_from_pictures_that_share_it_alone():
    for name in NOUNS:
        drawn = drawings(name)
        vectors = [picture.scene.things[0].identity.vector() for picture, _ in drawn]
        assert all(np.array_equal(v, vectors[0]) for v in vectors)
        assert len({picture.scene.background for picture, _ in drawn}) == len(world.BACKGROUNDS)
        assert all(caption.count("{}") == 1 and name not in caption for _, caption in drawn)
    grounds = drawings(BACKGROUND)
    assert len({picture.scene.background_rgb for picture, _ in grounds}) == 1
    assert len({caption for _, caption in grounds}) > 1


def test_an_absent_concept_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="The concept star is not at .*: train it with"):
        templates.load_bank()
