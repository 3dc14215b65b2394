"""Shapeland's nodes, called as the host calls them."""

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def nodes(host):
    from conceptloom.nodes import shapeland

    return shapeland


def test_draw_scene_gives_the_worlds_picture_and_masks(nodes):
    from conceptloom.shapeland import world

    image, masks, depth = nodes.DrawScene.execute("a red star and two balls on a mint background", 3, 7, 128).result
    assert image.shape == (1, 128, 128, 3) and masks.shape == (3, 128, 128)
    drawn, expected = world.draw_description("a red star and two balls on a mint background", 3, 7, enlarge=2)
    assert np.array_equal(image[0].numpy(), drawn.image) and np.array_equal(masks.numpy(), expected)
    assert depth.shape == image.shape and np.array_equal(depth[0, ..., 0].numpy(), drawn.depth)


def test_draw_scene_refuses_unknown_words_before_it_runs(nodes):
    assert nodes.DrawScene.validate_inputs("a red star") is True
    refusal = nodes.DrawScene.validate_inputs("a red unicorn")
    assert "unicorn" in refusal and "things are ball, star" in refusal


def test_read_picture_masks_the_chosen_noun_and_compares_with_the_reference(nodes, monkeypatch):
    from conceptloom.shapeland.judge import EMBEDDING, Reading

    def reading(noun, direction, row):
        mask = torch.zeros(64, 64, dtype=torch.bool)
        mask[row] = True
        return Reading(noun, 0.5, 0, 1, 0, torch.zeros(14), torch.eye(EMBEDDING)[direction], mask)

    seen = {2: [[reading(1, 0, 3), reading(2, 1, 9)], []], 1: [[reading(2, 1, 0)]]}
    monkeypatch.setattr(nodes.host, "read_pictures", lambda images: seen[len(images)])
    reference = {"reference0": torch.zeros(3, 64, 64, 3)}
    mask, text = nodes.ReadPicture.execute(
        torch.zeros(2, 64, 64, 3), "heart", reference, reference["reference0"]
    ).result
    assert mask.shape == (2, 64, 64) and mask[0, 9].all() and mask.sum() == 64
    beside = " (plain prompt 1.00)"
    assert text.splitlines() == [
        "picture 1: heart: likeness 1.00 of 1" + beside,
        "picture 1: seen: red and orange striped star, 50% sure",
        "picture 1: seen: red and orange striped heart, 50% sure",
        "picture 2: heart: not seen" + beside,
        "picture 2: nothing is seen",
    ]
