"""FastComposer's training: what it trains, its losses against naive ones, exact resuming, and files that the host reads
as they were trained."""

import csv
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F

for package in ("diffusers", "transformers", "accelerate", "peft", "torchvision"):
    pytest.importorskip(package, reason=f"{package} is not installed (pip install {package})")

from conceptloom.encoders.clip_pixels import normalize  # noqa: E402
from conceptloom.encoders.fastcomposer import FUSER, split  # noqa: E402
from conceptloom.encoders.fuser import Fuser  # noqa: E402
from conceptloom.shapeland import models, world  # noqa: E402
from conceptloom.training import fastcomposer  # noqa: E402
from conceptloom.training.base import Vocabulary, _splitter, open_base  # noqa: E402
from conceptloom.training.data.dataset import EpochBatches, SubjectPictures  # noqa: E402
from conceptloom.training.data.shapeland import one_by_one, shapeland_folder  # noqa: E402
from conceptloom.training.draws import Shares, draw  # noqa: E402
from conceptloom.training.fastcomposer import script, sheet  # noqa: E402
from conceptloom.training.fastcomposer.batches import collate, subject_rows  # noqa: E402
from conceptloom.training.fastcomposer.export import export  # noqa: E402
from conceptloom.training.fastcomposer.model import FULL, LORA, FastComposer  # noqa: E402
from conceptloom.training.loop import CHECKPOINT, LOG  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

# Cross-attention of the middle five of Stable Diffusion 1.5's blocks.
ELEVEN = [
    *(f"down_blocks.{b}.attentions.{a}" for b in (1, 2) for a in (0, 1)),
    "mid_block.attentions.0",
    *(f"up_blocks.{b}.attentions.{a}" for b in (1, 2) for a in (0, 1, 2)),
]


@pytest.fixture(autouse=True)
def plain_process(monkeypatch):
    """Each test is a training process of its own, on the CPU and one thread, that Ctrl-C reaches."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    # A shell makes its background jobs ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """24 scenes of Shapeland in the published format."""
    root = tmp_path_factory.mktemp("data")
    shapeland_folder(root, 24, seed=1)
    return root


def narrow_unet(folder, **config):
    """Random weights of a UNet of Shapeland's kind, with its configuration."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = {"block_out_channels": (32,) * 4, **config}
    unet = UNet2DConditionModel(**{**models.UNET_CONFIG, **config})
    return config, models.save("unet", unet.state_dict(), folder / "unet.safetensors")


@pytest.fixture(scope="module")
def narrow_files(tmp_path_factory):
    """A UNet of Shapeland's blocks, a half to a quarter as wide, and one with half of its layers."""
    return (
        narrow_unet(tmp_path_factory.mktemp("unet")),
        narrow_unet(tmp_path_factory.mktemp("unet"), layers_per_block=1),
    )


def make_shapelands(monkeypatch, config, file):
    for name, value in config.items():
        monkeypatch.setitem(models.UNET_CONFIG, name, value)
    monkeypatch.setitem(models.FILES, "unet", file)


@pytest.fixture
def narrow(monkeypatch, narrow_files):
    """Makes Shapeland's UNet narrow and random."""
    make_shapelands(monkeypatch, *narrow_files[0])


@pytest.fixture
def shallow(monkeypatch, narrow_files):
    """Makes it narrow and random with half of its layers, where their number is not what counts."""
    make_shapelands(monkeypatch, *narrow_files[1])


def batch_of(base, root, count=3, **options):
    """A batch of pictures that all show their subjects, and its draws."""
    options = {"uncondition": 0, "object_appear": 1, "augment": False, **options}
    data = SubjectPictures(root, resolution=64, object_resolution=base.vision.config.image_size, **options)
    items = collate([data[row] for row in range(count)], base.vocabularies)
    return {**items, **draw(0, range(count), base.latent_shape, base.times)._asdict()}


