"""Concepts on the host: whatever a file holds becomes the difference to the model's weights, and draws as those do."""

import copy
import dataclasses
import logging
import math

import pytest
import torch
from conceptloom.encoders.concepts import Concept, Delta

pytestmark = pytest.mark.usefixtures("host")

RANK, WIDTH = 4, 64
FP16_ROUNDING = 2**-10
LOWEST = "middle_block.1.transformer_blocks.0.attn2"


class Truth:
    """A model's own keys and values, low-rank differences to them, and all ways in which files write these."""

    def __init__(self, model):
        import comfy.utils

        generator = torch.Generator().manual_seed(5)
        own = model.model.diffusion_model.state_dict()
        self.base = {n: own[n].clone() for n in own if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
        width = next(iter(self.base.values())).shape[1]
        self.factors = {
            name: (
                torch.randn(w.shape[0], RANK, generator=generator) * 0.02 * (WIDTH / width) ** 0.5,
                torch.randn(RANK, w.shape[1], generator=generator),
            )
            for name, w in self.base.items()
        }
        self.delta = {name: up @ down for name, (up, down) in self.factors.items()}
        self.whole = {name: w + self.delta[name] for name, w in self.base.items()}
        names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        self.diffusers = {compvis: name for name, compvis in names.items()}
        self.token = torch.randn(width, generator=generator)

    def named(self, values, pattern="{}.weight"):
        return {pattern.format(self.diffusers[name].removesuffix(".weight")): value for name, value in values.items()}

    def lora(self, pattern, up, down, scale=1.0):
        """Factors by diffusers' names within a pattern of the layer's name."""
        state = {}
        for name, (u, d) in self.factors.items():
            layer = pattern(self.diffusers[name].removesuffix(".weight"))
            state |= {f"{layer}{up}": u * scale, f"{layer}{down}": d}
        return state

    def kohya(self):
        state = self.lora(lambda n: f"lora_unet_{n.replace('.', '_')}", ".lora_up.weight", ".lora_down.weight", 2.0)
        alphas = {
            name.replace("lora_up.weight", "alpha"): torch.tensor(RANK / 2) for name in state if "lora_up" in name
        }
        return {**state, **alphas}

    def loha(self):
        state = self.lora(lambda n: f"lora_unet_{n.replace('.', '_')}", ".hada_w1_a", ".hada_w1_b")
        for name in [name for name in state if name.endswith("w1_a")]:
            state[name.replace("w1_a", "w2_a")] = torch.ones(len(state[name]), 1)
            state[name.replace("w1_a", "w2_b")] = torch.ones(1, len(self.token))
        return state

    def dora(self):
        """Where the file's norms of the rows are those of the changed weight, DoRA is plain LoRA."""
        state = self.lora(lambda n: f"lora_unet_{n.replace('.', '_')}", ".lora_up.weight", ".lora_down.weight")
        scales = self.named({n: w.norm(dim=1, keepdim=True) for n, w in self.whole.items()})
        return state | {
            f"lora_unet_{n.removesuffix('.weight').replace('.', '_')}.dora_scale": v for n, v in scales.items()
        }

    def files(self):
        unet, token = self.named(self.whole), self.token
        compvis = {f"model.diffusion_model.{name}": w for name, w in self.whole.items()}
        pairs = {
            f"model.diffusion_model.{name}": dict(zip("uv", pair, strict=True)) for name, pair in self.factors.items()
        }
        processor = lambda n: n.replace(".to_", ".processor.to_")  # noqa: E731
        custom = self.named(self.whole, "{}_custom_diffusion.weight")
        hollow = {name.replace("attn2", "attn1").rpartition(".to_")[0] + ".processor": {} for name in unet}
        return {
            "F1": {"state_dict": {**compvis, "embed": token[None]}},
            "F2": {"state_dict": {**pairs, "embed": token}},
            "F3": {"unet": unet, "modifier_token": {"<new1>": token}},
            "F3 alone": {"unet": unet},
            "F4": {"unet": unet, "modifier_token": {"<new1>": [token, torch.ones(8)]}},
            "F5": {"unet": unet, "modifier_token": {"<new1>": token}, "modifier_token_2": {"<new1>": torch.ones(8)}},
            "F6": {"unet": self.lora(processor, "_lora.up.weight", "_lora.down.weight")},
            "F7": {processor(name): w for name, w in custom.items()} | hollow,
            "F8 kohya": self.kohya(),
            "F8 PEFT": self.lora(lambda n: f"unet.{n}", ".lora_B.weight", ".lora_A.weight"),
            "F8 LoHa": self.loha(),
            "F8 DoRA": self.dora(),
            "F8 diff": {f"diffusion_model.{n.removesuffix('.weight')}.diff": d for n, d in self.delta.items()},
            "F8 set": {f"diffusion_model.{n.removesuffix('.weight')}.set_weight": w for n, w in self.whole.items()},
        }

    def check(self, concept, tolerance=FP16_ROUNDING, names=None):
        names = list(self.base) if names is None else names
        found = {
            f"{layer_name(key)}.to_{part}.weight": delta.matrix()
            for key, parts in concept.deltas.items()
            for part, delta in parts.items()
        }
        assert set(found) == set(names)
        for name in names:
            error = (found[name] - self.delta[name]).norm() / self.delta[name].norm()
            assert error < tolerance, (name, float(error))


FORMATS = (
    *("F1", "F2", "F3", "F3 alone", "F4", "F5", "F6", "F7"),
    *("F8 kohya", "F8 PEFT", "F8 LoHa", "F8 DoRA", "F8 diff", "F8 set"),
)


@pytest.fixture
def truth(toy):
    return Truth(toy.model)


OTHER_NAMES = {
    "PEFT alone": ("base_model.model.{}", ".lora_B.weight", ".lora_A.weight"),
    "PEFT, a named adapter": ("base_model.model.{}", ".lora_B.default.weight", ".lora_A.default.weight"),
    "PEFT, bare": ("{}", ".lora_B.weight", ".lora_A.weight"),
    "diffusers": ("unet.{}", ".lora.up.weight", ".lora.down.weight"),
    "LyCORIS alone": ("lycoris_{_}", ".lora_up.weight", ".lora_down.weight"),
    "OneTrainer": ("lora_unet.{}", ".lora_up.weight", ".lora_down.weight"),
}


def load(toy, source, **options):
    from conceptloom.host.weaver.concepts import load_concept

    return load_concept(options.pop("model", toy.model), source, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_true_difference(name, toy, truth):
    concept = load(toy, truth.files()[name])
    truth.check(concept)
    assert bool(concept.tokens) == (name in ("F1", "F2", "F3", "F4", "F5"))
    if concept.tokens:
        assert torch.equal(concept.tokens["l"], truth.token[None]) and concept.placeholder == "<new1>"
    factored = {len(delta.factors) for parts in concept.deltas.values() for delta in parts.values()}
    assert factored == ({2} if name in ("F2", "F6", "F8 kohya", "F8 PEFT") else {1})
    assert all(f.dtype == torch.half for parts in concept.deltas.values() for d in parts.values() for f in d.factors)
    assert not concept.others and not concept.text_patches


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_every_writer_s_names_are_read(name, toy, truth):
    pattern, up, down = OTHER_NAMES[name]
    state = truth.lora(lambda n: pattern.replace("{_}", n.replace(".", "_")).format(n), up, down)
    truth.check(load(toy, state))


def diffusers_unet():
    """diffusers' own UNet of the toy's shape; a LoRA on it has the toy's names and shapes."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.inference_mode(False):
        return diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 128, 128), cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=32
        )


def shaken(model, part="lora_"):
    """A model whose adapters are not zero any more."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
    return model


def deltas_of(unet, names):
    """What PEFT's own layers add to the weights `names`, by the host's names."""
    found = {}
    for name, diffusers_name in names.items():
        layer = unet.get_submodule(diffusers_name.removesuffix(".weight"))
        found[name] = layer.get_delta_weight("default").detach()
    return found


@pytest.mark.parametrize("writer", ["diffusers", "PEFT"])
def test_files_that_the_libraries_write_are_read(writer, toy, truth, tmp_path, caplog):
    """Alpha is twice the rank: diffusers says so in the metadata, PEFT in the file beside, without which that is said
    and the scale is 1."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["attn2.to_k", "attn2.to_v"])
    unet = diffusers_unet()
    with torch.inference_mode(False):
        if writer == "diffusers":
            from diffusers.loaders import StableDiffusionLoraLoaderMixin
            from diffusers.training_utils import _collate_lora_metadata
            from diffusers.utils import convert_state_dict_to_diffusers

            unet.add_adapter(config)
            shaken(unet)
            StableDiffusionLoraLoaderMixin.save_lora_weights(
                tmp_path,
                unet_lora_layers=convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(unet)),
                **_collate_lora_metadata({"unet": unet}),
            )
            path = tmp_path / "pytorch_lora_weights.safetensors"
        else:
            wrapped = shaken(peft.get_peft_model(unet, config))
            wrapped.save_pretrained(tmp_path)
            unet, path = wrapped.base_model.model, tmp_path / "adapter_model.safetensors"
        truth.delta = deltas_of(unet, {name: truth.diffusers[name] for name in truth.base})
    concept = load(toy, path)
    truth.check(concept)
    assert not concept.others
    assert "adapter_config.json" not in caplog.text
    if writer == "PEFT":
        truth.delta = {name: delta / 2 for name, delta in truth.delta.items()}
        truth.check(load(toy, path.rename(tmp_path / "mine.safetensors")))
        assert "put that file beside it and name the LoRA adapter_model.safetensors" in caplog.text


@pytest.mark.parametrize("algorithm", ["lora", "lokr"])
def test_files_of_lycoris_are_read(algorithm, toy, truth, tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed")
    unet = diffusers_unet()
    lycoris.LycorisNetwork.apply_preset({"name_algo_map": {}, "target_module": ["Attention"], "target_name": []})
    with torch.inference_mode(False):
        net = lycoris.create_lycoris(unet, 1.0, linear_dim=RANK, linear_alpha=RANK / 2, algo=algorithm, factor=4)
        net.apply_to()
        shaken(net, "lo")
        net.save_weights(str(tmp_path / "net.safetensors"), torch.float32, {})
    state = {name: tensor.double() for name, tensor in load_state(tmp_path / "net.safetensors").items()}
    for name in truth.base:
        layer = f"lycoris_{truth.diffusers[name].removesuffix('.weight').replace('.', '_')}"
        part = lambda end, layer=layer: state[f"{layer}.{end}"]  # noqa: E731
        if algorithm == "lora":
            product = part("lora_up.weight") @ part("lora_down.weight")
        else:
            product = torch.kron(part("lokr_w1"), part("lokr_w2_a") @ part("lokr_w2_b"))
        truth.delta[name] = (0.5 * product).float()
    concept = load(toy, tmp_path / "net.safetensors")
    truth.check(without(concept, "q", "out"))


def load_state(path):
    from conceptloom.encoders.files import read_state

    return read_state(path)


def without(concept, *parts):
    """A concept without parts of its layers."""
    deltas = {key: {p: d for p, d in found.items() if p not in parts} for key, found in concept.deltas.items()}
    return dataclasses.replace(concept, deltas=deltas)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ENDS = tuple(f".{part}.weight" for part in (*ATTENTION, "ff.net.0.proj"))


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_numbered_files_of_cloneofsimo_are_read(ending, toy, truth, tmp_path):
    """In the order of diffusers' modules of the time: down, up, middle; attn1, the gate, attn2."""
    from safetensors.torch import save_file

    order = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}
    blocks = sorted(
        {name.partition(".attn2.")[0] for name in map(truth.diffusers.get, truth.base)},
        key=lambda name: (order[name.partition(".")[0]], name),
    )
    layers = [f"attn1.{part}" for part in ATTENTION]
    layers += ["ff.net.0.proj", *(f"attn2.{part}" for part in ATTENTION)]
    state = toy.base.diffusion_model.state_dict()
    own = {name: state[key].flatten(1).shape for key, name in truth.diffusers.items() if f".{name}".endswith(ENDS)}
    factors = {truth.diffusers[name]: pair for name, pair in truth.factors.items()}
    tensors = []
    for block in blocks:
        for layer in layers:
            name = f"{block}.{layer}.weight"
            tensors += factors.get(name, (torch.ones(own[name][0], 1), torch.full((1, own[name][1]), 1e-3)))
    path = tmp_path / f"lora.{ending}"
    if ending == "pt":
        torch.save(tensors, path)
    else:
        state = {f"unet:{n // 2}:{('up', 'down')[n % 2]}": tensor for n, tensor in enumerate(tensors)}
        save_file({**state, "<s1>": truth.token}, path, {"unet": '["Attention"]', "<s1>": "<embed>"})
    concept = load(toy, path)
    truth.check(without(concept, "q", "out"))
    assert set(concept.deltas["middle.0.0"]) == {"k", "v", "q", "out"} and len(concept.others) == 5 * len(blocks)
    assert concept.placeholder == ("<s1>" if ending == "safetensors" else "")


def test_scales_of_quantized_layers_are_no_weights_of_their_own(toy, monkeypatch):
    """ComfyUI lists them among a model's weights, but they are within these."""
    from conceptloom.host.weaver.weights import DIFFUSION_MODEL, Weights, key_patches

    listed = toy.base.state_dict
    scale = "diffusion_model.input_blocks.1.1.proj_in.weight_scale"
    monkeypatch.setattr(toy.base, "state_dict", lambda: {**listed(), scale: torch.ones(1)})
    with pytest.raises(AttributeError):
        toy.model.get_key_patches()
    found = key_patches(toy.model, DIFFUSION_MODEL)
    assert scale not in found and found.keys() == {name for name in listed() if name.startswith(DIFFUSION_MODEL)}
    assert Weights.of(toy.model).text_width == 64


def text_names():
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    return {
        "kohya": f"lora_te_{layer.replace('.', '_')}.lora_{{}}.weight",
        "kohya, SDXL": f"lora_te1_{layer.replace('.', '_')}.lora_{{}}.weight",
        "diffusers, old": f"text_encoder.{layer}.lora_linear_layer.{{}}.weight",
        "PEFT": f"text_encoder.{layer}.lora_{{}}.weight",
        "PEFT alone": f"base_model.model.{layer}.lora_{{}}.weight",
    }


@pytest.mark.parametrize("writer", text_names())
def test_text_encoders_of_every_writer_are_read(writer, toy, truth, clip):
    from conceptloom.host.weaver.concepts import with_text

    up, down = torch.randn(128, 2) * 0.1, torch.randn(2, 128)
    ends = ("B", "A") if "PEFT" in writer else ("up", "down")
    state = dict(zip(map(text_names()[writer].format, ends), (up, down), strict=True))
    changed = with_text(load(toy, {**truth.kohya(), **state}), clip)
    ((key, ((strength, patch, *_),)),) = changed.patcher.patches.items()
    assert key == "clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight" and strength == 1
    assert torch.equal(patch.weights[0], up) and torch.equal(patch.weights[1], down)


@pytest.fixture(scope="module")
def sd15(host):
    """A MODEL of Stable Diffusion 1.5's true architecture, with random weights where concepts change them."""
    import gc

    from conceptloom.evaluation import rigs

    def fill(module):
        for name, parameter in module.named_parameters():
            if "attn2.to_k" in name or "attn2.to_v" in name:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)

    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(rigs, "fill", fill)
        yield rigs.Rig.build(rigs.PLANS["sd15", "cpu"]).model
    gc.collect()


