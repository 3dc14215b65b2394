"""The training of Composer's adapter: what it keeps, what it reads and changes, and the file that it leaves."""

import re
import shutil
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from conceptloom.compositions.depth import normalized_depth
from conceptloom.encoders.composer_adapter import LOCAL_CHANNELS, load
from conceptloom.shapeland import models, world
from conceptloom.training import composer, data
from conceptloom.training.composer import script
from conceptloom.training.composer.model import ComposerTraining, config_of
from conceptloom.training.composer.pictures import NAMES, Composed, collate, draw_kept, draw_mask, read_batches
from conceptloom.training.draws import shares_of, toward_noise
from environment import absent_weights
from PIL import Image

pytestmark = pytest.mark.skipif(bool(absent_weights()), reason="Shapeland's weights are incomplete")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six drawn pictures with all that lies beside them, and one alone."""
    root = tmp_path_factory.mktemp("compositions")
    data.main(["compositions", "--root", str(root), "--count", "6"])
    Image.new("RGB", (96, 64), (255, 128, 0)).save(root / "alone.jpg")
    return root


@pytest.fixture(scope="module")
def base():
    from conceptloom.training.base import open_base

    return open_base("shapeland")


def test_what_is_kept_follows_the_paper():
    """All kept in 0.1, none in 0.1, else each with 0.5, intensity with 0.3."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.tensor([list(draw_kept(generator).values()) for _ in range(40_000)]).float()
    expected = {name: 0.5 for name in NAMES} | {"intensity": 0.34}
    for i, name in enumerate(NAMES):
        assert float(kept[:, i].mean()) == pytest.approx(expected[name], abs=0.012), name
    assert float((kept.sum(1) == 0).float().mean()) == pytest.approx(0.1044, abs=0.008)
    assert float((kept.sum(1) == len(NAMES)).float().mean()) == pytest.approx(0.1019, abs=0.008)
    both = (kept[:, :1] * kept[:, 1:2]).mean()
    assert float(both) == pytest.approx(0.30, abs=0.012)
    with_intensity = (kept[:, 0] * kept[:, NAMES.index("intensity")]).mean()
    assert float(with_intensity) == pytest.approx(0.22, abs=0.012)


def test_masks_are_strokes_rectangles_and_halves():
    generator = torch.Generator().manual_seed(1)
    masks = torch.stack([draw_mask(32, generator) for _ in range(600)])
    shares = masks.mean((1, 2))
    assert shares.min() > 0 and shares.max() <= 0.7
    halves = (shares == 0.5) & ((masks.amax(2).mean(1) == 0.5) | (masks.amax(1).mean(1) == 0.5))
    assert float(halves.float().mean()) == pytest.approx(0.1, abs=0.04)
    filled = torch.stack([_is_rectangle(mask) for mask in masks]) & ~halves
    assert 0.15 < float(filled.float().mean()) < 0.3


def _is_rectangle(mask):
    ys, xs = mask.nonzero(as_tuple=True)
    return (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1) == len(ys)


def test_pictures_are_taken_apart(folder, base):
    pictures = Composed(folder, 64)
    assert len(pictures) == 7 and [file.name for file in pictures.files][-1] == "alone.jpg"
    seen = {name: 0 for name in NAMES}
    for row in range(6):
        for epoch in range(12):
            item = pictures[row, epoch]
            again = pictures[row, epoch]
            assert all(torch.equal(item[n], again[n]) for n in item if torch.is_tensor(item[n]))
            image = (item["target"].movedim(0, -1) + 1) / 2
            assert float(image.min()) >= 0 and float(image.max()) <= 1
            depth = np.asarray(Image.open(pictures.files[row].with_name(f"{pictures.files[row].stem}.depth.png")))
            torch.testing.assert_close(item["depth"][0], normalized_depth(torch.from_numpy(depth.copy())))
            things = (item["instances"].sum(0) > 0).float().mean()
            assert 0 < float(things) < 1
            hidden = item["mask"][3] == 0
            assert hidden.any() and not item["mask"][:3, hidden].any()
            assert torch.allclose(item["mask"][:3, ~hidden], item["target"][:, ~hidden])
            gray = item["intensity"][0]
            assert (gray <= image.amax(-1) + 1e-5).all() and (gray >= image.amin(-1) - 1e-5).all()
            for i, name in enumerate(NAMES):
                seen[name] += int(item["kept"][i])
            assert bool(item["caption"]) == bool(item["kept"][0])
    assert all(10 < count < 65 for count in seen.values()), seen
    alone = [pictures[6, epoch] for epoch in range(12)]
    assert all(not item["kept"][NAMES.index(name)] for item in alone for name in ("caption", "depth", "instances"))
    assert not any(item["depth"].any() for item in alone)
    batch = collate([pictures[row, 0] for row in range(7)], base.vocabularies)
    assert batch["tokens"].shape == (7, 1, 77) and batch["kept"].shape == (7, 8)
    assert all(batch[name].shape == (7, c, 64, 64) for name, c in LOCAL_CHANNELS.items())