def shake(composer, size=0.05):
    """Moves what is trained away from where it begins, to values that half precision holds."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in composer.trainables.values():
            p.add_(torch.randn(p.shape, generator=generator) * size).copy_(p.half().float())


def options_of(root, out, *more):
    return [
        "--base", "shapeland", "--data", str(root), "--out", str(out), "--train", "lora", "--rank", "2",
        "--batch-size", "2", "--log-every", "1", "--sheet-every", "0", *more,
    ]  # fmt: skip


# ---- what is trained ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "layers"), [(FULL, 2), (LORA, 0), (LORA, 1)])
def test_gradients_reach_what_is_trained_and_nothing_else(narrow, data_folder, train, layers):
    composer = FastComposer(open_base("shapeland"), train, rank=2, vision_layers=layers)
    shake(composer)
    batch = batch_of(composer.base, data_folder)
    sum(composer(batch).values()).backward()
    reached = {name for name, p in composer.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    with_gradient = {name for name, p in composer.named_parameters() if p.grad is not None}
    names = [name for name, _ in composer.named_parameters()]
    wanted = {name for name in names if name.startswith("fuser.")}
    assert len(wanted) == 14
    last = tuple(f"vision.vision_model.encoder.layers.{i}." for i in range(4 - layers, 4))
    wanted |= {name for name in names if name.startswith(last)}
    assert len(wanted) == 14 + 16 * layers
    if train == FULL:
        wanted |= {name for name in names if name.startswith("unet.")}
    else:
        factors = {name for name in names if ".lora_" in name}
        # 16 blocks, self- and cross-attention, four projections, two factors.
        assert len(factors) == 16 * 2 * 4 * 2
        wanted |= factors
    assert with_gradient == set(composer.trainables) == wanted
    # Softmax does not see what all keys share, so that a key's bias has no gradient but rounding's.
    assert {name for name in wanted - reached if not name.endswith("k_proj.bias")} == set()


def test_gradient_checkpointing_changes_no_gradient(shallow, data_folder):
    found = []
    for checkpointing in (False, True):
        composer = FastComposer(open_base("shapeland"), LORA, rank=2, vision_layers=0, localization=0.5)
        shake(composer)
        if checkpointing:
            composer.unet.enable_gradient_checkpointing()
        composer.train()
        sum(composer(batch_of(composer.base, data_folder, 2)).values()).backward()
        found.append({name: p.grad for name, p in composer.trainables.items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train", [FULL, LORA])
def test_half_precision_comes_near_the_full(shallow, data_folder, dtype, train):
    composer = FastComposer(open_base("shapeland"), train, rank=2, localization=0.1).train()
    batch = batch_of(composer.base, data_folder, 2)
    full = composer(batch)
    composer.keep_frozen_in(dtype)
    assert {p.dtype for p in composer.trainables.values()} == {torch.float32}
    assert {p.dtype for p in composer.towers.parameters()} == {dtype}
    with torch.autocast("cpu", dtype):
        half = composer(batch)
    sum(half.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in composer.trainables.values())
    for name, loss in full.items():
        assert half[name].dtype == torch.float32
        assert half[name].item() == pytest.approx(loss.item(), rel=0.02, abs=1e-3), name


# ---- attention maps and losses ------------------------------------------------------------------------------------


def test_eleven_maps_of_the_middle_five_blocks(narrow, data_folder):
    torch.manual_seed(0)
    base = open_base("shapeland")
    noisy, t, states = torch.randn(2, 8, 16, 16), torch.tensor([5, 700]), (torch.randn(2, 77, 128), None)
    before = {name: type(p).__name__ for name, p in base.unet.attn_processors.items()}
    fused = FastComposer(base, localization=0)
    with torch.no_grad():
        plain = fused.base.predict(noisy, t, states)
    assert fused.attention is None
    assert {name: type(p).__name__ for name, p in base.unet.attn_processors.items()} == before
    assert set(before.values()) == {"AttnProcessor2_0"}

    composer = FastComposer(base, localization=1e-3)
    assert composer.attention.names == [f"{name}.transformer_blocks.0.attn2" for name in ELEVEN]
    changed = {name for name, p in base.unet.attn_processors.items() if type(p).__name__ != "AttnProcessor2_0"}
    assert changed == {f"{name}.processor" for name in composer.attention.names}
    with torch.no_grad(), composer.attention.collecting() as maps:
        opened = composer.base.predict(noisy, t, states)
    torch.testing.assert_close(opened, plain, atol=1e-5, rtol=1e-5)
    sides = [8, 8, 4, 4, 2, 4, 4, 4, 8, 8, 8]
    assert [tuple(m.shape) for m in maps] == [(2, side**2, 77) for side in sides]
    assert all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps)
    with torch.no_grad():
        composer.base.predict(noisy, t, states)
    assert len(maps) == 11, "a pass that nobody collects from adds nothing"


def test_losses_are_those_of_loops_in_double_precision(narrow, data_folder):
    composer = FastComposer(open_base("shapeland"), localization=0.25, mask_probability=0.5)
    batch = batch_of(composer.base, data_folder, 4)
    batch["coin"] = torch.tensor([0.1, 0.9, 0.49, 0.51])
    batch["present"][3] = False
    losses = composer(batch)

    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = np.cumprod(1 - betas)[batch["t"].numpy()][:, None, None, None]
    with torch.no_grad():
        clean = composer.autoencoder.model.encode(batch["picture"]).double().numpy()
        noise = batch["noise"].double().numpy()
        noisy = torch.from_numpy(np.sqrt(alpha) * clean + np.sqrt(1 - alpha) * noise).float()
        states = composer.states(batch["tokens"], batch["objects"], batch["rows"], batch["present"])
        with composer.attention.collecting() as maps:
            prediction = composer.base.predict(noisy, batch["t"], states).double().numpy()
    error = (prediction - (np.sqrt(alpha) * noise - np.sqrt(1 - alpha) * clean)) ** 2
    masks = batch["masks"].double()
    for i, coin in enumerate(batch["coin"]):
        if coin < 0.5:
            union = masks[i].sum(0).clamp(max=1)[None, None]
            error[i] *= F.interpolate(union, (16, 16), mode="bilinear")[0].numpy() ** 2
    assert losses["noise"].item() == pytest.approx(error.mean(), rel=1e-4)

    layers = []
    for probabilities in maps:
        n, pixels, _ = probabilities.shape
        side = int(pixels**0.5)
        scaled = F.interpolate(masks, (side, side), mode="bilinear", antialias=True).flatten(2).numpy()
        total = 0.0
        for i in range(n):
            subjects = batch["present"][i].nonzero().flatten().tolist()
            for j in subjects:
                a = probabilities[i, :, batch["rows"][i, j]].double().numpy()
                m = scaled[i, j]
                gap = (a * (1 - m)).sum() / ((1 - m).sum() + 1e-5) - (a * m).sum() / (m.sum() + 1e-5)
                total += gap / (len(subjects) + 1e-5) / n
        layers.append(total)
    assert losses["localization"].item() == pytest.approx(0.25 * np.mean(layers), rel=1e-4, abs=1e-7)
    assert abs(np.mean(layers)) > 1e-6
    composer = FastComposer(composer.base, localization=0)
    assert set(composer(batch)) == {"noise"}


def test_subjects_change_their_own_rows_alone(narrow, data_folder):
    composer = FastComposer(open_base("shapeland"), LORA, vision_layers=0)
    batch = batch_of(composer.base, data_folder, 4)
    batch["present"][1] = False
    with torch.no_grad():
        text = composer.towers[0](batch["tokens"][:, 0]).last_hidden_state
        states, pooled = composer.states(batch["tokens"], batch["objects"], batch["rows"], batch["present"])
        nobody, _ = composer.states(batch["tokens"], batch["objects"], batch["rows"], batch["present"] & False)
        seen = normalize(batch["objects"])
        for i in range(4):
            expected = text[i].clone()
            for j in batch["present"][i].nonzero().flatten():
                row = batch["rows"][i, j]
                expected[row] = composer.fuser(text[i, row], composer.vision(seen[i, j][None]).image_embeds[0])
            torch.testing.assert_close(states[i], expected, atol=1e-5, rtol=1e-5)
    changed = (states != text).any(-1).nonzero().tolist()
    assert changed == sorted([i, int(r)] for i in range(4) for r in batch["rows"][i][batch["present"][i]])
    assert pooled is None and torch.equal(nobody, text)


def test_a_tiny_batch_is_learnt(shallow, data_folder):
    composer = FastComposer(open_base("shapeland"), vision_layers=2, localization=0.05, mask_probability=0)
    batch = batch_of(composer.base, data_folder, 2)
    optimizer = torch.optim.AdamW(composer.trainables.values(), lr=2e-3)
    found = []
    for _ in range(20):
        losses = composer(batch)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: loss.item() for name, loss in losses.items()})
    assert found[-1]["noise"] < 0.5 * found[0]["noise"]
    assert found[-1]["localization"] < found[0]["localization"] - 0.05 * 0.02


# ---- captions and batches -----------------------------------------------------------------------------------------


def test_places_of_subjects_are_those_of_the_host(host):
    """Tokens and rows of random captions of Shapeland."""
    from conceptloom.host.shapeland import load_clip
    from conceptloom.host.words import locate
    from conceptloom.training.base import _world_words
    from conceptloom.training.shapeland.common import START, word_tokens

    clip, ids = load_clip(), word_tokens()
    vocabulary = Vocabulary(_world_words, START, 0, 0)
    for i in range(60):
        caption, phrases, _ = one_by_one(world.random_scene(np.random.default_rng((5, i))))
        ends = sorted(phrase.end for phrase in phrases)
        tokens, places = locate(clip, caption, ends)
        assert ids[vocabulary.row(caption)].tolist() == [token for token, _ in tokens["l"][0]]
        assert subject_rows(vocabulary, caption, ends) == [place.row for place in places]


@pytest.fixture(scope="module")
def clip_words(host_path):
    """CLIP's vocabulary, as a folder with Stable Diffusion has it."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(host_path / "comfy" / "sd1_tokenizer", local_files_only=True)
    return Vocabulary(_splitter(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize(
    "marked",
    [
        "a man| and a man| are reading book together",
        "A Skateboarder|, and the woman|'s hat| (old)",
        "two  men|: a boy|\tand a café-owner|!",
    ],
)
def test_places_in_any_words_are_those_of_the_host(host, clip_words, marked):
    from conceptloom.host.shapeland import load_clip
    from conceptloom.host.words import locate

    pieces = marked.split("|")
    caption = "".join(pieces)
    ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces) - 1)]
    # The host reads parentheses as emphasis unless they are escaped; none stands before a place here.
    _, places = locate(load_clip(), caption, ends)
    assert subject_rows(clip_words, caption, ends) == [place.row for place in places]
    if marked.startswith("a man|"):
        assert [place.row for place in places] == [2, 5]