@pytest.fixture(scope="module")
def sd15_truth(sd15):
    return Truth(sd15)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_stable_diffusion_s_names_and_shapes(name, sd15, sd15_truth):
    from conceptloom.host.weaver.concepts import load_concept

    assert len(sd15_truth.base) == 32 and sum(w.numel() for w in sd15_truth.base.values()) == 19_169_280
    concept = load_concept(sd15, sd15_truth.files()[name])
    sd15_truth.check(concept)
    assert concept.text_width == 768


@pytest.mark.parametrize("name", ["F3", "F3 alone", "F6", "F8 kohya"])
def test_files_are_read_through_the_host(name, toy, truth, tmp_path):
    path = tmp_path / "dog.bin"
    torch.save(truth.files()[name], path)
    concept = load(toy, path)
    truth.check(concept)
    assert concept.name == "dog"


def test_patches_on_the_model_do_not_count(toy, truth):
    key = f"diffusion_model.{next(iter(truth.base))}"
    patched = toy.model.clone()
    patched.add_patches({key: (torch.ones(toy.model.model.state_dict()[key].shape),)})
    truth.check(load(toy, truth.files()["F3"], model=patched))


def test_saved_concepts_and_loras_are_read_again(toy, truth, tmp_path):
    import comfy.lora
    import comfy.utils
    from conceptloom.host.weaver.concepts import AS_LORA, save

    concept = load(toy, truth.files()["F3"], class_word="dog", strength=0.5)
    report = save(concept, tmp_path, "dog")
    assert report.startswith("concepts/dog.safetensors")
    again = load(toy, tmp_path / "concepts" / "dog.safetensors", placeholder="<dog>", strength=0.25)
    truth.check(again)
    assert (again.class_word, again.placeholder, again.strength) == ("dog", "<dog>", 0.25)
    small = save(concept, tmp_path, "dog", AS_LORA, RANK)
    assert [line.partition(":")[0] for line in small.splitlines()] == [
        "loras/dog.safetensors",
        "embeddings/dog.safetensors",
    ]
    truth.check(load(toy, tmp_path / "loras" / "dog.safetensors"), 2 * FP16_ROUNDING)
    save(concept, tmp_path, "full", AS_LORA)
    for name in ("dog", "full"):
        state = comfy.utils.load_torch_file(str(tmp_path / "loras" / f"{name}.safetensors"))
        patches = comfy.lora.load_lora(state, comfy.lora.model_lora_keys_unet(toy.model.model, {}))
        for layer, base in truth.base.items():
            key = f"diffusion_model.{layer}"
            changed = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], base.clone(), key)
            assert (changed - truth.whole[layer]).norm() / truth.delta[layer].norm() < 2 * FP16_ROUNDING
    before = (tmp_path / "embeddings" / "dog.safetensors").read_bytes()
    (tmp_path / "loras" / "dog.safetensors").unlink()
    assert "loras/dog 2.safetensors" in save(concept, tmp_path, "dog", AS_LORA, RANK)
    assert "embeddings/dog 3.safetensors" in save(concept, tmp_path, "dog", AS_LORA, RANK)
    assert (tmp_path / "embeddings" / "dog.safetensors").read_bytes() == before
    assert not (tmp_path / "loras" / "dog.safetensors").exists()
    for name, sentence in BAD_NAMES.items():
        with pytest.raises(ValueError) as caught:
            save(concept, tmp_path, name)
        assert str(caught.value).startswith(f"filename: expected {sentence}")
    assert save(concept, tmp_path, " bird ").startswith("concepts/bird.safetensors")
    assert sorted(file.name for file in (tmp_path / "concepts").iterdir()) == ["bird.safetensors", "dog.safetensors"]


