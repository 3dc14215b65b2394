"""PromptNet's training: what it reads, what it changes, and the file that it leaves."""

import pytest
import torch
from conceptloom.encoders.files import read
from conceptloom.encoders.promptnet import PromptNet, heads_of
from conceptloom.shapeland import world
from conceptloom.training import promptnet
from conceptloom.training.promptnet.pictures import Things, collate, tokens_of
from environment import absent_weights
from PIL import Image

pytestmark = pytest.mark.skipif(bool(absent_weights()), reason="Shapeland's weights are incomplete")

CHANNELS = [32, 32, 32, 32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two things with two pictures each and their captions, and one picture alone."""
    root = tmp_path_factory.mktemp("things")

    def draw(file, description, seed, identity):
        drawn, _ = world.draw_description(description, seed, identity)
        file.parent.mkdir(exist_ok=True)
        Image.fromarray((drawn.image * 255).round().astype("uint8")).save(file)

    for thing, identity in (("star", 1), ("mug", 2)):
        for number, ground in enumerate(("navy", "mint")):
            draw(root / thing / f"{number}.png", f"a {thing} on a {ground} background", number, identity)
            (root / thing / f"{number}.txt").write_text(f"a {{}} on a {ground} background\n", encoding="utf-8")
    draw(root / "alone.png", "a house on a gray background", 3, 4)
    return root


@pytest.fixture(scope="module")
def base():
    from conceptloom.training.base import open_base

    return open_base("shapeland")


@pytest.fixture
def model(base):
    from conceptloom.training.promptnet.model import PromptNetTraining
    from conceptloom.training.promptnet.script import config_of

    return PromptNetTraining(base, config_of(base, CHANNELS, 16))


def batch_of(base, folder, rows=(0, 2)):
    from conceptloom.training.draws import draw

    data = Things(folder, "a {}", base.resolution)
    draws = draw(0, range(len(rows)), base.latent_shape, base.times)
    batch = collate([data[row, 0] for row in rows], base.vocabularies[0])
    return {**batch, "noise": draws.noise, "latent": draws.latent, "t": draws.t}


def run(folder, out, *options):
    promptnet.main(
        ["--base", "shapeland", "--data", str(folder), "--out", str(out), "--caption", "a {}", "--channels"]
        + [*map(str, CHANNELS), "--region-channels", "16", "--batch-size", "2", "--learning-rate", "1e-3"]
        + [*options, "--log-every", "1"]
    )


class TestPictures:
    def test_the_reference_is_another_picture_of_the_same_thing(self, folder):
        data = Things(folder, "a {}", 64)
        names = [file.relative_to(folder).as_posix() for file in data.files]
        assert names == ["alone.png", "mug/0.png", "mug/1.png", "star/0.png", "star/1.png"]
        own = [data[row, 0]["target"] for row in range(5)]
        for row, other in ((0, 0), (1, 2), (2, 1), (3, 4), (4, 3)):
            for epoch in range(3):
                assert torch.equal(data[row, epoch]["reference"], own[other])
        assert [data[row, 0]["caption"] for row in (0, 1)] == ["a {}", "a {} on a navy background"]

    def test_references_vary_with_the_epoch_and_depend_on_nothing_else(self, folder, tmp_path):
        for number in range(6):
            Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
        (tmp_path / "one").mkdir()
        for file in tmp_path.glob("*.png"):
            file.rename(tmp_path / "one" / file.name)
        data, again = (Things(tmp_path, "a {}", 16) for _ in range(2))
        seen = [round(float(data[0, epoch]["reference"][0, 0, 0] + 1) * 127.5) for epoch in range(40)]
        assert set(seen) == {40, 80, 120, 160, 200}
        assert torch.equal(data[2, 7]["reference"], again[2, 7]["reference"])

    def test_the_middle_square_is_seen(self, tmp_path):
        image = Image.new("RGB", (96, 32), "black")
        image.paste("white", (32, 0, 64, 32))
        image.save(tmp_path / "wide.png")
        assert float(Things(tmp_path, "a {}", 32)[0, 0]["target"].min()) == 1.0

    def test_tokens_have_one_place_for_the_thing(self, base):
        vocabulary = base.vocabularies[0]
        tokens, place = tokens_of(vocabulary, "a {} on a navy background")
        assert len(tokens) == 77 and place == 2
        expected = vocabulary.row("a star on a navy background")
        assert [token for i, token in enumerate(tokens) if i != place] == [
            token for i, token in enumerate(expected) if i != place
        ]


class TestModel:
    def test_a_word_s_own_embedding_gives_its_own_states(self, base, model):
        vocabulary, embeddings = base.vocabularies[0], model.tower.text_model.embeddings
        tokens, place = tokens_of(vocabulary, "a {} on a navy background")
        (star,) = vocabulary.split("star")
        own = embeddings.token_embedding.weight[star] + embeddings.position_embedding.weight[place]
        with torch.no_grad():
            made, _ = model.read(torch.tensor([tokens]), torch.tensor([place]), own[None, None])
            expected, _ = base.read(torch.tensor([[vocabulary.row("a star on a navy background")]]))
        torch.testing.assert_close(made, expected)
        assert not embeddings._forward_hooks

    def test_gradients_reach_the_whole_network_and_nothing_else(self, base, model, folder):
        losses = model(batch_of(base, folder))
        sum(losses.values()).backward()
        own = {f"promptnet.{name}" for name, _ in model.promptnet.named_parameters()}
        assert {name for name, p in model.named_parameters() if p.grad is not None} == own
        assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.promptnet.parameters())
        assert list(losses) == ["noise"]

    def test_the_loss_is_the_base_s_own_with_the_word_in_the_caption(self, base, model, folder):
        """Against the same in single steps."""
        batch = batch_of(base, folder)
        with torch.no_grad():
            latents = base.autoencoder.encode(batch["target"], batch["latent"])
            noisy, target = base.noised(latents, batch["noise"], batch["t"])
            reference = base.autoencoder.encode(batch["reference"], batch["latent"])
            pixels = (batch["reference"] + 1) / 2
            mean, std = (torch.tensor(v)[:, None, None] for v in (
                (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
            tokens = base.vision.vision_model((pixels - mean) / std).last_hidden_state
            words = model.promptnet(reference, noisy, batch["t"], tokens)
            states = model.read(batch["tokens"], batch["place"], words)
            expected = (base.unet(noisy, batch["t"], states[0]).sample - target).square().mean()
            assert float(model(batch)["noise"]) == pytest.approx(float(expected), rel=1e-4)

    def test_it_learns(self, base, model, folder):
        batch = batch_of(base, folder)
        optimizer = torch.optim.AdamW(model.promptnet.parameters(), 2e-3)
        found = []
        for _ in range(12):
            loss = model(batch)["noise"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(float(loss.detach()))
        assert min(found[-3:]) < 0.9 * found[0], found

    def test_the_architecture_is_the_unet_s_where_nothing_else_is_asked(self, base):
        from conceptloom.training.promptnet.model import PromptNetTraining
        from conceptloom.training.promptnet.script import config_of

        config = config_of(base)
        assert config.channels == (64, 128, 128, 128) and config.region_side == base.latent_shape[-1]
        net = PromptNetTraining(base, config).promptnet.state_dict()
        theirs = base.unet.state_dict()
        same = [key for key in net if key in theirs]
        assert len(same) > 150 and all(torch.equal(net[key], theirs[key]) for key in same)


class TestScript:
    def test_a_run_is_resumed_exactly_and_leaves_a_file_for_the_node(self, folder, tmp_path, monkeypatch):
        from conceptloom.training.promptnet import script

        monkeypatch.setattr(script, "SHEET_STEPS", 2)
        run(folder, tmp_path / "whole", "--steps", "3", "--average", "0.5", "--sheet-every", "3")
        run(folder, tmp_path / "parts", "--steps", "2", "--average", "0.5", "--sheet-every", "0")
        run(folder, tmp_path / "parts", "--steps", "3", "--average", "0.5", "--sheet-every", "0")
        files = [read(tmp_path / name / "promptnet.safetensors") for name in ("whole", "parts")]
        assert files[0].value.keys() == files[1].value.keys()
        assert all(torch.equal(files[0].value[key], files[1].value[key]) for key in files[0].value)
        net = PromptNet.from_state({k: v.float() for k, v in files[0].value.items()}, heads_of(files[0].metadata))
        assert net.config.channels == tuple(CHANNELS) and net.config.region_side == 16
        with Image.open(tmp_path / "whole" / "samples_0000003.png") as sheet:
            assert sheet.size == (4 * 128, 5 * 128)
        run(folder, tmp_path / "on", "--steps", "0", "--start", str(tmp_path / "whole" / "promptnet.safetensors"))
        again = read(tmp_path / "on" / "promptnet.safetensors").value
        assert all(torch.equal(again[key], files[0].value[key]) for key in again)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--caption", "a photo"], "--caption: expected {} exactly once, where the thing is, got 'a photo'"),
            (["--channels", "32", "32"], "--channels: expected 4 multiples of 32, got 32 32"),
            (["--channels", "32", "32", "32", "40"], "--channels: expected 4 multiples of 32"),
            (["--average", "1"], "--average: expected a share from 0 up to but not 1"),
            (["--learning-rate", "-1"], "--learning-rate: expected at least 0"),
            (["--export", "net.bin"], "--export: expected a name that ends in .safetensors"),
        ],
    )
    def test_options_that_cannot_be_used(self, folder, tmp_path, options, message):
        with pytest.raises(ValueError) as found:
            run(folder, tmp_path, "--steps", "1", *options)
        assert message in str(found.value)

    def test_channels_that_the_heads_of_the_base_do_not_divide(self, base, monkeypatch):
        from conceptloom.training.promptnet.script import config_of

        monkeypatch.setattr(base.unet.config, "attention_head_dim", [5, 10, 20, 20], raising=False)
        with pytest.raises(ValueError, match=r"--channels: expected multiples of the base's numbers of heads \(5 10"):
            config_of(base, [64, 128, 256, 256])

    def test_a_folder_without_pictures(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="--data: expected a folder with pictures"):
            run(tmp_path, tmp_path / "out", "--steps", "1")

    def test_a_start_of_another_architecture(self, folder, tmp_path):
        from safetensors.torch import save_file

        save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
        with pytest.raises(
            ValueError, match="--start: expected a PromptNet of this architecture, got other.safetensors"
        ):
            run(folder, tmp_path / "out", "--steps", "1", "--start", str(tmp_path / "other.safetensors"))


class TestFineTuning:
    def test_every_picture_is_seen_before_one_returns_and_references_are_drawn_apart(self):
        from conceptloom.training.promptnet.finetuning import draw_step

        def draw(seed, pictures=5, size=8):
            return draw_step(pictures, size, (2, 3, 3), 1000, torch.Generator().manual_seed(seed), torch.device("cpu"))

        drawn = [draw(seed) for seed in range(200)]
        for one in drawn:
            for numbers in (one.targets, one.references):
                assert sorted(numbers[:5]) == list(range(5)) and len(set(numbers[5:])) == 3
            assert one.noise.shape == (8, 2, 3, 3) and one.times.min() >= 0 and one.times.max() < 1000
        own = sum(t == r for one in drawn for t, r in zip(one.targets, one.references, strict=True)) / (200 * 8)
        assert 0.15 < own < 0.25, "a reference is the target itself in one of five"
        assert draw(3).targets == drawn[3].targets and torch.equal(draw(3).noise, drawn[3].noise)
        assert draw(0, pictures=1, size=2).references == [0, 0]

    @pytest.mark.parametrize("rank", [0, 2])
    def test_a_step_changes_weights_by_a_share_of_their_size(self, rank):
        """AdamW's first step is its learning rate, whatever the gradient."""
        from conceptloom.encoders.promptnet import PromptNetConfig
        from conceptloom.training.promptnet.finetuning import FineTuning, Tuned, lora_state

        torch.manual_seed(0)
        layers = {"a.to_q": torch.randn(6, 4) * 10, "a.to_k": torch.randn(6, 4) * 0.1}
        recipe = FineTuning(learning_rate=0.01, rank=rank)
        tuned = Tuned(PromptNet(PromptNetConfig((32,) * 2, (2,) * 2, (True, False), region=2)), layers, recipe)
        before = {name: p.detach().clone() for name, p in tuned.promptnet.named_parameters()}
        optimizer = tuned.optimizer(recipe)
        sum((p * torch.randn_like(p)).sum() for p in tuned.parameters()).backward()
        optimizer.step()
        for name, p in tuned.promptnet.named_parameters():
            size = max(0.01, float(before[name].square().mean().sqrt()))
            moved = (p.detach() - before[name] * (1 - 0.01 * 0.01 * size)).abs()
            torch.testing.assert_close(moved, torch.full_like(moved, 0.01 * size), rtol=0.02, atol=1e-7)
        state = lora_state(tuned.differences, "diffusion_model.", torch.float32)
        for name, weight in layers.items():
            size, key = float(weight.square().mean().sqrt()), f"diffusion_model.{name}"
            if rank:
                up, down = state[f"{key}.lora_up.weight"], state[f"{key}.lora_down.weight"]
                assert float(state[f"{key}.alpha"]) == rank
                torch.testing.assert_close(up.abs(), torch.full_like(up, 0.01 * size), rtol=1e-3, atol=0)
                x = torch.randn(3, 4)
                torch.testing.assert_close(tuned.differences.output(name, x), x @ (up @ down).mT)
            else:
                found = state[f"{key}.diff"]
                torch.testing.assert_close(found.abs(), torch.full_like(found, 0.01 * size), rtol=1e-3, atol=0)
        assert len(state) == len(layers) * (3 if rank else 1)
