"""Losses and batches of Shapeland's training against hand-made cases."""

import csv
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")

from conceptloom.encoders.fastcomposer import FUSER, split
from conceptloom.encoders.fuser import Fuser
from conceptloom.shapeland import models, world
from conceptloom.training.base import open_base
from conceptloom.training.open_attention import OpenAttention
from conceptloom.training.sampling import sample
from conceptloom.training.shapeland import autoencoder, clip, fuser, latents, promptnet, scenes, unet


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A shard of 48 pictures."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "SHARD", 48)
        patch.setattr(latents, "SHARD", 48)
        scenes.draw(folder, 1, seed=3, workers=1)
        yield scenes.Scenes(folder, 1)


def test_shards_hold_the_worlds_truth(data):
    for row in range(48):
        picture = world.render(world.random_scene(np.random.default_rng((3, 0, row))))
        scene = picture.scene
        words = [scenes.WORDS[w] for w in data.take("words", np.array([row]))[0] if w]
        assert " ".join(words) == scene.caption
        assert np.abs(data.take("image", np.array([row]))[0] / 255 - picture.image).max() < 0.003
        nouns = data.take("noun", np.array([row]))[0]
        assert [n for n in nouns if n >= 0] == [t.noun for t in scene.things]
        describes = data.take("describes", np.array([row]))[0]
        for i, at in enumerate(scene.noun_words):
            assert set(np.flatnonzero(describes[i])) == {at, *scene.attribute_words[i]}


def test_what_a_phrase_says_is_read_from_its_words(data):
    batch = clip.clip_batch(data, np.arange(48), "cpu")
    for row in range(48):
        scene = world.random_scene(np.random.default_rng((3, 0, row)))
        mentions = {m.noun: m for m in world.parse_caption(scene.caption)[0]}
        for i, thing in enumerate(scene.things):
            m = mentions[thing.noun]
            words = (m.color, m.second, m.pattern, m.size, m.across, m.down)
            assert batch["said"][row, i].tolist() == [thing.noun, *(-1 if v is None else v for v in words)]
            identity = thing.identity
            looks, places = batch["have"][row, i].split((4, 3))
            assert looks.tolist() == [thing.noun, identity.color, identity.second, identity.pattern]
            # What is said is true, and where nothing is said the truth is known all the same.
            assert all(v is None or v == true for v, true in zip(words[3:], places.tolist(), strict=True))
            assert places[1] == (0 if thing.x < 24 else 1 if thing.x > 40 else -2)


def test_a_phrase_is_true_of_every_thing_that_has_what_it_says():
    said = torch.tensor([[1, 2, -1, -1, -1], [1, -1, -1, 3, -1], [0, -1, -1, -1, -1], [1, -1, -1, -1, 0]])
    have = torch.tensor([[1, 2, 5, 3, -2], [1, 4, 2, 3, 0]])
    truth = [[True, False], [True, True], [False, False], [False, True]]
    assert clip.phrase_is_true(said, have).tolist() == truth


def test_batches_hold_what_is_true_of_each_thing(data):
    numbered = torch.arange(48.0)[:, None, None, None].expand(48, 8, 16, 16).half()
    batch = latents.LatentScenes(data, numbered, "cpu").take(np.arange(47, -1, -1))
    pairs = 0
    for at, row in enumerate(range(47, -1, -1)):
        picture = world.render(world.random_scene(np.random.default_rng((3, 0, row))))
        scene = picture.scene
        label = data.take("label", np.array([row]))[0]
        assert batch.latents[at].eq(row).all()
        spoken = [scenes.WORDS[w] for w in batch.tokens(torch.zeros(48, dtype=torch.bool))[at, 1:] if w]
        assert " ".join(spoken) == scene.caption
        assert not batch.tokens(torch.ones(48, dtype=torch.bool))[at, 1:].any()
        for i, thing in enumerate(scene.things):
            identity = thing.identity
            known = [thing.noun, identity.color, identity.second, identity.pattern]
            assert batch.classes[at, i].tolist() == known
            same = [j for j, other in enumerate(scene.things) if other.noun == thing.noun]
            for cells, who in ((batch.cells, [i]), (batch.named, same)):
                expected = np.isin(label, [j + 1 for j in who]).reshape(16, 4, 16, 4).mean((1, 3))
                assert np.allclose(cells[at, i], expected)
            pairs += len(same) > 1
            # The start token stands before the first word.
            marked = {int(j) - 1 for j in batch.describes[at, i].nonzero()}
            assert marked == {scene.noun_words[i], *scene.attribute_words[i]}
        assert batch.present[at].sum() == len(scene.things)
        assert (batch.classes[at, len(scene.things) :, 0] == -1).all()
    assert pairs > 4