BAD_NAMES = {
    "": "a name, got an empty text",
    "  ": "a name, got an empty text",
    "..": "a name, got an empty text",
    "a/b": "a name without folders or any of",
    "what?": "a name without folders or any of",
    "tab\tbed": "a name without folders or any of",
    "x" * 300: "at most 200 bytes, got 300",
    "犬" * 100: "at most 200 bytes, got 300",
}


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_computed(toy, truth, tmp_path, monkeypatch):
    from conceptloom.encoders.concepts import Concept
    from conceptloom.host.weaver.concepts import save

    concept = load(toy, truth.files()["F3"])
    (tmp_path / "concepts").write_text("a file in the place of the folder")
    monkeypatch.setattr(Concept, "compressed", lambda *_: pytest.fail("it was compressed first"))
    with pytest.raises(ValueError, match=r"^folder: expected one that can be written, got .*concepts \(File exists\)"):
        save(concept, tmp_path, "dog", rank=2)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_same_after_saving(name, toy, truth, tmp_path):
    """Oracle A1, by the nodes' own loader."""
    from conceptloom.host.weaver.concepts import save

    concept = load(toy, truth.files()[name])
    save(concept, tmp_path, "dog")
    again = load(toy, tmp_path / "concepts" / "dog.safetensors")
    assert again.deltas.keys() == concept.deltas.keys() and again.tokens.keys() == concept.tokens.keys()
    for key, parts in concept.deltas.items():
        for part, delta in parts.items():
            assert all(map(torch.equal, again.deltas[key][part].factors, delta.factors))
    assert all(torch.equal(again.tokens[encoder], token) for encoder, token in concept.tokens.items())
    assert (again.source_format, again.base) == (concept.source_format, concept.base)