def test_places_without_a_token_of_their_own_have_no_row(clip_words):
    text = "a man and a skateboarder"
    # The beginning, a whole word, behind it again, inside a word, the end.
    assert subject_rows(clip_words, text, [0, 5, 6, 15, len(text)]) == [0, 2, 0, 0, 6]
    for count, row in ((73, 75), (74, 0)):
        long = "word " * count + "a man walking"
        assert subject_rows(clip_words, long, [len(long) - len(" walking")]) == [row]
        tokens = clip_words.row(long)
        assert len(tokens) == 77 and tokens[-1] == clip_words.end


def test_a_subject_without_row_stays_text(narrow, data_folder):
    base = open_base("shapeland")
    data = SubjectPictures(data_folder, resolution=64, object_resolution=64, uncondition=0, object_appear=1)
    item = next(data[i] for i in range(len(data)) if data[i]["present"].sum() >= 2)
    item["ends"][0] = 0
    batch = collate([item], base.vocabularies)
    assert batch["present"][0].tolist() == [False, *item["present"].tolist()[1:]]
    assert (batch["rows"][0] > 0).tolist() == batch["present"][0].tolist()


def test_processes_share_what_one_process_accumulates():
    steps = EpochBatches(count=7, batch=12, steps=5, start=2, seed=3)
    whole = list(steps)
    alone = list(Shares(steps, batch=3, accumulate=4, processes=1, process=0))
    assert [sum(alone[i * 4 : i * 4 + 4], []) for i in range(3)] == whole
    pair = [Shares(steps, batch=3, accumulate=2, processes=2, process=p) for p in (0, 1)]
    assert [key for keys in zip(*map(list, pair), strict=True) for key in keys] == alone
    assert [share.offset(1) for share in pair] == [6, 9] and len(pair[0]) == 6


