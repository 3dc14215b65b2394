"""Concepts: every format of them gives the same differences, and what is written is read again (spec A3, oracle A1)."""

import json
import math

import pytest
import torch
from conceptloom.encoders import concept_files, concept_formats
from conceptloom.encoders.concept_formats import read, read_tokens
from conceptloom.encoders.concepts import Concept, Delta
from safetensors.torch import load_file, save_file

WIDTH, CHANNELS, RANK = 24, 16, 4
FP16_ROUNDING = 2**-10
NAMES = (
    *("F1", "F1, tokens in one row", "F1, unwrapped", "F2", "F3", "F3, compressed", "F3, single key unwrapped"),
    *("F4", "F5", "F7"),
)
LAYER = "a.attn2.to_k.weight"

# SD 1.x's cross-attention layers as concepts call them, with diffusers' names and CompVis's.
LAYERS = {
    **{f"input.{3 * d + 1 + a}.0": f"down_blocks.{d}.attentions.{a}" for d in range(3) for a in range(2)},
    "middle.0.0": "mid_block.attentions.0",
    **{f"output.{3 * u + a}.0": f"up_blocks.{u}.attentions.{a}" for u in range(1, 4) for a in range(3)},
}
DIFFUSERS = {key: f"{name}.transformer_blocks.0.attn2" for key, name in LAYERS.items()}
COMPVIS = {
    **{f"input.{i}.0": f"input_blocks.{i}.1.transformer_blocks.0.attn2" for i in (1, 2, 4, 5, 7, 8)},
    "middle.0.0": "middle_block.1.transformer_blocks.0.attn2",
    **{f"output.{i}.0": f"output_blocks.{i}.1.transformer_blocks.0.attn2" for i in range(3, 12)},
}