def test_products_of_kronecker_are_read(toy, truth):
    """LoKr: of w1 (2, 4) and w2, itself of two factors, every number of the first times all of the second."""
    generator, state, wanted = torch.Generator().manual_seed(8), {}, {}
    for name, base in truth.base.items():
        rows, columns = base.shape
        parts = [torch.randn(s, generator=generator) for s in ((2, 4), (rows // 2, 3), (3, columns // 4))]
        layer = f"lora_unet_{truth.diffusers[name].removesuffix('.weight').replace('.', '_')}"
        kinds = ("lokr_w1", "lokr_w2_a", "lokr_w2_b")
        state |= {f"{layer}.{kind}": part * 0.1 for kind, part in zip(kinds, parts, strict=True)}
        state[f"{layer}.alpha"] = torch.tensor(1.5)
        wanted[name] = torch.kron(parts[0] * 0.1, parts[1] @ parts[2] * 0.01) * 1.5 / 3
    truth.delta = wanted
    truth.check(load(toy, state))


def test_keys_and_values_are_those_of_a_unet_with_the_weights_swapped(toy, truth):
    from conceptloom.host.model.families import family_of
    from conceptloom.host.model.sites import CROSS
    from conceptloom.host.weaver.concepts import keys_and_values

    # In half precision the differences are exact, so only the order of sums is left to differ.
    whole = {name: w + truth.delta[name].half().float() for name, w in truth.base.items()}
    concept = load(toy, {"unet": truth.named(whole)})
    swapped = copy.deepcopy(toy.base.diffusion_model)
    swapped.load_state_dict({**swapped.state_dict(), **whole})
    context = torch.randn(2, 9, WIDTH)
    sites = [site for site in family_of(swapped).sites(swapped) if site.kind == CROSS]
    assert len(sites) == 16
    for site in sites:
        layer = swapped.get_submodule(layer_name(site.key))
        before = toy.base.diffusion_model.get_submodule(layer_name(site.key))
        for part, found in zip("kv", keys_and_values(concept, toy.base, site, context), strict=True):
            torch.testing.assert_close(found, layer.get_submodule(f"to_{part}")(context), atol=1e-5, rtol=1e-5)
            assert not torch.allclose(found, before.get_submodule(f"to_{part}")(context), atol=1e-2)


def test_strength_scales_the_difference_and_0_is_the_base(toy, truth):
    from conceptloom.host.model.families import family_of
    from conceptloom.host.model.sites import CROSS
    from conceptloom.host.weaver.concepts import keys_and_values

    context = torch.randn(1, 5, WIDTH)
    site = next(s for s in family_of(toy.base.diffusion_model).sites(toy.base.diffusion_model) if s.kind == CROSS)
    base = toy.base.diffusion_model.get_submodule(layer_name(site.key))
    for strength in (0.0, 0.5, 1.0):
        concept = load(toy, truth.files()["F8 kohya"], strength=strength)
        key, value = keys_and_values(concept, toy.base, site, context)
        torch.testing.assert_close(
            key,
            base.to_k(context) + strength * context @ truth.delta[f"{layer_name(site.key)}.to_k.weight"].T,
            atol=5e-3,
            rtol=1e-3,
        )
        assert torch.equal(value, base.to_v(context)) == (strength == 0)


def test_queries_outputs_and_biases_of_all_cross_attention(toy, truth):
    own = toy.base.diffusion_model.state_dict()
    changed = {name: own[f"{LOWEST}.{name}"] + 0.25 for name in ("to_q.weight", "to_out.0.weight", "to_out.0.bias")}
    unet = truth.named(truth.whole) | {truth.diffusers[f"{LOWEST}.{name}"]: w for name, w in changed.items()}
    parts = load(toy, {"unet": unet}).deltas["middle.0.0"]
    assert set(parts) == {"k", "v", "q", "out"}
    for delta in (parts["q"].matrix(), parts["out"].matrix(), parts["out"].bias.float()):
        torch.testing.assert_close(delta, torch.full_like(delta, 0.25), atol=1e-4, rtol=0)
    lora = {f"diffusion_model.{LOWEST}.to_out.0.diff_b": torch.full_like(own[f"{LOWEST}.to_out.0.bias"], 0.5)}
    alone = load(toy, {**truth.files()["F8 kohya"], **lora}).deltas["middle.0.0"]["out"]
    assert not alone.matrix().any() and torch.equal(alone.bias, torch.full_like(alone.bias, 0.5))


def test_what_is_outside_cross_attention_is_kept_apart_and_counted(toy, truth, caplog):
    from conceptloom.host.weaver.concepts import describe

    caplog.set_level(logging.WARNING)
    own = toy.base.diffusion_model.state_dict()
    name = "middle_block.1.transformer_blocks.0.attn1.to_k.weight"
    same = "input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight"
    more = {truth.diffusers[name]: own[name] + 0.5, truth.diffusers[same]: own[same]}
    concept = load(toy, {"unet": {**truth.named(truth.whole), **more}})
    truth.check(concept)
    ((key, (kind, (difference,))),) = concept.others.items()
    assert (key, kind) == (f"diffusion_model.{name}", "diff") and (difference == 0.5).float().mean() > 0.9
    assert "elsewhere in the model: 1 patches" in describe(concept)
    layer = f"lora_unet_{truth.diffusers[name].removesuffix('.weight').replace('.', '_')}"
    channels = len(own[name])
    more = {f"{layer}.lora_up.weight": torch.ones(channels, 1), f"{layer}.lora_down.weight": torch.ones(1, channels)}
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    more |= {f"{text}.lora_up.weight": torch.ones(128, 1), f"{text}.lora_down.weight": torch.ones(1, 128)}
    more |= {"lora_unet_no_such_layer.alpha": torch.tensor(1.0)}
    concept = load(toy, {**truth.kohya(), **more})
    truth.check(concept)
    assert list(concept.others) == [f"diffusion_model.{name}"] and len(concept.text_patches["lora"]) == 1
    assert "1 tensors are for no layer of this model, such as lora_unet_no_such_layer.alpha" in caplog.text
    assert "text encoder: 2 tensors" in describe(concept) and "elsewhere in the model: 1 patches" in describe(concept)


def test_a_lora_may_leave_layers_out(toy, truth):
    names = [name for name in truth.base if name.startswith("output_blocks.3")]
    known = {truth.diffusers[name].removesuffix(".weight").replace(".", "_") for name in names}
    state = {
        key: value for key, value in truth.kohya().items() if key.removeprefix("lora_unet_").split(".")[0] in known
    }
    truth.check(load(toy, state), names=names)


# ---- tokens and text ----------------------------------------------------------------------------------------------


def test_tokens_come_from_the_file_or_beside_it_under_any_name(toy, truth, tmp_path):
    torch.save({"<dog>": truth.token}, tmp_path / "dog.bin")
    files = truth.files()
    beside = load(toy, files["F3 alone"], tokens=tmp_path / "dog.bin")
    assert beside.placeholder == "<dog>" and torch.equal(beside.tokens["l"], truth.token[None])
    assert load(toy, files["F3"], placeholder=" <cat> ").placeholder == "<cat>"
    two = {**files["F3"], "modifier_token": {"<a>": truth.token, "<b>": -truth.token}}
    assert torch.equal(load(toy, two, placeholder="<b>").tokens["l"], -truth.token[None])
    with pytest.raises(ValueError, match="placeholder: expected one of the file's tokens <a>, <b>, got ''"):
        load(toy, two)
    with pytest.raises(ValueError, match="token_file: expected none, for the file itself holds the token <new1>"):
        load(toy, files["F3"], tokens={"<dog>": truth.token})
    with pytest.raises(ValueError, match="placeholder: expected none for a concept without a token"):
        load(toy, files["F3 alone"], placeholder="<dog>")


@pytest.fixture(scope="module")
def clip(host):
    """Shapeland's text tower: encoder l of width 128."""
    from conceptloom.host.shapeland import load_clip

    return load_clip()


def test_tokens_of_another_width_are_refused(toy, truth, clip):
    from conceptloom.host.weaver.concepts import check_tokens

    def given(token):
        return load(toy, {**truth.files()["F3"], "modifier_token": {"<new1>": token}})

    check_tokens(given(torch.zeros(2, 128)), clip)
    check_tokens(load(toy, truth.files()["F3 alone"]), clip)
    with pytest.raises(ValueError, match=r"width of concept's token \(l 64\), got l 128"):
        check_tokens(given(truth.token), clip)
    with pytest.raises(ValueError, match=r"\(l 128, g 1280\), got l 128"):
        check_tokens(given([torch.zeros(128), torch.zeros(1280)]), clip)


def states(clip):
    return clip.encode_from_tokens(clip.tokenize("a dog"))


def test_text_encoders_change_for_the_concept_s_own_prompt_alone(toy, truth, clip):
    from conceptloom.host.weaver.concepts import with_text

    before = states(clip)
    own = clip.cond_stage_model.clip_l.transformer.state_dict()
    name = "text_model.encoder.layers.0.mlp.fc2.weight"
    table = "text_model.embeddings.token_embedding.weight"
    slope = torch.linspace(-0.1, 0.1, 128)[:, None]
    encoder = {**own, name: own[name].float() + slope, table: torch.cat((own[table], torch.ones(1, 128)))}
    encoder["text_model.embeddings.position_ids"] = torch.arange(77)
    concept = load(toy, {**truth.files()["F3"], "text_encoder": encoder}, strength=0.5)
    changed = with_text(concept, clip)
    patches = changed.patcher.patches[f"clip_l.transformer.{name}"]
    assert patches[0][0] == 0.5 and torch.allclose(patches[0][1][1][0], slope.expand(128, 512), atol=1e-3)
    after = states(changed)
    assert list(changed.patcher.patches) == [f"clip_l.transformer.{name}"]
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(states(clip), before)
    text = "lora_te_text_model_encoder_layers_0_mlp_fc2"
    lora = {f"{text}.lora_up.weight": slope, f"{text}.lora_down.weight": torch.ones(1, 512)}
    spoken = with_text(load(toy, {**truth.kohya(), **lora}, strength=0.5), clip)
    torch.testing.assert_close(states(spoken), after, atol=1e-4, rtol=1e-4)
    assert with_text(load(toy, truth.kohya()), clip) is clip
    with pytest.raises(ValueError, match="clip: expected the one that concept was trained on, got one without"):
        with_text(load(toy, {**truth.files()["F3"], "text_encoder": {**encoder, "text_model.x": torch.ones(1)}}), clip)


# ---- refusals -----------------------------------------------------------------------------------------------------


def changed(truth, change, name=f"{LOWEST}.to_k.weight"):
    whole = dict(truth.whole)
    whole[name] = change(whole[name])
    return {"unet": truth.named(whole)}


def wide(truth, width):
    return {name: torch.zeros(len(w), width) for name, w in truth.base.items()}


NO_SUCH = "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"
SDXL_LAYER = "down_blocks.2.attentions.0.transformer_blocks.9.attn2.to_k.weight"
REFUSED = {
    "one for SD 2.x (text width 1024)": lambda t: {"unet": t.named(wide(t, 1024))},
    "for a model of text width 64, got one for SDXL (text width 2048)": lambda t: {
        "unet": {SDXL_LAYER: torch.zeros(8, 2048)}
    },
    "got one with down_blocks.2.attentions.0.transformer_blocks.9": lambda t: {
        "unet": {**t.named(t.whole), SDXL_LAYER: torch.zeros(8, WIDTH)}
    },
    "without 1 of them, such as middle_block.1": lambda t: {
        "unet": {n: w for n, w in t.named(t.whole).items() if not n.startswith("mid_block") or "to_v" in n}
    },
    "expected the shape (128, 64) for diffusion_model.middle": lambda t: changed(t, lambda w: w[:-1]),
    "expected finite numbers, got NaN or infinity in 'mid_block": lambda t: changed(t, lambda w: w * math.nan),
    "the base is another, or they are differences": lambda t: {"unet": t.named(t.delta)},
    "1.4 times that away": lambda t: {
        "unet": t.named({n: w.flip(0) for n, w in t.whole.items()}),
    },
    "expected a concept for a model of text width 64, got one for SDXL": lambda t: {
        n: torch.zeros(RANK, 2048) if n.endswith("down.weight") else v for n, v in t.kohya().items()
    },
    "expected LoHa for a weight of shape (32, 64), got lora_unet_down_blocks_0": lambda t: {
        n: v[:, :-1] if n.endswith("_b") else v for n, v in t.loha().items()
    },
    "got one of 1 tensors that do not, such as 'lora_unet_x.lora_up.weight'": lambda t: {
        "lora_unet_x.lora_up.weight": torch.zeros(4, 4)
    },
    "expected a whole LoRA, got 'lora_unet_": lambda t: {
        n: v for n, v in t.kohya().items() if not n.endswith("down.weight")
    },
    "it was never trained": lambda t: {n: v * (not n.endswith("up.weight")) for n, v in t.kohya().items()},
    "changes no weight of cross-attention: it was never trained": lambda t: {
        n: v * (not n.endswith("down.weight")) for n, v in t.kohya().items()
    },
    "got the model's own": lambda t: {"unet": t.named(t.base)},
    "expected finite numbers, got NaN or infinity in 'lora_te_x.lora_up.weight'": lambda t: {
        **t.kohya(),
        "lora_te_x.lora_up.weight": torch.full((2, 2), math.nan),
    },
    "got one that changes no weight of cross-attention: it was never trained": lambda t: {
        n: v * 0 for n, v in t.kohya().items()
    },
    "which is of no known kind": lambda t: {**t.kohya(), f"unet.{NO_SUCH}.lora_Z.weight": torch.ones(1)},
    "to_k.lora_A.bias', which is of no known kind": lambda t: {**t.kohya(), f"{NO_SUCH}.lora_A.bias": torch.ones(1)},
    "x.position', which is of no known kind": lambda t: {**t.kohya(), "text_encoder.x.position": torch.ones(1)},
    "to_k.bias', which is of no known kind": lambda t: {**t.kohya(), f"unet.{NO_SUCH}.bias": torch.ones(1)},
    "got one with diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k.bias": lambda t: {
        **t.kohya(),
        f"unet.{NO_SUCH}.diff_b": torch.ones(1),
    },
    "finite in half precision": lambda t: {n: v * 1e12 for n, v in t.kohya().items()},
}


@pytest.mark.parametrize("sentence", list(REFUSED))
def test_files_for_other_models_get_their_sentence(sentence, toy, truth):
    with pytest.raises(ValueError) as caught:
        load(toy, REFUSED[sentence](truth))
    assert sentence in str(caught.value), caught.value
    assert str(caught.value).startswith("file: ")


def test_saved_concepts_are_for_their_model(toy, truth, toy_type, tmp_path, caplog):
    from conceptloom.encoders import concept_files
    from conceptloom.host.weaver.concepts import AS_LORA, save

    concept = load(toy, truth.files()["F3"])
    concept_files.save(concept, tmp_path / "dog.safetensors")
    wider = toy_type({"context_dim": 96})
    with pytest.raises(ValueError, match="text width 96"):
        load(wider, tmp_path / "dog.safetensors")
    assert "another base model" not in caplog.text
    foreign = Concept("foreign", {"layers.0": concept.deltas["middle.0.0"]})
    concept_files.save(foreign, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="file: expected a concept for .*, got one with keys of a layer layers.0"):
        load(toy, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="concept: expected layers of a known family of models, got layers.0"):
        save(foreign, tmp_path, "foreign", AS_LORA)
    near = toy_type()
    with torch.no_grad():
        near.base.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn2.to_k.weight.mul_(1.01)
    load(near, tmp_path / "dog.safetensors")
    assert "another base model" in caplog.text


class Gadget:
    """Something that a pickle would have to run code for."""


def test_pickles_of_objects_are_never_opened(toy, truth, tmp_path):
    torch.save({**truth.files()["F3"], "x": Gadget()}, tmp_path / "dog.bin")
    with pytest.raises(
        ValueError, match=r"file: expected a file of weights, got dog.bin, which seems to be a pickle of Python objects"
    ):
        load(toy, tmp_path / "dog.bin")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
LFS = "got dog.{}, which seems to be a git-lfs pointer: fetch the file itself (git lfs pull)"


@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
def test_broken_files_get_one_sentence_in_every_loader(ending, toy, truth, tmp_path):
    from conceptloom.host.fastcomposer import files as fastcomposer_files
    from conceptloom.host.segmenting import boxes as box_segmenting
    from conceptloom.shapeland import models

    path = tmp_path / f"dog.{ending}"
    path.write_bytes(POINTER)
    loaders = {
        "file": [
            lambda: load(toy, path),
            lambda: fastcomposer_files.load(str(path)),
            lambda: fastcomposer_files.convert(str(path), tmp_path, "x", fastcomposer_files.WITHOUT),
        ],
        "token_file": [lambda: load(toy, truth.files()["F3 alone"], tokens=path)],
        "sam": [lambda: box_segmenting.load_cutter(path)],
        "weights": [lambda: models.load("unet", path)],
    }
    for name, loads in loaders.items():
        for broken in loads:
            with pytest.raises(ValueError) as caught:
                broken()
            assert str(caught.value) == f"{name}: expected a file of weights, {LFS.format(ending)}"
    (tmp_path / "config.json").write_text("{}")
    for name, broken in (
        ("detector", lambda: box_segmenting.GroundingDino(path, 0.3)),
        ("sam", lambda: box_segmenting.load_cutter(path)),
    ):
        with pytest.raises(ValueError) as caught:
            broken()
        assert str(caught.value) == f"{name}: expected a file of weights, {LFS.format(ending)}"


def test_endings_do_not_matter(toy, truth, tmp_path):
    from conceptloom.host.model.files import load_state
    from safetensors.torch import save_file

    save_file(truth.kohya(), tmp_path / "dog.bin")
    torch.save({"state_dict": truth.kohya()}, tmp_path / "dog.safetensors")
    for name in ("dog.bin", "dog.safetensors"):
        truth.check(load(toy, tmp_path / name))
        assert load_state(tmp_path / name).keys() == truth.kohya().keys()
    torch.save({"a": 1}, tmp_path / "dog.bin")
    with pytest.raises(ValueError, match="file: expected tensors by name, got dog.bin, where 'a' is a int"):
        load_state(tmp_path / "dog.bin")
    torch.save([1], tmp_path / "dog.bin")
    with pytest.raises(ValueError, match="file: expected tensors by name, got dog.bin with a list"):
        load_state(tmp_path / "dog.bin")


def test_embeddings_of_automatic1111_are_tokens(toy, truth, tmp_path):
    path = tmp_path / "dog.pt"
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": truth.token[None]}, "name": "dog"}, path)
    concept = load(toy, truth.files()["F3 alone"], tokens=path)
    assert concept.placeholder == "<new1>" and torch.equal(concept.tokens["l"], truth.token[None])
    torch.save([{"<dog>": truth.token}, {"x": truth.token}], path)
    assert load(toy, truth.files()["F3 alone"], tokens=path).tokens["l"].shape == (2, WIDTH)
    torch.save(truth.kohya(), path)
    with pytest.raises(ValueError, match="^token_file: expected an embedding or a file with a concept's word, got one"):
        load(toy, truth.files()["F3 alone"], tokens=path)


def test_banks_hold_concepts_of_one_kind_with_words_of_their_own(host):
    from conceptloom.host.model.families.unet import UNetFamily
    from conceptloom.host.weaver.concepts import join

    def small(name, width=4, **changes):
        return Concept(name, {"middle.0.0": {"k": Delta((torch.ones(2, width),))}}, **changes)

    token = {"tokens": {"l": torch.zeros(1, 4)}}
    dog, cat, lora = small("dog", placeholder="<a>", **token), small("cat", placeholder="<b>", **token), small("lora")
    assert join([dog, cat, lora, lora]) == [dog, cat, lora, lora]
    with pytest.raises(ValueError, match="got <a> for both dog and tiger"):
        join([dog, cat, small("tiger", placeholder="<a>", **token)])
    with pytest.raises(ValueError, match="got lora for a model of text width 4 and big for SDXL"):
        join([lora, small("big", width=2048)])
    assert UNetFamily().architecture(768) == "SD 1.x (text width 768)"


# ---- models -------------------------------------------------------------------------------------------------------


def layer_name(key):
    """The cross-attention of a site."""
    from conceptloom.host.model.families.unet import UNetFamily

    return UNetFamily().layer(key, "k").removesuffix(".to_k")


def walk(config):
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from conceptloom.host.model.families import family_of
    from conceptloom.host.model.sites import CROSS

    unet = UNetModel(
        **config, num_heads=8, num_head_channels=-1, device="meta", operations=comfy.ops.disable_weight_init
    )
    keys = [site.key for site in family_of(unet).sites(unet) if site.kind == CROSS]
    return [tuple(unet.get_submodule(layer_name(key)).to_k.weight.shape) for key in keys], keys


def test_layers_of_sd15_and_sdxl_have_their_published_widths():
    """Spec, table A2."""
    from conceptloom.evaluation.rigs import SD15_UNET, sdxl_unet

    shapes, keys = walk(SD15_UNET)
    assert (len(shapes), sum(c for c, _ in shapes), {w for _, w in shapes}) == (16, 12_480, {768})
    assert [key for key in keys if key.startswith("middle")] == ["middle.0.0"]
    assert sum(2 * c * w for c, w in shapes) == 19_169_280
    shapes, keys = walk(sdxl_unet(10))
    assert (len(shapes), sum(c for c, _ in shapes), {w for _, w in shapes}) == (70, 83_200, {2048})
    assert sum(2 * c * w for c, w in shapes) == 340_787_200
    assert [key for key in keys if key.startswith("input.8.")] == [f"input.8.{i}" for i in range(10)]


def test_sdxl_s_layers_are_named_right_in_both_namings(toy_type):
    from conceptloom.evaluation.rigs import sdxl_unet

    with torch.inference_mode():
        config = {**sdxl_unet(3), "model_channels": 32, "context_dim": WIDTH}
        model = toy_type(config, family="SDXL", base="SDXL")
        truth = Truth(model.model)
        assert len(truth.base) == 2 * (4 + 2 * 3 + 3 + 3 * 3 + 3 * 2)
        for name in ("F1", "F4", "F6", "F8 kohya"):
            truth.check(load(model, truth.files()[name]))


# ---- nodes --------------------------------------------------------------------------------------------------------


def strength_of(nodes, toy, truth, entry):
    """How many times the true difference a file holds."""
    concept, _ = nodes.LoadConcept.execute(toy.model, entry, "cat", 1.0, "none", "").result
    true = truth.delta[f"{LOWEST}.to_k.weight"]
    return round(float(concept.deltas["middle.0.0"]["k"].matrix().norm() / true.norm()))


def test_nodes_load_gather_and_save(toy, truth, tmp_path, monkeypatch):
    import folder_paths
    from conceptloom.nodes import concepts as nodes

    for folder in ("concepts", "loras", "embeddings"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, folder, ([str(tmp_path / folder)], {".bin"}))
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    torch.save(truth.files()["F3"], tmp_path / "concepts" / "delta.bin")
    torch.save(truth.kohya(), tmp_path / "loras" / "cat.bin")
    torch.save({"emb_params": truth.token[None]}, tmp_path / "embeddings" / "cat.bin")
    for place, strength in (("concepts/loras", 2.0), ("concepts/concepts", 3.0), ("concepts/embeddings", 4.0)):
        (tmp_path / place).mkdir()
        torch.save(
            {n: v * strength if "up" in n else v for n, v in truth.kohya().items()}, tmp_path / place / "cat.bin"
        )
    entries = next(i for i in nodes.LoadConcept.define_schema().inputs if i.id == "file").options
    loaded = {entry: strength_of(nodes, toy, truth, entry) for entry in entries if entry != "delta.bin"}
    # Each entry once, each its own file.
    assert loaded == {
        "loras/cat.bin": 1,
        "concepts/loras/cat.bin": 2,
        "concepts/concepts/cat.bin": 3,
        "embeddings/cat.bin": 4,
    }
    assert len(entries) == 5
    dog, report = nodes.LoadConcept.execute(toy.model, "delta.bin", "dog", 1.0, "none", "").result
    assert dog.class_word == "dog" and "token <new1>: 1 of width 64 for text encoder l" in report
    cat, _ = nodes.LoadConcept.execute(toy.model, "loras/cat.bin", "cat", 0.7, "embeddings/cat.bin", "<c>").result
    truth.check(cat)
    (bank,) = nodes.ConceptBank.execute({"concept1": cat, "concept0": dog}).result
    assert bank == [dog, cat] and nodes.gather_concepts({"concept0": bank, "concept1": None}) == [dog, cat]
    (report,) = nodes.SaveConcept.execute([dog], "dog", "concept", RANK).result
    assert (tmp_path / "output" / "concepts" / "dog.safetensors").exists() and "concepts/dog.safetensors" in report
    with pytest.raises(ValueError, match="Save Concept: concept: expected one concept, got a bank of 2"):
        nodes.SaveConcept.execute(bank, "both", "concept", 0)
    with pytest.raises(ValueError, match="Concept Bank: concepts: expected a placeholder of its own"):
        nodes.ConceptBank.execute({"concept0": dog, "concept1": dog})
    assert {node.GET_SCHEMA().node_id for node in nodes.NODES} == {
        "ConceptLoomLoadConcept",
        "ConceptLoomConceptBank",
        "ConceptLoomSaveConcept",
    }