def test_draws_depend_on_a_pictures_number_alone():
    together = draw(7, range(10, 14), (2, 3, 3), 1000)
    apart = [draw(7, [i], (2, 3, 3), 1000) for i in range(10, 14)]
    for name, values in together._asdict().items():
        assert torch.equal(values, torch.cat([getattr(a, name) for a in apart])), name
    assert not torch.equal(together.noise[0], together.noise[1])
    assert not torch.equal(together.noise, together.latent)
    assert not torch.equal(together.noise, draw(8, range(10, 14), (2, 3, 3), 1000).noise)
    t = torch.cat([draw(0, [i], (1, 1, 1), 4).t for i in range(80)])
    assert set(t.tolist()) == {0, 1, 2, 3}


# ---- runs ---------------------------------------------------------------------------------------------------------


def tensors_in(value, at=""):
    """All tensors and numbers in nested dicts and lists, by their path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in tensors_in(inner, f"{at}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, inner in enumerate(value) for k, v in tensors_in(inner, f"{at}/{i}").items()}
    return {at: value}


def test_an_interrupted_run_continues_bit_by_bit(shallow, data_folder, tmp_path, monkeypatch, capsys):
    """Ctrl-C in step 3 of 5, and a termination signal to what reads pictures, with accumulated batches, averaged
    weights, a warm-up and rows logged but not saved."""
    more = ("--steps", "5", "--accumulate", "2", "--warmup", "4", "--learning-rate", "1e-3", "--vision-layers", "1")
    fastcomposer.main(options_of(data_folder, tmp_path / "whole", *more))
    pressed = []

    def press(path):
        if not pressed:
            pressed.append(path)
            readers = multiprocessing.active_children()
            assert len(readers) == reading
            for process in readers:
                os.kill(process.pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    reading = int("fork" in multiprocessing.get_all_start_methods())
    monkeypatch.setattr(script, "open_sheet", lambda *_: press)
    before = signal.getsignal(signal.SIGINT)
    parts = options_of(data_folder, tmp_path / "parts", *more, "--workers", str(reading))
    parts[parts.index("--sheet-every") + 1] = "3"
    fastcomposer.main(parts)
    assert pressed == [tmp_path / "parts" / "samples_0000003.png"]
    assert "stopped after step 3 of 5" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "parts" / "fastcomposer.safetensors").exists()
    with (tmp_path / "parts" / LOG).open("a") as file:
        file.write("4,lost,in,the,power,cut,0\n")
    fastcomposer.main(parts)

    whole, resumed = (
        tensors_in(torch.load(tmp_path / name / CHECKPOINT, weights_only=True)) for name in ("whole", "parts")
    )
    assert whole.keys() == resumed.keys() and whole["/step"] == 5
    for key, value in whole.items():
        assert torch.equal(value, resumed[key]) if torch.is_tensor(value) else value == resumed[key], key
    a, b = (load_file(tmp_path / name / "fastcomposer.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()
    rows = [list(csv.DictReader((tmp_path / name / LOG).open())) for name in ("whole", "parts")]
    for one, other in zip(*rows, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    assert [row["step"] for row in rows[0]] == list("12345")
    assert [float(row["learning_rate"]) for row in rows[0]] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    for row in rows[0]:
        parts = float(row["noise"]) + float(row["localization"])
        assert float(row["loss"]) == pytest.approx(parts, abs=2e-5)


def test_accumulated_batches_are_one_large_batch(shallow, data_folder, tmp_path):
    for name, sizes in (("large", ("4", "1")), ("small", ("1", "4"))):
        options = options_of(data_folder, tmp_path / name, "--steps", "2", "--accumulate", sizes[1], "--average", "0")
        options[options.index("--batch-size") + 1] = sizes[0]
        fastcomposer.main(options)
    large, small = (torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("large", "small"))
    for name, value in large["model"].items():
        torch.testing.assert_close(value, small["model"][name], atol=2e-5, rtol=1e-3, msg=name)
    assert large["averaged"] is None


def test_a_run_in_bf16_with_workers_and_checkpointing(narrow, data_folder, tmp_path):
    fastcomposer.main(
        options_of(
            data_folder,
            tmp_path,
            "--steps",
            "2",
            "--precision",
            "bf16",
            "--workers",
            "2",
            "--checkpointing",
            "--export",
            str(tmp_path / "small.safetensors"),
        )  # fmt: skip
    )
    state = load_file(tmp_path / "small.safetensors")
    assert {v.dtype for v in state.values()} == {torch.float16}
    assert sum(key.endswith(".lora_up.weight") for key in state) == 16 * 2 * 4
    assert sum(key.startswith("postfuse_module.") for key in state) == 14
    assert {key.split(".")[-2] for key in state if key.startswith("lora_unet_") and "alpha" not in key} == {
        "lora_up", "lora_down",
    }  # fmt: skip


def test_a_sheet_shows_subjects_and_samples(shallow, data_folder, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(sheet, "STEPS", 4)
    composer = FastComposer(open_base("shapeland"), LORA, vision_layers=0)
    # One picture is held out.
    sheet.open_sheet(data_folder, composer)(tmp_path / "deep" / "a.png")
    drawn = np.array(Image.open(tmp_path / "deep" / "a.png"))
    assert drawn.shape == (128, 5 * 128, 3)
    first, second, itself, text, composed = drawn.reshape(64, 2, 5, 64, 2, 3)[:, 0, :, :, 0].transpose(1, 3, 0, 2)
    (item,) = SubjectPictures(data_folder, "test", 64, 64, uncondition=0, object_appear=1, augment=False)
    for shown, known in (
        (first, item["objects"][0]),
        (second, item["objects"][1]),
        (itself, item["picture"] / 2 + 0.5),
    ):
        assert np.abs(shown / 255 - known.numpy()).max() < 0.01
    # Text alone and with the subjects: the same noise, another end.
    assert (text != composed).any()


# ---- files for the host -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [LORA, FULL])
def test_the_host_predicts_what_was_trained(host, data_folder, tmp_path, monkeypatch, train):
    """Subjects, text and UNet through the exported file: one prediction in diffusers and in the host."""
    import comfy.model_management
    from conceptloom.host.fastcomposer import conditioning as in_host
    from conceptloom.host.fastcomposer import files as in_files
    from conceptloom.host.shapeland import load_clip, load_clip_vision, load_model
    from conceptloom.subjects.subject import Subject

    torch.manual_seed(0)
    untrained = models.build_unet().state_dict()
    monkeypatch.setitem(models.FILES, "unet", models.save("unet", untrained, tmp_path / "unet.safetensors"))
    composer = FastComposer(open_base("shapeland"), train, rank=4, vision_layers=2).eval()
    shake(composer, 0.02)
    export(composer.trainables, tmp_path / "trained.safetensors", torch.float32)

    data = SubjectPictures(data_folder, resolution=64, object_resolution=64, uncondition=0, object_appear=1)
    item = next(data[i] for i in range(len(data)) if data[i]["present"].sum() >= 2)
    batch = collate([item], composer.base.vocabularies)
    noisy, t = torch.randn(1, 8, 16, 16), torch.tensor([400])
    with torch.no_grad():
        states = composer.states(batch["tokens"], batch["objects"], batch["rows"], batch["present"])
        expected = composer.base.predict(noisy, t, states)

    base = load_model(models.load("unet"))
    file = tmp_path / "trained.safetensors"
    if train == FULL:
        # The host tells a UNet by its shape, and knows none of Shapeland's: that part goes in by our own loader.
        state = load_file(file)
        base = load_model({k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")})
        file = tmp_path / "rest.safetensors"
        save_file({key: value for key, value in state.items() if not key.startswith("unet.")}, file)
    with torch.inference_mode():
        parts = in_files.load(str(file), base, load_clip(), load_clip_vision())
        count = int(item["present"].sum())
        subjects = [Subject(o.movedim(0, -1), f"subject {i}") for i, o in enumerate(item["objects"][:count])]
        subjects = in_host.encode_subjects(parts.clip_vision, subjects)
        prompt = item["caption"]
        for end in reversed(item["ends"][:count].tolist()):
            prompt = f"{prompt[:end]} @subject{prompt[end:]}"
        _, fused, _ = in_host.fuse(parts.clip, parts.fuser, prompt, subjects)
        torch.testing.assert_close(fused[0][0], states[0], atol=1e-4, rtol=1e-4)
        comfy.model_management.load_models_gpu([parts.model])
        got = parts.model.model.diffusion_model(noisy, t.float(), context=fused[0][0])
        plain = load_model(models.load("unet")).model.diffusion_model(noisy, t.float(), context=fused[0][0])
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert (plain - expected).abs().max() > 0.01


# ---- folders with Stable Diffusion --------------------------------------------------------------------------------


def test_a_folder_with_stable_diffusion_is_trained(diffusers_folder, data_folder, tmp_path, monkeypatch):
    root, twofold = diffusers_folder
    monkeypatch.setattr(sheet, "STEPS", 2)
    monkeypatch.setattr(sheet, "PICTURES", 2)
    fastcomposer.main(
        ["--base", str(root), "--vision", str(root / "vision"), "--data", str(data_folder), "--out", str(tmp_path),
         "--steps", "2", "--batch-size", "2", "--learning-rate", "1e-3", "--resolution", "32", "--log-every", "1",
         "--sheet-every", "2", "--export-precision", "fp32", "--object-types", *world.NOUNS]
    )  # fmt: skip
    assert (tmp_path / "samples_0000002.png").exists()
    rows = list(csv.DictReader((tmp_path / LOG).open()))
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("noise", "localization", "gradient_norm"))
    state = load_file(tmp_path / "fastcomposer.safetensors")
    assert state["postfuse_module.mlp1.fc1.weight"].shape == ((80, 104) if twofold else (32, 56))
    trained = {key.split(".")[4] for key in state if key.startswith("image_encoder.")}
    assert trained == {"1", "2"}
    stored = load_file(root / "unet" / "diffusion_pytorch_model.safetensors")
    assert {key for key in state if key.startswith("unet.")} == {f"unet.{key}" for key in stored}
    assert any(not torch.equal(state[f"unet.{key}"], value) for key, value in stored.items())


@pytest.mark.parametrize(("part", "option"), [("vae", "--base"), ("vision", "--vision")])
def test_a_broken_part_of_a_base_is_named(part, option, diffusers_folder, tmp_path):
    root = shutil.copytree(diffusers_folder[0], tmp_path / "base")
    (weights,) = (root / part).glob("*.safetensors")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(
        ValueError, match=f"{option}: expected a file of weights, got {weights.name}, .* git-lfs pointer"
    ):
        open_base(str(root), root / "vision", 32)


def test_two_towers_give_their_penultimate_states_side_by_side(diffusers_folder, data_folder):
    root, twofold = diffusers_folder
    base = open_base(str(root), root / "vision", 32)
    composer = FastComposer(base)
    sizes = {"down_blocks.1": 1, "down_blocks.2": 2, "mid_block": 2, "up_blocks.0": 4, "up_blocks.1": 2}
    if not twofold:
        sizes = {"down_blocks.1": 2, "down_blocks.2": 2, "mid_block": 1, "up_blocks.1": 3, "up_blocks.2": 3}
    blocks = [name.split(".attentions")[0] for name in composer.attention.names]
    assert {block: blocks.count(block) for block in blocks} == sizes
    batch = batch_of(base, data_folder, 2, object_types=("none",))
    with torch.no_grad():
        states, pooled = composer.states(batch["tokens"], batch["objects"], batch["rows"], batch["present"])
    # The first layer's own output norm is none of it, which the last state would have.
    hidden = [tower(batch["tokens"][:, i], output_hidden_states=True) for i, tower in enumerate(base.towers)]
    if twofold:
        assert base.vocabularies[1].row("")[-1] == 0 and base.vocabularies[0].row("")[-1] == 53
        assert torch.equal(states, torch.cat([h.hidden_states[-2] for h in hidden], -1))
        assert torch.equal(pooled, hidden[1].text_embeds)
    else:
        assert torch.equal(states, hidden[0].last_hidden_state) and pooled is None


def test_a_run_starts_from_the_fuser_of_a_file(shallow, data_folder, tmp_path):
    taught = Fuser(128, 128)
    save_file({FUSER + name: tensor for name, tensor in taught.state_dict().items()}, tmp_path / "taught.safetensors")
    more = ("--steps", "0", "--export-precision", "fp32", "--fuser", str(tmp_path / "taught.safetensors"))
    fastcomposer.main(options_of(data_folder, tmp_path / "run", *more))
    exported = split(load_file(tmp_path / "run" / "fastcomposer.safetensors"))[FUSER]
    assert all(torch.equal(exported[name], tensor) for name, tensor in taught.state_dict().items())
    narrower = Fuser(128, 64).state_dict()
    save_file({FUSER + name: tensor for name, tensor in narrower.items()}, tmp_path / "taught.safetensors")
    with pytest.raises(
        ValueError, match="--fuser: expected .* of widths 128 and 128, got taught.safetensors with 128 and 64"
    ):
        fastcomposer.main(options_of(data_folder, tmp_path / "run", *more))


def test_fuser_and_tower_have_a_rate_of_their_own(shallow, data_folder, tmp_path):
    def exported(*more):
        options = options_of(data_folder, tmp_path / "-".join(("run", *more)), *more, "--vision-layers", "1")
        fastcomposer.main([*options, "--learning-rate", "1e-3", "--average", "0", "--export-precision", "fp32"])
        return load_file(tmp_path / "-".join(("run", *more)) / "fastcomposer.safetensors")

    start = exported("--steps", "0")
    for rate, moves in (("0", False), ("1e-3", True)):
        after = exported("--steps", "1", "--fuser-learning-rate", rate)
        for name, tensor in start.items():
            if name.endswith((".alpha", "lora_down.weight")):
                continue
            assert torch.equal(after[name], tensor) != (moves or "lora_up" in name), name
    same = exported("--steps", "1")
    assert all(torch.equal(same[name], tensor) for name, tensor in after.items())


# ---- bad inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"--base": "nowhere"}, ValueError, "--vision: expected the folder of CLIP's vision tower"),
        ({"--base": "nowhere", "--vision": "v"}, FileNotFoundError, "folder with unet/config.json, got nowh"),
        ({"--vision": "v"}, ValueError, "--vision: expected none for Shapeland"),
        ({"--data": "nowhere"}, FileNotFoundError, "data: expected a folder with .*, got nowhere"),
        ({"--object-types": "zebra"}, ValueError, "pictures with a subject of class zebra, got none among the 2. in"),
        ({"--uncondition": "1.5"}, ValueError, "uncondition: expected a share from 0 to 1, got 1.5"),
        ({"--resolution": "60"}, ValueError, "--resolution: expected a multiple of 32 for this base, got 60"),
        ({"--rank": "0"}, ValueError, "--rank: expected at least 1, got 0"),
        ({"--vision-layers": "5"}, ValueError, "--vision-layers: expected 0 to 4 for this tower, got 5"),
        ({"--batch-size": "0"}, ValueError, "--batch-size: expected at least 1, got 0"),
        ({"--accumulate": "0"}, ValueError, "--accumulate: expected at least 1, got 0"),
        ({"--average": "1"}, ValueError, "--average: expected a share from 0 up to but not 1, got 1"),
        ({"--learning-rate": "-1"}, ValueError, "--learning-rate: expected at least 0, got -1.0"),
        ({"--fuser-learning-rate": "nan"}, ValueError, "--fuser-learning-rate: expected at least 0, got nan"),
        ({"--localization": "-1"}, ValueError, "--localization: expected at least 0"),
        ({"--mask-loss-probability": "2"}, ValueError, "--mask-loss-probability: expected a share from 0 to 1"),
        ({"--export": "a.bin"}, ValueError, "ends in .safetensors, got a.bin"),
        (
            {"--fuser": "none.safetensors"},
            ValueError,
            "--fuser: expected a file of weights, got none.safetensors, which cannot be read",
        ),
        ({"--precision": "fp16"}, ValueError, "--precision: expected no or bf16 on a cpu, got fp16"),
    ],
)
def test_bad_options_get_their_sentence(shallow, data_folder, tmp_path, change, error, sentence):
    options = options_of(data_folder, tmp_path / "out", "--steps", "1")
    for name, value in change.items():
        options += [name, value]
    with pytest.raises(error, match=sentence):
        fastcomposer.main(options)


def test_bad_data_get_their_sentence(shallow, data_folder, tmp_path):
    (tmp_path / "image_ids_train.txt").write_text("00000000\n")
    (tmp_path / "00000").mkdir()
    for suffix in (".jpg", ".npy"):
        (tmp_path / "00000" / f"00000000{suffix}").write_bytes(
            (data_folder / "00000" / f"00000000{suffix}").read_bytes()
        )
    file = tmp_path / "00000" / "00000000.json"
    for text, sentence in (
        ('{"caption": "a ball"}', "expected a file of the form"),
        ('{"caption": "a ball", "segments": []}', "pictures with a subject, got none among the 1 in"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            fastcomposer.main(options_of(tmp_path, tmp_path / "out", "--steps", "1"))
    base = open_base("shapeland")
    with pytest.raises(ValueError, match="captions: expected Shapeland's words, got 'zebra' in 'a zebra'"):
        base.vocabularies[0].row("a zebra")


def test_a_folder_of_another_run_is_refused(shallow, data_folder, tmp_path):
    fastcomposer.main(options_of(data_folder, tmp_path, "--steps", "1"))
    for name, value, sentence in (
        ("--rank", "3", "one of a run with rank 3, got .* with 2"),
        ("--batch-size", "3", "pictures a step 3, got .* with 2"),
        ("--seed", "4", "seed 4"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fastcomposer.main(options_of(data_folder, tmp_path, "--steps", "2", name, value))