def test_maps_beside_a_picture_are_read_as_the_node_reads_them(tmp_path):
    """Thin strokes, dark ones too, and maps in the colors of a table."""
    Image.new("RGB", (256, 256), "gray").save(tmp_path / "a.png")
    strokes = Image.new("L", (256, 256), 255)
    strokes.paste(0, (100, 0, 101, 256))
    strokes.save(tmp_path / "a.sketch.png")
    ramp = Image.fromarray(np.arange(0, 256, dtype=np.uint8)[None].repeat(256, 0))
    ramp.convert("RGB").quantize(256).save(tmp_path / "a.depth.png")
    item = Composed(tmp_path, 64)[0, 0]
    assert torch.equal(item["sketch"][0], torch.zeros(64, 64).index_fill(1, torch.tensor(25), 1.0))
    depth = item["depth"][0, 32]
    assert (depth[1:] > depth[:-1]).all() and depth[0] < 0.05 and depth[-1] > 0.95


def make_model(base, mode="levels"):
    model = ComposerTraining(base, config_of(base, "Shapeland", mode, 8, 8))
    for p in model.adapter.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def make_batch(folder, base, rows=(0, 1, 2)):
    from conceptloom.training.draws import draw

    pictures = Composed(folder, 64)
    batch = collate([pictures[row, 0] for row in rows], base.vocabularies)
    draws = draw(0, range(len(rows)), base.latent_shape, base.times)
    return {**batch, "noise": draws.noise, "latent": draws.latent, "t": draws.t}


def test_rows_of_which_all_is_dropped_are_the_base_models(folder, base):
    model, batch = make_model(base), make_batch(folder, base)
    batch["kept"] = torch.tensor([[1.0] * 8, [0.0] * 8, [0.0] * 8])
    batch["tokens"][1:] = torch.tensor(base.vocabularies[0].row(""))
    with torch.no_grad():
        states, sentences = model.read(batch["tokens"])
        noisy, _ = base.noised(batch["noise"] * 0.5, batch["noise"], batch["t"])
        features = model.adapter(model.conditions(batch, sentences), (16, 16))
        found = model.predict(noisy, batch["t"], states, features)
        plain = base.predict(noisy, batch["t"], states)
    torch.testing.assert_close(found[1:], plain[1:], rtol=0, atol=1e-5)
    assert float((found[0] - plain[0]).abs().max()) > 1e-3


def test_gradients_reach_the_adapter_and_nothing_else(folder, base):
    model, batch = make_model(base), make_batch(folder, base)
    batch["kept"] = torch.ones(3, 8)
    sum(model(batch).values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.adapter.parameters())
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("adapter."))
    model.zero_grad()


def run(folder, out, steps, *more):
    composer.main(
        ["--base", "shapeland", "--data", str(folder), "--out", str(out), "--steps", str(steps), "--batch-size", "2"]
        + ["--local-width", "8", "--body-share", "8", "--log-every", "1", "--learning-rate", "0.001", *more]
    )


