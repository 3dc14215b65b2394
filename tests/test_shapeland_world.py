"""The drawn world is its own ground truth, so the truth must be right."""

import numpy as np
import pytest
from conceptloom.shapeland import world


def scenes(count, seed=0):
    return [world.random_scene(np.random.default_rng((seed, i))) for i in range(count)]


def test_same_seed_draws_the_same_picture():
    first, second = (world.render(world.random_scene(np.random.default_rng(5))) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert first.scene == second.scene


def test_captions_read_back_as_what_was_drawn():
    for scene in scenes(300):
        mentions, background = world.parse_caption(scene.caption)
        assert background in (None, scene.background)
        drawn = sorted(thing.noun for thing in scene.things)
        assert sorted(m.noun for m in mentions for _ in range(m.count)) == drawn
        for m in mentions:
            identity = next(t.identity for t in scene.things if t.noun == m.noun)
            assert m.color in (None, identity.color)
            assert m.second in (None, identity.second)
            assert m.pattern in (None, identity.pattern)


def test_noun_words_point_at_the_noun_of_each_thing():
    for scene in scenes(300):
        words = scene.caption.split()
        for thing, at, described_by in zip(scene.things, scene.noun_words, scene.attribute_words, strict=True):
            assert words[at] in (world.NOUNS[thing.noun], world.PLURALS[thing.noun])
            said = {words[i] for i in described_by}
            identity = thing.identity
            appearance = {world.COLORS[identity.color], world.COLORS[identity.second], world.PATTERNS[identity.pattern]}
            assert said <= {*appearance, *world.SIZES, *world.ACROSS, *world.DOWN}


def test_things_are_named_from_left_to_right_with_true_words_for_place_and_size():
    told = 0
    for scene in scenes(300):
        mentions, _ = world.parse_caption(scene.caption)
        centers = [np.mean([t.x for t in scene.things if t.noun == m.noun]) for m in mentions]
        assert centers == sorted(centers)
        low, high = world.RADIUS[len(scene.things)]
        for m in mentions:
            thing = next(t for t in scene.things if t.noun == m.noun)
            told += m.across is not None
            assert m.across in (None, 0 if thing.x < 24 else 1 if thing.x > 40 else -1)
            assert m.down in (None, 0 if thing.y < 24 else 1 if thing.y > 40 else -1)
            share = (thing.radius - low) / (high - low)
            assert m.size in (None, 0 if share < 1 / 3 else 1 if share > 2 / 3 else -1)
    assert told > 60


def test_captions_say_all_looks_or_none_in_their_shares():
    full = bare = described = 0
    for scene in scenes(600):
        mentions, _ = world.parse_caption(scene.caption)
        looks = [(m.color, m.second, m.pattern) for m in mentions]
        full += all(None not in look for look in looks)
        bare += all(look == (None,) * 3 for look in looks)
        described += 1
    # Scenes that are told by `describe` are full or bare now and then too.
    assert 0.66 < full / described < 0.78 and 0.11 < bare / described < 0.23


def test_a_description_is_obeyed_in_place_and_size():
    text = "a small red star at the bottom right and a big house at the left"
    for seed in range(20):
        picture, _ = world.draw_description(text, seed)
        star, house = (next(t for t in picture.scene.things if t.noun == n) for n in (1, 6))
        assert star.x > 40 and star.y > 40 and house.x < 24
        low, high = world.RADIUS[2]
        assert star.radius < low + (high - low) / 3 and house.radius > high - (high - low) / 3


def test_a_description_without_room_gets_one_sentence():
    crowd = " and ".join(f"a big {noun} at the top left" for noun in ("star", "ball", "mug"))
    with pytest.raises(ValueError, match="leaves no room"):
        world.draw_description(crowd, 0)


def test_equal_nouns_share_one_identity_and_different_ones_do_not():
    pairs = 0
    for scene in scenes(300):
        by_noun = {}
        for thing in scene.things:
            pairs += thing.noun in by_noun
            assert by_noun.setdefault(thing.noun, thing.identity) == thing.identity
        assert len(set(by_noun.values())) == len(by_noun)
    assert pairs > 50


def test_masks_are_the_visible_parts():
    for scene in scenes(60):
        picture = world.render(scene)
        assert picture.masks.sum(0).max() <= 1 + 1e-5
        # Far from every thing the picture is its background, up to the light from above.
        empty = picture.masks.sum(0) == 0
        assert np.abs(picture.image - np.array(scene.background_rgb))[empty].max() < 0.031
        assert np.array_equal(picture.depth > 0, picture.masks.sum(0) > 0)


def test_the_nearer_thing_hides_the_farther_one():
    identity = world.random_identity(np.random.default_rng(0))
    ball = world.Thing(0, identity, 32, 32, 14)
    alone = world.render(world.Scene((ball,), 0, (1, 1, 1), "a ball", (1,), ((),)))
    covered = world.render(world.Scene((ball, ball), 0, (1, 1, 1), "two balls", (1, 1), ((), ())))
    assert np.allclose(covered.masks[1], alone.masks[0])
    inside = alone.masks[0] == 1
    assert covered.masks[0][inside].max() == 0
    assert covered.depth[inside].min() > alone.depth[inside].max()


@pytest.mark.parametrize("pattern", range(len(world.PATTERNS)))
def test_the_second_color_covers_its_share(pattern):
    rng = np.random.default_rng(pattern)
    errors = []
    for _ in range(20):
        identity = world.random_identity(rng, pattern=pattern)
        u, v = np.meshgrid(np.linspace(-60, 60, 481), np.linspace(-60, 60, 481))
        errors.append(world._second_color(identity, u, v).mean() - identity.share)
    assert np.abs(errors).max() < 0.03


def test_palette_shares_add_up_to_the_picture():
    for scene in scenes(20):
        palette = world.render(scene).palette()
        assert palette.shape == (1 + 2 * len(scene.things), 4)
        assert palette[:, 3].sum() == pytest.approx(1, abs=1e-5)


def test_identity_vectors_do_not_change_under_a_patterns_own_symmetry():
    identity = world.random_identity(np.random.default_rng(3), pattern=world.PATTERNS.index("checked"))
    turned = world.Identity(**{**identity.__dict__, "angle": identity.angle + np.pi / 2})
    assert np.allclose(identity.vector(), turned.vector(), atol=1e-5)
    other = world.Identity(**{**identity.__dict__, "angle": identity.angle + np.pi / 4})
    assert not np.allclose(identity.vector(), other.vector(), atol=0.1)


def test_one_identity_seed_gives_one_appearance_in_any_picture():
    first, _ = world.draw_description("a star on a mint background", seed=1, identity_seed=9)
    second, _ = world.draw_description("a house", seed=2, identity_seed=9)
    assert first.scene.things[0].identity == second.scene.things[0].identity
    third, _ = world.draw_description("a house", seed=2, identity_seed=10)
    assert third.scene.things[0].identity != second.scene.things[0].identity


def test_an_enlarged_picture_shows_the_same_scene():
    small, masks = world.draw_description("a star and a ball on a mint background", seed=4, identity_seed=0)
    large, large_masks = world.draw_description("a star and a ball on a mint background", 4, 0, enlarge=4)
    assert large.image.shape == (256, 256, 3)
    shrunk = large.image.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(shrunk - small.image).mean() < 0.01
    assert np.abs(large_masks.reshape(2, 64, 4, 64, 4).mean((2, 4)) - masks).mean() < 0.005


def test_masks_of_a_description_come_in_the_order_of_its_words():
    picture, masks = world.draw_description("a star and a ball and a fish", seed=4, identity_seed=0)
    nouns = [thing.noun for thing in picture.scene.things]
    for mask, word in zip(masks, ("star", "ball", "fish"), strict=True):
        assert np.array_equal(mask, picture.masks[nouns.index(world.NOUNS.index(word))])
    _, pair = world.draw_description("two stars and a ball", seed=4, identity_seed=0)
    assert len(pair) == 3


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a red unicorn", "unicorn"),
        ("a ball on a pink background", "pink"),
        ("three balls and three stars", "6 things"),
        ("a red", "must name"),
        ("", "must name"),
        ("a red and red ball", "same color"),
        ("a left ball", "must follow"),
        ("at the top a ball", "must follow"),
        ("two balls at the left", "one only"),
    ],
)
def test_what_the_world_does_not_know_gets_one_sentence(caption, named):
    with pytest.raises(ValueError, match=named) as error:
        world.parse_caption(caption)
    assert "\n" not in str(error.value)