def test_latents_move_as_their_pictures_do():
    """Means of blocks commute with turns and halving."""
    small = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pictures = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    seen = set()
    for seed in range(12):
        there, picture = (autoencoder.moved(x, torch.Generator().manual_seed(seed)) for x in (small, pictures))
        assert torch.allclose(there, torch.nn.functional.avg_pool2d(picture, 4), atol=1e-6)
        assert not torch.equal(there, small)
        seen.add(tuple(there.shape))
    assert seen == {(2, 3, 4, 4), (2, 3, 2, 2)}


def test_readings_are_cross_entropies_of_what_covers_each_cell():
    readers = unet.Readers((5,))
    torch.nn.init.normal_(readers.maps[0].weight)
    feature = torch.randn(1, 5, 16, 16)
    cells = torch.zeros(1, 3, 16, 16)
    cells[0, 0, 2, 3], cells[0, 1, 2, 3], cells[0, 1, 7, 7] = 0.25, 0.5, 1.0
    classes = torch.tensor([[[1, 2, 3, 0], [7, 4, 5, 3], [-1, 0, 0, 0]]])
    with torch.no_grad():
        loss = readers.loss([feature], cells, classes)
        read = [r[0].log_softmax(0) for r in readers.maps[0](feature).split(unet.Readers.CLASSES, 1)]
    covered = {(2, 3): [(0, 0.25), (1, 0.5)], (7, 7): [(1, 1.0)]}
    expected = 0.0
    for kind in range(4):
        entropy = weight = 0.0
        for y in range(16):
            for x in range(16):
                for thing, share in covered.get((y, x), []):
                    entropy -= share * float(read[kind][classes[0, thing, kind], y, x])
                    weight += share
                if kind == 0:
                    bare = 1 - sum(share for _, share in covered.get((y, x), []))
                    entropy -= bare * float(read[0][8, y, x])
                    weight += bare
        expected += entropy / weight
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_open_attention_is_the_models_own():
    torch.manual_seed(0)
    model = models.build_unet().eval()
    x, t, context = torch.randn(2, 8, 16, 16), torch.tensor([5, 600]), torch.randn(2, models.TOKENS, models.WIDTH)
    with torch.no_grad():
        plain = model(x, t, context).sample
    attention = OpenAttention(model, unet.OPENED)
    first = model.get_submodule(attention.names[0])
    seen = []
    first.register_forward_hook(lambda _layer, inputs, _output: seen.append(inputs[0]))
    with torch.no_grad(), attention.collecting() as maps:
        recorded = model(x, t, context).sample
        # One head after another.
        query, key = (
            layer(given).unflatten(-1, (first.heads, -1)).unbind(2)
            for layer, given in ((first.to_q, seen[0]), (first.to_k, context))
        )
        width = query[0].shape[-1]
        heads = [(q @ k.mT / width**0.5).softmax(-1) for q, k in zip(query, key, strict=True)]
    assert torch.allclose(plain, recorded, atol=1e-5)
    assert sorted({m.shape[1] for m in maps}) == [64, 256]
    assert len(maps) == 2 + 2 + 3 + 3
    torch.testing.assert_close(maps[0], sum(heads) / first.heads)
    assert (heads[0] - heads[1]).abs().max() > 1e-3
    assert all(torch.allclose(m.sum(-1), torch.ones(m.shape[:2]), atol=1e-4) for m in maps)