@pytest.fixture(scope="module")
def truth():
    """Base weights, factors of their differences, and a token: what all formats are made of."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator) * scale

    base = {(key, part): draw(CHANNELS, WIDTH) for key in LAYERS for part in "kv"}
    factors = {where: (draw(CHANNELS, RANK, scale=0.02), draw(RANK, WIDTH)) for where in base}
    return base, factors, draw(WIDTH)


def whole(truth):
    base, factors, _ = truth
    return {where: base[where] + factors[where][0] @ factors[where][1] for where in base}


def pairs(truth):
    return {where: dict(zip("uv", truth[1][where], strict=True)) for where in truth[0]}


def named(values, names, pattern="{}.to_{}.weight"):
    return {pattern.format(names[key], part): value for (key, part), value in values.items()}


def compvis(truth, values, tokens):
    return {"state_dict": {**named(values, COMPVIS, "model.diffusion_model.{}.to_{}.weight"), "embed": tokens}}


def files(truth):
    """F1 to F5 and F7 with one difference and one token, and what is left of them to be read in other ways."""
    token = truth[2]
    unet = named(whole(truth), DIFFUSERS)
    processors = named(whole(truth), DIFFUSERS, "{}.processor.to_{}_custom_diffusion.weight")
    hollow = {name.replace("attn2", "attn1") + ".processor": {} for name in DIFFUSERS.values()}
    # What a file has of a vocabulary: a row that wants gradients and drags all others along.
    view = torch.zeros(7, WIDTH).index_copy(0, torch.tensor([5]), token[None]).requires_grad_(True)[5]
    modifier = {"modifier_token": {"<new1>": view}}
    return {
        "F1": compvis(truth, whole(truth), token[None]),
        "F1, tokens in one row": compvis(truth, whole(truth), token),
        "F1, unwrapped": compvis(truth, whole(truth), token)["state_dict"],
        "F2": compvis(truth, pairs(truth), token[None]),
        "F3": {"unet": unet, **modifier},
        "F3, compressed": {"unet": named(pairs(truth), DIFFUSERS), **modifier},
        "F3, single key unwrapped": unet,
        "F4": {"unet": unet, "modifier_token": {"<new1>": [token, torch.ones(8)]}},
        "F5": {"unet": unet, "modifier_token": {"<new1>": token}, "modifier_token_2": {"<new1>": torch.ones(8)}},
        "F7": {**processors, **hollow},
    }


def concept_of(file, truth, **changes):
    """The concept of a file whose every layer is known."""
    base = truth[0]
    names = {name: where for names in (DIFFUSERS, COMPVIS) for where, name in places(names)}
    deltas = {}
    for name, weight in file.weights.items():
        key, part = names[name]
        deltas.setdefault(key, {})[part] = Delta((weight - base[key, part],))
    for name, factors in file.factors.items():
        key, part = names[name]
        deltas.setdefault(key, {})[part] = Delta(factors)
    placeholder, tokens = next(iter(file.tokens.items()), ("", {}))
    return Concept(**{"name": "dog", "deltas": deltas, "placeholder": placeholder, "tokens": tokens, **changes})


def places(names):
    return [((key, part), f"{names[key]}.to_{part}.weight") for key in LAYERS for part in "kv"]


def assert_true(concept, truth, tolerance=FP16_ROUNDING):
    _, factors, _ = truth
    assert set(concept.deltas) == set(LAYERS)
    for (key, part), (up, down) in factors.items():
        true = (up @ down).double()
        error = (concept.deltas[key][part].matrix().double() - true).norm() / true.norm()
        assert error < tolerance, (key, part, float(error))


@pytest.mark.parametrize("name", NAMES)
def test_every_format_gives_the_same_concept(name, truth):
    file = read(files(truth)[name])
    assert_true(concept_of(file, truth), truth)
    assert file.text_width == WIDTH
    if name in ("F3, single key unwrapped", "F7"):
        assert not file.tokens
    else:
        row = file.tokens["<new1>"]["l"]
        assert torch.equal(row, truth[2][None]) and not row.requires_grad
        assert row.untyped_storage().nbytes() == WIDTH * 4
    assert (set(file.tokens.get("<new1>", {})) == {"l", "g"}) == (name in ("F4", "F5"))


def test_formats_are_told_apart(truth):
    made = {name: read(state).source_format for name, state in files(truth).items()}
    assert made["F1"] == made["F1, unwrapped"] == concept_formats.COMPVIS
    assert made["F2"] == concept_formats.COMPVIS + concept_formats.COMPRESSED
    assert made["F3, compressed"] == concept_formats.DIFFUSERS + concept_formats.COMPRESSED
    assert (made["F3"], made["F4"]) == (concept_formats.DIFFUSERS, concept_formats.SDXL)
    assert (made["F5"], made["F7"]) == (concept_formats.TWEEDIEMIX, concept_formats.PROCESSORS)


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.hada_w1_a",
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight",
        "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.diff",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lokr_w1",
    ],
)
def test_loras_are_left_to_their_own_reader(name, truth):
    tensor = torch.ones(4, WIDTH)
    assert read({name: tensor}).lora == {name: tensor}
    inside = read({"unet": {name: tensor}, "modifier_token": {"<new1>": truth[2]}})
    assert inside.source_format == concept_formats.LORA and inside.lora == {name: tensor}
    assert torch.equal(inside.tokens["<new1>"]["l"], truth[2][None])


def test_compvis_tokens_are_numbered_in_one_row_or_in_several(truth):
    rows = torch.randn(3, WIDTH)
    for given in (rows, rows.flatten()):
        tokens = read(compvis(truth, whole(truth), given)).tokens
        assert list(tokens) == ["<new1>", "<new2>", "<new3>"]
        assert torch.equal(torch.cat([token["l"] for token in tokens.values()]), rows)


def test_extras_of_all_cross_attention_stand_beside_factors(truth):
    out = f"model.diffusion_model.{COMPVIS['middle.0.0']}.to_out.0"
    state = compvis(truth, pairs(truth), truth[2])
    state["state_dict"] |= {f"{out}.weight": torch.ones(4, 4), f"{out}.bias": torch.ones(4)}
    file = read(state)
    assert set(file.weights) == {f"{COMPVIS['middle.0.0']}.to_out.0.{end}" for end in ("weight", "bias")}
    assert len(file.factors) == 32
    name = f"{DIFFUSERS['middle.0.0']}.processor.to_out_custom_diffusion.0.bias"
    assert f"{DIFFUSERS['middle.0.0']}.to_out.0.bias" in read({**files(truth)["F7"], name: torch.ones(4)}).weights


def test_factors_of_rank_0_are_no_difference(truth):
    state = files(truth)["F2"]
    name = next(name for name in state["state_dict"] if name.endswith("to_k.weight"))
    state["state_dict"][name] = {"u": torch.zeros(CHANNELS, 0), "v": torch.zeros(0, WIDTH)}
    concept = concept_of(read(state), truth)
    delta = next(parts["k"] for parts in concept.deltas.values() if not parts["k"].factors[0].numel())
    assert torch.equal(delta.apply(torch.randn(2, 3, WIDTH)), torch.zeros(2, 3, CHANNELS))
    assert torch.equal(delta.matrix(), torch.zeros(CHANNELS, WIDTH))


def test_text_encoders_are_named_by_their_width(truth):
    def encoder(width):
        return {"text_model.final_layer_norm.weight": torch.zeros(width)}

    unet = files(truth)["F3"]["unet"]
    assert set(read({"unet": unet, "text_encoder": encoder(768), "text_encoder_2": encoder(1280)}).text) == {"l", "g"}
    assert set(read({"unet": unet, "text_encoder": encoder(1024)}).text) == {"h"}
    state = compvis(truth, whole(truth), truth[2])["state_dict"]
    name = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    assert set(read({**state, name: torch.zeros(768)}).text["l"]) == {"text_model.final_layer_norm.weight"}


def test_token_files():
    row = torch.randn(WIDTH)
    for state in ({"<dog>": row}, {"<dog>": row[None]}, {"modifier_token": {"<dog>": row}}):
        assert torch.equal(read_tokens(state)["<dog>"]["l"], row[None])
    assert set(read_tokens({"x": torch.zeros(1024)})["x"]) == {"h"}
    both = read_tokens({"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)})["<new1>"]
    assert {name: tuple(token.shape) for name, token in both.items()} == {"l": (2, 768), "g": (2, 1280)}
    assert read_tokens({"emb_params": torch.zeros(2, 768)})["<new1>"]["l"].shape == (2, 768)


def embedding(rows, **more):
    """What AUTOMATIC1111 saves."""
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "dog", "step": 100, **more}


def test_embeddings_of_every_form_are_tokens():
    """All that the host's `load_embed` reads."""
    row, wide = torch.randn(2, 768), torch.randn(2, 1280)
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(row)})
    alone = (
        embedding(row),
        embedding(row, sd_checkpoint=None, sd_checkpoint_name=None),
        {"string_to_param": held},
        [{"a": row[:1]}, {"b": row[1:]}],
        {"clip_l": row},
        {"emb_params": row},
        {"<new1>": row},
    )
    for state in alone:
        token = read_tokens(state)["<new1>"]
        assert set(token) == {"l"} and torch.equal(token["l"], row) and not token["l"].requires_grad
    for state in ({"clip_l": row, "clip_g": wide}, [{"a": wide, "b": row}], [{"a": row}, {"b": wide}]):
        token = read_tokens(state)["<new1>"]
        assert torch.equal(token["l"], row) and torch.equal(token["g"], wide)
    assert set(read_tokens({"clip_h": torch.ones(1, 1024)})["<new1>"]) == {"h"}
    bundle = {"bundle_emb.dog.string_to_param.*": row, "bundle_emb.cat.clip_l": row, "bundle_emb.cat.clip_g": wide}
    assert {name: set(token) for name, token in read_tokens(bundle).items()} == {"dog": {"l"}, "cat": {"l", "g"}}


