"""The training of a prior: its loss, its scaling, and the file that it leaves."""

import re

import pytest
import torch
from conceptloom.encoders.caption_prior import HEADS, CaptionPrior
from conceptloom.encoders.files import read
from conceptloom.training import data, prior
from conceptloom.training.prior.script import Captioned, collate
from environment import absent_weights
from PIL import Image

pytestmark = pytest.mark.skipif(bool(absent_weights()), reason="Shapeland's weights are incomplete")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("captioned")
    data.main(["compositions", "--root", str(root), "--count", "12"])
    return root


@pytest.fixture(scope="module")
def model():
    from conceptloom.training.base import open_base
    from conceptloom.training.prior.model import PriorTraining

    return PriorTraining(open_base("shapeland"), 32, 2, 1)


def test_the_loss_is_the_error_of_the_scaled_embedding(folder, model):
    pictures = Captioned(folder, 64, 128)
    batch = collate([pictures[row, 0] for row in range(12)], model.vocabulary)
    embeddings = model.see(batch["target"])
    model.measure(embeddings)
    scaled = model.prior.scaled(embeddings)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(128), rtol=0, atol=1e-4)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(128), rtol=0, atol=1e-4)
    seen = []
    handle = model.prior.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    loss = model(batch)["embedding"]
    handle.remove()
    noisy, t, sentence, states, mask = seen[0]
    level = model.alphas[t][:, None]
    torch.testing.assert_close(noisy, level.sqrt() * scaled + (1 - level).sqrt() * batch["noise"])
    expected = (model.prior(noisy, t, sentence, states, mask) - scaled).square().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for name, p in model.prior.named_parameters() if not name.startswith("clip_"))
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("prior."))
    model.zero_grad()
    # Of a single picture nothing deviates.
    model.measure(embeddings[:1])
    assert torch.isfinite(model.prior.scaled(embeddings[:1])).all()
    model.measure(embeddings)


def test_maps_beside_a_picture_are_no_pictures(folder):
    names = [file.name for file in Captioned(folder, 64, 128).files]
    assert len(names) == 12
    assert not any("." in name.removesuffix(".png") for name in names)


def test_captions_are_left_out_in_a_tenth(folder):
    pictures = Captioned(folder, 64, 128)
    said = [bool(pictures[row, epoch]["caption"]) for row in range(12) for epoch in range(60)]
    assert 0.86 < sum(said) / len(said) < 0.94


def run(folder, out, steps, *more):
    prior.main(
        ["--base", "shapeland", "--data", str(folder), "--out", str(out), "--steps", str(steps), "--batch-size", "4"]
        + ["--inner", "32", "--heads", "2", "--layers", "1", "--log-every", "1", *more]
    )


def test_a_continued_run_is_the_uninterrupted_one_and_its_file_loads(folder, tmp_path):
    run(folder, tmp_path / "one", 2)
    run(folder, tmp_path / "one", 4)
    run(folder, tmp_path / "two", 4)
    found = []
    for name in ("one", "two"):
        value, metadata = read(tmp_path / name / "prior.safetensors")
        found.append(CaptionPrior.from_state(value, int(metadata[HEADS])))
    for (name, a), b in zip(found[0].state_dict().items(), found[1].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert found[0].clip_std.min() > 0 and found[0].config.heads == 2


def test_bad_options_are_told(folder, tmp_path):
    silent = tmp_path / "silent"
    silent.mkdir()
    Image.new("RGB", (64, 64)).save(silent / "a.png")
    for more, said in (
        (("--data", str(tmp_path / "nothing")), "--data: expected a folder with pictures (.png"),
        (("--data", str(silent)), "--data: expected a folder with pictures and their captions"),
        (("--inner", "30"), "--inner: expected a multiple of twice the heads (4), got 30"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(said)):
            run(folder, tmp_path / "run", 1, *more)