def test_open_attention_compiles_without_a_break():
    from diffusers.models.attention_processor import Attention

    blocks = torch.nn.ModuleDict({"attn2": Attention(query_dim=8, cross_attention_dim=4, heads=2, dim_head=4)})
    model = torch.nn.ModuleDict({"block": blocks})
    attention = OpenAttention(model, ["block"])
    compiled = torch.compile(blocks["attn2"], backend="eager", fullgraph=True)
    x, context = torch.randn(1, 4, 8), torch.randn(1, 3, 4)
    for _ in range(2):
        with attention.collecting() as maps:
            compiled(x, encoder_hidden_states=context)
        assert [m.shape for m in maps] == [(1, 4, 3)]


def test_sampler_with_a_perfect_model_gives_the_picture():
    """v of a known latent, solved by DDIM with guidance, ends at that latent; each step has its own states."""
    target = torch.randn(1, 8, 16, 16)
    alphas = unet.noise_levels("cpu")
    told = []

    def perfect(x, t, states):
        told.append(states[0][:, 0, 0].tolist())
        a, s = alphas[t] ** 0.5, (1 - alphas[t]) ** 0.5
        noise = (x - a * target) / s
        return a * noise - s * target

    empty = torch.zeros(2, models.TOKENS, models.WIDTH), None
    out = sample(
        perfect,
        models.SCHEDULE,
        (2, 8, 16, 16),
        empty,
        lambda i, *_: (empty[0] + i, None),
        steps=10,
        guidance=3.0,
        seed=0,
    )
    assert torch.allclose(out, target.expand(2, -1, -1, -1), atol=1e-3)
    assert told == [[0, 0, i, i] for i in range(10)]


def test_guidance_goes_beyond_what_the_text_says():
    """One step from pure noise to the predicted latent: with no text's 1 and the text's 2, guidance 3 gives 4."""
    alphas = unet.noise_levels("cpu")

    def predict(x, t, states):
        a, s = alphas[t] ** 0.5, (1 - alphas[t]) ** 0.5
        latent = 1 + states[0][:, :1, :1, None]
        return (a * x - latent) / s

    empty, text = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    out = sample(
        predict, models.SCHEDULE, (1, 8, 2, 2), (empty, None), lambda *_: (text, None), 1, guidance=3.0, seed=0
    )
    assert torch.allclose(out, torch.full((1, 8, 2, 2), 4.0), atol=1e-4)


