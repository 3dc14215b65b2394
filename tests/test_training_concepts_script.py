"""Training a concept from the command line, on Shapeland."""

import numpy as np
import pytest
import torch
from PIL import Image

for package in ("diffusers", "transformers", "accelerate"):
    pytest.importorskip(package, reason=f"{package} is not installed (pip install {package})")

from accelerate.state import AcceleratorState  # noqa: E402
from conceptloom.encoders import concept_files  # noqa: E402
from conceptloom.shapeland import world  # noqa: E402
from conceptloom.training import concepts  # noqa: E402
from conceptloom.training.concepts import diffusion  # noqa: E402
from conceptloom.training.concepts.script import read_pictures  # noqa: E402
from conceptloom.training.loop import Run  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Two pictures of one star with their masks, the second with a caption of its own."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir(), masks.mkdir()
    for i in range(2):
        picture = world.render(world.random_scene(np.random.default_rng(i)))
        Image.fromarray(np.uint8(picture.image * 255)).save(images / f"{i}.png")
        Image.fromarray(np.uint8(picture.masks[0] * 255)).save(masks / f"{i}.png")
    (images / "1.txt").write_text("a red {}\n")
    return tmp_path


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Pictures of the class are drawn in two steps."""
    monkeypatch.setattr(diffusion, "STEPS", 2)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its precision for the whole process."""
    yield
    AcceleratorState._reset_state(True)


def command(folder, *more, out="run"):
    arguments = ["--base", "shapeland", "--images", folder / "images", "--class-word", "star", "--out", folder / out]
    arguments += ["--caption", "a {}", "--class-pictures", "2", "--batch-size", "1", "--log-every", "1", *more]
    concepts.main([str(a) for a in arguments])


def test_pictures_come_with_their_captions_and_masks(folder):
    pictures = read_pictures(folder / "images", folder / "masks", "a {}")
    assert list(pictures.captions) == ["a {}", "a red {}"]
    assert pictures.images[0].shape == (64, 64, 3) and pictures.masks[1].shape == (64, 64)
    expected = world.render(world.random_scene(np.random.default_rng(1))).masks[0]
    assert np.abs(pictures.masks[1].numpy() - expected).max() < 1 / 200


def test_a_continued_run_is_the_uninterrupted_one(narrow, folder, capsys, monkeypatch):
    command(folder, "--steps", "6", out="whole")
    save = Run.save

    def save_and_stop(run):
        save(run)
        if run.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
        stopping.setattr(Run, "save", save_and_stop)
        command(folder, "--steps", "6", "--save-minutes", "0", out="parts")
    command(folder, "--steps", "6", out="parts")
    whole, parts = (concept_files.load(folder / out / "concept.safetensors") for out in ("whole", "parts"))
    assert len(whole.base) == 16
    assert whole.placeholder == "<new1>" and whole.class_word == "star" and len(whole.deltas) == 10
    for key, changed in whole.deltas.items():
        for part, delta in changed.items():
            assert delta.matrix().any()
            assert torch.equal(delta.matrix(), parts.deltas[key][part].matrix())
    assert torch.equal(whole.tokens["l"], parts.tokens["l"])
    steps = [int(line.split(",")[0]) for line in (folder / "parts" / "log.csv").read_text().splitlines()[1:]]
    assert steps == list(range(1, 7))
    assert "concept.safetensors" in capsys.readouterr().out


def test_masks_factors_and_half_precision_train_too(narrow, folder):
    command(
        folder, "--masks", folder / "masks", "--rank", "2", "--precision", "bf16", "--steps", "2", "--checkpointing"
    )
    concept = concept_files.load(folder / "run" / "concept.safetensors")
    assert all(delta.factors[0].shape[1] == 2 for parts in concept.deltas.values() for delta in parts.values())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--caption", "a star"], "captions: expected {} exactly once"),
        (["--placeholder", "my dog"], "placeholder: expected a word without spaces"),
        (["--caption", "photo of a {}"], "captions: expected Shapeland's words, got 'photo'"),
        (["--class-word", "dog"], "captions: expected Shapeland's words, got 'dog'"),
        (["--caption", "a red " * 40 + "{}"], "captions: expected {} among the first 75 tokens, got it at 81"),
        (["--learning-rate", "-1"], "--learning-rate: expected at least 0, got -1.0"),
        (["--resolution", "60"], "--resolution: expected a multiple of 32"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(narrow, folder, more, said):
    with pytest.raises(ValueError, match=said.replace("{", r"\{").replace("}", r"\}")):
        command(folder, *more)


def test_what_is_missing_is_named(narrow, folder):
    (folder / "masks" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="--masks: expected a mask named 1"):
        command(folder, "--masks", folder / "masks")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="--images: expected a folder with pictures"):
        command(folder, "--images", folder / "empty")


def test_another_run_s_folder_is_refused(narrow, folder):
    command(folder, "--steps", "1")
    with pytest.raises(ValueError, match="--out: expected a new folder, or one of a run with rank 4"):
        command(folder, "--steps", "1", "--rank", "4")
    (folder / "images" / "1.txt").write_text("a blue {}")
    with pytest.raises(ValueError, match="--out: expected a new folder, or one of a run with pictures"):
        command(folder, "--steps", "1")