def test_loras_bring_their_words():
    lora = {"lora_unet_mid_block_x.alpha": torch.tensor(1.0)}
    row = torch.randn(1, 768)
    file = read({**lora, "bundle_emb.dog.string_to_param.*": row})
    assert set(file.lora) == set(lora) and torch.equal(file.tokens["dog"]["l"], row)
    numbered = {"unet:0:up": torch.ones(2, 1), "unet:0:down": torch.ones(1, 2)}
    file = read({**numbered, "<s1>": row[0]})
    assert set(file.lora) == set(numbered) and torch.equal(file.tokens["<s1>"]["l"], row)
    assert read([torch.ones(2, 1), torch.ones(1, 2)]).lora.keys() == numbered.keys()


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({}, "an embedding or a file with a concept's word, got nothing"),
        ([], "an embedding or a file with a concept's word, got 0 entries"),
        ([torch.ones(2)], "got 1 entries, the first a Tensor"),
        ({"string_to_param": {}}, "one embedding in string_to_param, got nothing"),
        ({"string_to_param": {"*": "x"}}, "got 'the token', a str"),
        ([{"a": torch.ones(2, 768), "b": torch.ones(2, 5)}], "768 and 1280 for SDXL, got 5 and 768"),
        ({"clip_l": torch.ones(1, 768), "t5xxl": torch.ones(1, 4096)}, "got some for 't5xxl'"),
        ({"a.lora_up.weight": torch.ones(2, 2)}, "got one with 'a.lora_up.weight'"),
        ({"a.attn2.to_k.weight": torch.ones(2, 2)}, "got one with 'a.attn2.to_k.weight'"),
    ],
)
def test_token_files_that_are_none_get_their_sentence(state, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_tokens(state)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({}, "file: expected a concept .*, got a file without keys or values"),
        ({"first_stage_model.x": torch.zeros(1)}, "only such as 'first_stage_model.x'"),
        ({"unet": {LAYER: torch.zeros(2, 2)}, "optimizer": {}}, "got 'optimizer'"),
        ([torch.ones(2)], "expected a concept, got 1 entries, the first a Tensor"),
        (embedding(torch.ones(1, 768)), "only such as 'string_to_token'"),
        ({LAYER: 3}, "expected tensors, got 'a.attn2.to_k.weight', a int"),
        ({LAYER: {"u": torch.zeros(2, 2)}}, "expected the factors u and v"),
        ({LAYER: {"u": torch.zeros(2, 3), "v": torch.zeros(2, 2)}}, "factors that fit together"),
        ({"input_blocks.1.attn2.to_k.weight": torch.zeros(2, 3), "embed": torch.zeros(4)}, r"text states \(3\)"),
        (
            {"unet": {LAYER: torch.zeros(2, 2)}, "modifier_token": {"x": [torch.zeros(2)] * 3}},
            "one or two",
        ),
        ({"unet": {LAYER: torch.zeros(2, 2)}, "modifier_token": {"x": "y"}}, "a str"),
        ({"unet": {LAYER: torch.zeros(2, 2)}, "modifier_token_2": {"x": torch.zeros(2)}}, "both text"),
        (
            {"unet": {LAYER: torch.zeros(2, 2)}, "text_encoder": {"x": torch.zeros(2)}},
            "final_layer_norm",
        ),
    ],
)
def test_files_that_are_none_get_their_sentence(state, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(state)


# ---- deltas -------------------------------------------------------------------------------------------------------


def test_factors_are_applied_as_their_product():
    up, down, bias = torch.randn(6, 2), torch.randn(2, 5), torch.randn(6)
    x = torch.randn(3, 7, 5)
    delta = Delta((up, down), bias)
    expected = x.double() @ (up @ down).double().T + bias.double()
    torch.testing.assert_close(delta.apply(x).double(), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(delta.apply(x), x @ delta.matrix().T + delta.bias.float(), atol=1e-4, rtol=1e-4)
    full = Delta(((up @ down).half(),))
    assert torch.equal(full.apply(x), x @ (up @ down).half().float().T)
    assert full.shape == delta.shape == (6, 5)
    assert delta.apply(x.double()).dtype == torch.float64


def test_factors_too_small_for_half_precision_keep_their_product():
    up, down = torch.randn(6, 2) * 1e-7, torch.randn(2, 5) * 1e3
    true = up.double() @ down.double()
    delta = Delta((up, down))
    assert (delta.matrix().double() - true).norm() / true.norm() < FP16_ROUNDING
    again = Delta(delta.factors)
    assert all(map(torch.equal, again.factors, delta.factors))


@pytest.mark.parametrize(
    ("factors", "bias", "sentence"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), None, "two factors of one, got"),
        ((torch.zeros(2, 3, 1),), None, "a matrix or two factors"),
        ((), None, "a matrix or two factors"),
        ((torch.zeros(2, 2),) * 3, None, "a matrix or two factors"),
        ((torch.zeros(2, 3),), torch.zeros(3), "a bias of 2 numbers"),
        ((torch.full((2, 3), math.nan),), None, "got NaN or infinity"),
        ((torch.full((2, 2), math.inf), torch.ones(2, 2)), None, "got NaN or infinity"),
        ((torch.full((2, 3), 1e5),), None, "finite in half precision"),
    ],
)
def test_bad_differences_get_their_sentence(factors, bias, sentence):
    with pytest.raises(ValueError, match=sentence):
        Delta(factors, bias)