def test_a_continued_run_is_the_uninterrupted_one_and_its_file_loads(narrow, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("conceptloom.training.composer.script.SHEET_STEPS", 1)
    run(folder, tmp_path / "one", 2, "--sheet-every", "0")
    run(folder, tmp_path / "one", 3, "--sheet-every", "3")
    run(folder, tmp_path / "two", 3, "--sheet-every", "0")
    nets = [load(tmp_path / name / "composer.safetensors") for name in ("one", "two")]
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert nets[0].config.levels == (32, 64, 64, 64) and nets[0].config.sentence_width == 128
    with Image.open(tmp_path / "one" / "samples_0000003.png") as sheet:
        # The picture, and one from the caption, from each of seven and from all; eight rows at most.
        assert sheet.size == (10 * 64 * 2, 7 * 64 * 2)
    assert re.search(r"composer\.safetensors: \d\.\d MiB", capsys.readouterr().out)
    # A run of no step that starts from a file leaves that file's adapter.
    file = str(tmp_path / "one" / "composer.safetensors")
    run(folder, tmp_path / "three", 0, "--start", file)
    started = load(tmp_path / "three" / "composer.safetensors").state_dict()
    assert all(torch.equal(a, b) for a, b in zip(started.values(), nets[0].state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="--start: expected an adapter of this architecture, got composer.safetensors"):
        run(folder, tmp_path / "four", 1, "--start", file, "--local-width", "16")


def test_cubic_timesteps_are_mostly_high():
    """(1 - (t/T)^3) T of each t, whose mean is three quarters of T."""
    t = torch.arange(1000)
    found = toward_noise(t, 1000)
    assert found.tolist() == [int((1 - ((i + 0.5) / 1000) ** 3) * 1000) for i in range(1000)]
    assert found.double().mean() == pytest.approx(749.5, abs=0.5) and found.min() >= 0 and found.max() == 999


def test_from_noise_alone_the_target_is_the_picture(base):
    """Of noise alone the UNet is to predict the v with which the denoised latents are the picture's; what it sees of
    others is the same as without such rows."""
    latents, noise = torch.randn(2, 3, *base.latent_shape, generator=torch.Generator().manual_seed(3))
    t, alone = torch.tensor([999, 999, 400]), torch.tensor([True, False, False])
    noisy, target = base.noised(latents, noise, t, alone)
    plain, its_target = base.noised(latents, noise, t)
    assert torch.equal(noisy[0], noise[0]) and not torch.equal(noisy[0], plain[0])
    assert torch.equal(noisy[1:], plain[1:]) and torch.equal(target[1:], its_target[1:])
    share = base.scheduler.alphas_cumprod[t].double()[:, None, None, None]
    denoised = share.sqrt() * noisy - (1 - share).sqrt() * target
    torch.testing.assert_close(denoised, latents.double(), rtol=0, atol=1e-4)


def test_a_share_of_pictures_begins_from_noise(folder, base):
    shares = shares_of(len(Composed(folder, 64)), Namespace(batch_size=2, accumulate=1, steps=40, seed=0), 2, 0, (1, 0))
    batches = list(read_batches(Composed(folder, 64), base, shares, 0, torch.device("cpu"), from_noise=0.25))
    alone = torch.cat([batch["alone"] for batch in batches])
    assert 0.1 < float(alone.float().mean()) < 0.4
    assert all((batch["t"][batch["alone"]] == base.times - 1).all() for batch in batches)
    assert torch.cat([batch["t"] for batch in batches])[~alone].float().mean() < 700


def test_all_pictures_keep_the_only_representation_that_is_trained(folder):
    generator = torch.Generator().manual_seed(0)
    kept = torch.tensor([list(draw_kept(generator, "intensity").values()) for _ in range(40_000)]).float()
    only = torch.tensor([float(name in (NAMES[0], "intensity")) for name in NAMES])
    alone = (kept == only).all(1)
    # Half, and the few of the others that come out the same.
    assert float(alone.float().mean()) == pytest.approx(0.5 + 0.5 * 0.8 * 0.5**7, abs=0.01)
    for i, name in enumerate(NAMES):
        share = 1 if name == "intensity" else 0.5
        assert float(kept[~alone, i].mean()) == pytest.approx(share, abs=0.015), name
    pictures = Composed(folder, 64, only="palette")
    seen = [pictures[row, epoch]["kept"] for row in range(6) for epoch in range(8)]
    assert all(one[NAMES.index("palette")] for one in seen)
    assert 0.3 < sum(float(one.sum() == 2 and one[NAMES.index("palette")]) for one in seen) / len(seen) < 0.7


def test_bad_options_are_told(folder, tmp_path):
    for more, said in (
        (("--data", str(tmp_path / "nothing")), "--data: expected a folder with pictures"),
        (("--average", "1"), "--average: expected a share from 0 up to but not 1, got 1"),
        (("--local-width", "0"), "--local-width: expected at least 1, got 0"),
        (("--from-noise", "2"), "--from-noise: expected a share from 0 to 1, got 2"),
        (
            ("--only", "wings"),
            "--only: expected one of caption, semantics, palette, sketch, instances, depth, intensity, mask, got wings",
        ),
        (("--only", "depth"), "--only: expected an adapter whose other weights stay, got none; name it with --start"),
        (("--start", str(folder / "alone.jpg")), "--start: expected a Composer adapter, got alone.jpg"),
        (("--export", "a.bin"), "--export: expected a name that ends in .safetensors, got a.bin"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
            run(folder, tmp_path / "run", 1, *more)


def test_the_script_trains_what_it_is_told_to(narrow, folder, tmp_path, monkeypatch):
    file = str(tmp_path / "plain" / "composer.safetensors")
    told = {"plain": (), "noise": ("--from-noise", "1"), "intensity": ("--start", file, "--only", "intensity")}
    for name, more in told.items():
        run(folder, tmp_path / name, 1, *more, "--sheet-every", "0")
    plain, noise, intensity = (load(tmp_path / name / "composer.safetensors").state_dict() for name in told)
    assert any(not torch.equal(plain[key], noise[key]) for key in plain)
    changed = {key for key in plain if not torch.equal(plain[key], intensity[key])}
    assert changed >= {"add.intensity.2.weight", "stacks.intensity.third.weight"}
    assert all("intensity" in key.split(".") for key in changed)
    with pytest.raises(ValueError, match="--out: expected a new folder, or one of a run with from noise 1"):
        run(folder, tmp_path / "plain", 2, "--from-noise", "1", "--sheet-every", "0")
    # Another file of the same name.
    shutil.copy(tmp_path / "noise" / "composer.safetensors", file)
    with pytest.raises(ValueError, match=r"one of a run with start composer.safetensors \(\w{8}\), got .*begun"):
        run(folder, tmp_path / "intensity", 2, *told["intensity"], "--sheet-every", "0")
    # As Stable Diffusion 2's adapters, which take no sentence.
    monkeypatch.setattr(script, "config_of", lambda *given: replace(config_of(*given), sentence_width=0))
    run(folder, tmp_path / "silent", 0)
    start = str(tmp_path / "silent" / "composer.safetensors")
    with pytest.raises(ValueError, match="--only: expected a representation .* weights for, got caption"):
        run(folder, tmp_path / "said", 1, "--start", start, "--only", "caption")


def test_noise_alone_is_nothing_for_a_base_that_predicts_noise(narrow, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(models.SCHEDULE, "prediction_type", "epsilon")
    with pytest.raises(ValueError, match="--from-noise: expected 0 for a base that predicts epsilon, .*, got 0.1"):
        run(folder, tmp_path / "run", 1, "--from-noise", "0.1")


def test_stable_diffusion_is_trained(diffusers_folder, folder, tmp_path, monkeypatch):
    """With one text tower and with two, from a diffusers folder to the adapter's file and a sheet."""
    root, twofold = diffusers_folder
    monkeypatch.setattr(script, "SHEET_STEPS", 2)
    monkeypatch.setattr(script, "SHOWN", 1)
    composer.main(
        ["--base", str(root), "--vision", str(root / "vision"), "--data", str(folder), "--out", str(tmp_path),
         "--resolution", "32", "--steps", "1", "--batch-size", "2", "--local-width", "4", "--log-every", "1",
         "--sheet-every", "1"]
    )  # fmt: skip
    config = load(tmp_path / "composer.safetensors").config
    widths = (80, 24) if twofold else (32, 32)
    assert (config.context_width, config.sentence_width, config.semantics_width) == (*widths, 24)
    assert config.prediction == "epsilon" and len(config.levels) == (3 if twofold else 4)
    assert (tmp_path / "samples_0000001.png").exists()


def test_every_other_drawn_picture_has_a_caption_of_nouns_alone(folder):
    """Where the caption tells each color, neither palette nor intensity tells more."""
    said = [next(folder.glob(f"*/{number:07d}.txt")).read_text(encoding="utf-8").strip() for number in range(6)]
    scenes = [world.random_scene(np.random.default_rng((0, number))) for number in range(6)]
    assert said[::2] == [scene.caption for scene in scenes[::2]]
    for caption, scene in zip(said[1::2], scenes[1::2], strict=True):
        things = [name for thing in scene.things for name in (world.NOUNS[thing.noun], world.PLURALS[thing.noun])]
        assert set(caption.split()) <= {*world.COUNTS, "and", *things} and caption != scene.caption
        assert sum(word not in {*world.COUNTS, "and"} for word in caption.split()) == len(set(scene.noun_words))