def test_a_unet_is_trained_in_lanes_and_judged(data, tmp_path, monkeypatch):
    """The whole stage at the smallest size: its loss, its weights, and what its report says of them."""
    narrow = {**models.UNET_CONFIG, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    monkeypatch.setattr(models, "UNET_CONFIG", narrow)
    monkeypatch.setattr(latents, "SHARD", 16)
    monkeypatch.setattr(unet, "RUNS", tmp_path)
    monkeypatch.setattr(unet, "open_scenes", lambda *_: data)
    encoded = torch.randn(48, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(unet, "encoded", lambda *_: encoded.half())
    written = {**models.FILES, "unet": tmp_path / "unet.st"}
    monkeypatch.setattr(unet, "weights_file", written.__getitem__)
    monkeypatch.setattr(unet, "GAIN_PICTURES", 16)
    whole, judged = unet.Run.train, unet.evaluate

    def train(run, losses, log_every, report, report_every, seconds):
        """As the stage does, but with a row of the log for each step and a report at the end."""
        whole(run, losses, 1, report=report, report_every=12, seconds=seconds)

    monkeypatch.setattr(unet.Run, "train", train)
    monkeypatch.setattr(unet, "evaluate", lambda state, sheet, device, **_: judged(state, sheet, device, 2, 2))
    unet.train_unet("cpu", 12, 8, lanes=2)
    rows = {}
    for name in ("log", "report"):
        with open(tmp_path / "unet" / f"{name}.csv", encoding="utf-8") as file:
            rows[name] = list(csv.DictReader(file))
    assert float(rows["log"][-1]["noise"]) < float(rows["log"][0]["noise"])
    (report,) = rows["report"]
    assert 0 <= float(report["nouns"]) <= 1 and report["patterns"]
    # So short a training has taught nothing of captions.
    assert all(abs(float(report[f"gain_{time}"])) < 0.05 for time in unet.GAIN_TIMES)
    assert models.load("unet", tmp_path / "unet.st").keys() == models.build_unet().state_dict().keys()


def test_things_are_said_with_all_their_looks_and_bare(data):
    base = open_base("shapeland")
    batch = fuser.said_and_bare(data, np.arange(48), base)
    expected = []
    for row in range(48):
        scene = world.random_scene(np.random.default_rng((3, 0, row)))
        label = data.take("label", np.array([row]))[0]
        expected += [(row, thing) for i, thing in enumerate(scene.things) if (label == i + 1).sum() >= 20]
    assert len(expected) == len(batch["picture"]) > 48
    for at, (row, thing) in enumerate(expected):
        assert batch["picture"][at] == row
        identity, words = thing.identity, {}
        for name in ("said", "bare"):
            tokens = [scenes.WORDS[t] if t < len(scenes.WORDS) else "<start>" for t in batch[name][row, 0]]
            words[name] = tokens[: batch[f"{name}_row"][at] + 1]
        looks = [world.COLORS[identity.color], "and", world.COLORS[identity.second], world.PATTERNS[identity.pattern]]
        assert words["said"][-5:] == [*looks, world.NOUNS[thing.noun]]
        assert words["bare"][-1] == world.NOUNS[thing.noun] and not set(words["bare"]) & {*looks} - {"and"}
        pixels = batch["object"][at].permute(1, 2, 0)
        colors = torch.tensor([identity.rgb, identity.second_rgb])
        near = (pixels[:, :, None] - colors).abs().amax(-1).amin(-1) < 0.1
        # A moon covers least of its box.
        assert near.float().mean() > 0.15, (row, thing)


def test_a_fuser_learns_what_words_would_say_and_leaves_a_file_to_start_from(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuser, "open_scenes", lambda *_: data)
    for name, value in {"SHARD": 16, "HELD_OUT": 16, "BATCH": 16, "RUNS": tmp_path}.items():
        monkeypatch.setattr(fuser, name, value)
    fuser.train_fuser("cpu", 40)
    assert float(re.search(r"([\d.]+)% of what words add", capsys.readouterr().out)[1]) > 15
    taught = split(load_file(tmp_path / "fuser" / "fuser.safetensors"))[FUSER]
    assert Fuser.from_state(taught).text_width == models.WIDTH


def test_a_words_place_and_what_it_has_to_say(data):
    """Rows of the caption without looks are paired with those of the same words in the caption with them."""
    base = open_base("shapeland")
    rows = promptnet.single_things(data, 0, 48)
    assert 5 < len(rows) < 48
    asked = promptnet.Said(data, rows, base, "cpu")
    tokens = fuser.said_and_bare(data, rows, base)
    seen = 0
    for index, bare, said in zip(*asked.rows_bare, asked.rows_said[1], strict=True):
        kept = tokens["picture"][index]
        assert tokens["bare"][kept, 0, bare] == tokens["said"][kept, 0, said]
        seen += 1
    assert seen == len(asked.states) and seen > 3 * len(asked.pictures)
    assert all(scenes.WORDS[asked.bare[i, at]] in world.NOUNS for i, at in enumerate(asked.place))


def test_promptnet_learns_what_words_would_say(data, tmp_path, monkeypatch, capsys):
    from conceptloom.encoders.files import read
    from conceptloom.encoders.promptnet import PromptNet, heads_of

    monkeypatch.setattr(promptnet, "open_scenes", lambda *_: data)
    for name, value in {"SHARD": 16, "HELD_OUT": 16, "BATCH": 8, "RUNS": tmp_path, "CHANNELS": [32] * 4}.items():
        monkeypatch.setattr(promptnet, name, value)
    promptnet.train_promptnet("cpu", 16)
    assert float(re.search(r"([\d.]+)% of what words for looks", capsys.readouterr().out)[1]) > 5
    value, metadata = read(tmp_path / "promptnet" / "promptnet.safetensors")
    assert PromptNet.from_state(value, heads_of(metadata)).config.context_width == models.WIDTH