def test_compression_is_the_best_of_its_rank(truth):
    full = torch.randn(CHANNELS, WIDTH)
    key = "middle.0.0"
    concept = Concept("x", {key: {"k": Delta((full,)), "v": Delta(truth[1][key, "v"])}})
    seen = []
    small = concept.compressed(5, lambda: seen.append(1)).deltas[key]
    values = torch.linalg.svdvals(full.double())
    error = (small["k"].matrix() - full).norm()
    torch.testing.assert_close(error.double(), values[5:].norm(), rtol=1e-3, atol=1e-3)
    assert [f.shape for f in small["k"].factors] == [(CHANNELS, 5), (5, WIDTH)] and len(seen) == 2
    assert small["v"] is concept.deltas[key]["v"]
    exact = concept.compressed(99).deltas[key]["k"]
    assert (exact.matrix() - full).norm() / full.norm() < FP16_ROUNDING
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        concept.compressed(0)


# ---- concepts and banks -------------------------------------------------------------------------------------------


def small(name="dog", width=4, **changes):
    return Concept(name, {"middle.0.0": {"k": Delta((torch.ones(2, width),))}}, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"strength": math.nan}, "strength: expected a finite number"),
        ({"placeholder": "<new1>"}, "placeholder: expected none for a concept without a token"),
        ({"tokens": {"l": torch.zeros(1, 4)}}, "placeholder: expected a word"),
        ({"tokens": {"l": torch.zeros(1, 4)}, "placeholder": "<new 1>"}, "placeholder: expected a word without spaces"),
        ({"tokens": {"l": torch.zeros(4)}, "placeholder": "x"}, "token: expected rows for a CLIP encoder"),
        ({"tokens": {"t5": torch.zeros(1, 4)}, "placeholder": "x"}, "token: expected rows for a CLIP encoder"),
        ({"tokens": {"l": torch.full((1, 4), math.inf)}, "placeholder": "x"}, "token: expected finite numbers"),
        ({"deltas": {}}, "concept: expected differences of cross-attention weights"),
    ],
)
def test_bad_concepts_get_their_sentence(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Concept(**{"name": "dog", "deltas": small().deltas, **changes})


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_concepts_are_read_as_they_were_written(name, truth, tmp_path):
    """Oracle A1: load, save, load."""
    bias = Delta((torch.zeros(CHANNELS, 0), torch.zeros(0, CHANNELS)), torch.randn(CHANNELS))
    concept = concept_of(
        read(files(truth)[name]), truth, class_word="dog", source_format=name, base="abc", strength=0.5
    )
    concept = Concept(**{**vars(concept), "deltas": {**concept.deltas, "another.layer": {"out": bias}}})
    path = tmp_path / "dog.safetensors"
    concept_files.save(concept, path)
    again = concept_files.load(path)
    for key, parts in concept.deltas.items():
        assert again.deltas[key].keys() == parts.keys()
        for part, delta in parts.items():
            assert all(map(torch.equal, again.deltas[key][part].factors, delta.factors))
            assert (delta.bias is None) == (again.deltas[key][part].bias is None)
    assert torch.equal(again.deltas["another.layer"]["out"].bias, bias.bias)
    assert again.tokens.keys() == concept.tokens.keys() and all(
        torch.equal(again.tokens[encoder], token) for encoder, token in concept.tokens.items()
    )
    for attribute in ("name", "class_word", "placeholder", "source_format", "base"):
        assert getattr(again, attribute) == getattr(concept, attribute)
    assert again.strength == 1


def test_foreign_and_broken_files_get_their_sentence(tmp_path):
    path = tmp_path / "x.safetensors"

    def refused(sentence, state=None, **about):
        about = {"version": 1, "name": "x", "class_word": "", "placeholder": "", **about}
        metadata = {concept_files.FORMAT: json.dumps(about)}
        save_file({"k.middle.0.0.d": torch.zeros(2, 2)} if state is None else state, path, metadata=metadata)
        with pytest.raises(ValueError, match=sentence):
            concept_files.load(path)

    refused("expected version 1 of the concept format, got x.safetensors with 2", version=2)
    refused("got x.safetensors with 'k.d'", {"k.d": torch.zeros(2, 2)})
    refused("got x.safetensors with 'ff.middle.0.0.d'", {"ff.middle.0.0.d": torch.zeros(2, 2)})
    refused("got x.safetensors with 'emb.t5'", {"emb.t5": torch.zeros(2, 2)})
    refused("both its factors, got u", {"k.middle.0.0.u": torch.zeros(2, 2)})
    refused("expected differences of cross-attention weights", {"emb.l": torch.zeros(1, 2)}, placeholder="x")
    refused("NaN or infinity", {"k.middle.0.0.d": torch.full((2, 2), math.nan)})
    refused("a whole concept, got x.safetensors: .*author", author="someone")
    save_file({"k.middle.0.0.d": torch.zeros(2, 2)}, path)
    assert not concept_files.is_concept_file(path)
    with pytest.raises(
        ValueError, match="expected a concept written by Save Concept, got x.safetensors, which is none"
    ):
        concept_files.load(path)
    torch.save({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected a concept written by Save Concept"):
        concept_files.load(path)


def test_lora_and_embedding_have_the_names_of_stock_loaders(truth, tmp_path):
    concept = concept_of(read(files(truth)["F4"]), truth)

    def layer(key, part):
        return f"{COMPVIS[key]}.to_{part}"

    concept_files.save_as_lora(concept.compressed(RANK), tmp_path / "lora.safetensors", layer)
    lora = load_file(tmp_path / "lora.safetensors")
    for (key, part), (up, down) in truth[1].items():
        name = f"diffusion_model.{COMPVIS[key]}.to_{part}"
        product = lora[f"{name}.lora_up.weight"].float() @ lora[f"{name}.lora_down.weight"].float()
        assert (product - up @ down).norm() / (up @ down).norm() < 2 * FP16_ROUNDING
    assert len(lora) == 2 * len(truth[1])
    concept_files.save_as_lora(concept, tmp_path / "full.safetensors", layer)
    assert all(name.endswith(".diff") for name in load_file(tmp_path / "full.safetensors"))
    concept_files.save_as_embedding(concept, tmp_path / "token.safetensors")
    assert set(load_file(tmp_path / "token.safetensors")) == {"clip_l", "clip_g"}
    concept_files.save_as_embedding(concept_of(read(files(truth)["F3"]), truth), tmp_path / "one.safetensors")
    assert set(load_file(tmp_path / "one.safetensors")) == {"emb_params"}
