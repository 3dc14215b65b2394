"""LoRAs and their relatives: files of the libraries that write them are read whole and do what their trainers did.

The truth is each paper's formula, written out in double precision; that the formula is the trainer's is seen by what
the trainer's own layer gives.
"""

import itertools
import json
import math

import pytest
import torch
from conceptloom.encoders.adapter_names import (
    ANYWHERE,
    DIFFUSION,
    TEXT,
    TEXT_2,
    Layer,
    Named,
    grouped,
    lokr_rank,
    numbered_names,
    scale_of,
)
from conceptloom.encoders.adapters import Adapter
from conceptloom.encoders.files import read
from safetensors.torch import save_file

OUT, IN, RANK = 16, 24, 4
KERNEL = 3
NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
LAYER = Layer(DIFFUSION, "mid_block_attentions_0_transformer_blocks_0_attn2_to_k")


def read_one(state, about=None):
    """The adapter of a file with one layer."""
    groups, rest = grouped(state)
    assert not rest
    ((layer, group),) = groups.items()
    return Adapter(group, scale_of(layer, group, about or {}, lokr_rank(groups)))


def change(adapter, base):
    """What an adapter adds to a weight, as one tensor. One that reads no weight gets its shape alone."""
    found = adapter.weight(base.float() if adapter.reads_weight else torch.empty_like(base, device="meta"))
    return (found[0] @ found[1]).reshape(base.shape) if len(found) == 2 else found[0]


def near(found, true, tolerance=1e-5):
    assert found.shape == true.shape
    error = (found.double() - true.double()).norm() / true.double().norm()
    assert error < tolerance, float(error)


def test_what_reads_no_weight():
    parts = {"lora_up": (OUT, RANK), "lora_down": (RANK, IN)}
    lora = {f"{NAME}.{part}.weight": torch.ones(shape) for part, shape in parts.items()}
    assert not read_one(lora).reads_weight
    assert read_one({**lora, f"{NAME}.dora_scale": torch.ones(OUT, 1)}).reads_weight
    assert read_one({f"{NAME}.weight": torch.ones(OUT), f"{NAME}.on_input": torch.tensor(False)}).reads_weight


# ---- names --------------------------------------------------------------------------------------------------------

ATTENTION = "down_blocks.0.attentions.1.transformer_blocks.0.attn2"


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        (f"unet.{ATTENTION}.to_k.lora_A.weight", Layer(DIFFUSION, f"{ATTENTION}.to_k")),
        (f"unet.{ATTENTION}.to_out.0.lora.up.weight", Layer(DIFFUSION, f"{ATTENTION}.to_out.0")),
        (f"{ATTENTION}.to_k.lora_A.weight", Layer(ANYWHERE, f"{ATTENTION}.to_k")),
        (f"{ATTENTION}.processor.to_out_lora.down.weight", Layer(ANYWHERE, f"{ATTENTION}.to_out")),
        (f"base_model.model.{ATTENTION}.to_k.lora_B.default.weight", Layer(ANYWHERE, f"{ATTENTION}.to_k")),
        (f"base_model.model.unet.{ATTENTION}.to_k.lora_magnitude_vector", Layer(DIFFUSION, f"{ATTENTION}.to_k")),
        (f"unet.base_model.model.{ATTENTION}.to_k.hada_w1_a", Layer(DIFFUSION, f"{ATTENTION}.to_k")),
        ("diffusion_model.middle_block.1.proj_in.lora_up.weight", Layer(DIFFUSION, "middle_block.1.proj_in")),
        ("lycoris_mid_block_attentions_0_proj_in.lokr_w1", Layer(ANYWHERE, "mid_block.attentions.0.proj_in")),
        ("lora_te_text_model_encoder_layers_3_mlp_fc1.alpha", Layer(TEXT, "encoder.layers.3.mlp.fc1")),
        ("lora_te1_text_model_encoder_layers_3_mlp_fc1.alpha", Layer(TEXT, "encoder.layers.3.mlp.fc1")),
        ("lora_te2_text_model_encoder_layers_3_mlp_fc1.alpha", Layer(TEXT_2, "encoder.layers.3.mlp.fc1")),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.up.weight",
            Layer(TEXT, "encoder.layers.3.self_attn.q_proj"),
        ),
        (
            "text_encoder_2.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight",
            Layer(TEXT_2, "encoder.layers.3.self_attn.q_proj"),
        ),
        (
            "base_model.model.text_model.encoder.layers.3.self_attn.q_proj.lora_A.weight",
            Layer(TEXT, "encoder.layers.3.self_attn.q_proj"),
        ),
    ],
)
def test_layers_are_one_whoever_names_them(name, layer):
    groups, rest = grouped({name: torch.ones(1)})
    assert list(groups) == [Layer(layer.place, layer.name.replace(".", "_"))] and not rest


def test_what_names_no_part_is_left_over_and_two_of_one_part_are_refused():
    down = f"unet.{ATTENTION}.to_k.lora_A.weight"
    groups, rest = grouped({down: torch.ones(1), f"unet.{ATTENTION}.to_k.lora_A.bias": torch.ones(1)})
    assert len(groups) == 1 and list(rest) == [f"unet.{ATTENTION}.to_k.lora_A.bias"]
    with pytest.raises(
        ValueError, match="file: expected one adapter, got two: 'unet.*lora_down.weight' are for one layer"
    ):
        grouped({down: torch.ones(1), f"{down.removesuffix('.lora_A.weight')}.lora_down.weight": torch.ones(1)})


def sd_layers():
    """Shapes of the attention layers of a small UNet, in diffusers' own order."""
    layers = {}
    places = [
        *((f"down_blocks.{d}.attentions.{a}", 8 * 2**d) for d in range(2) for a in range(2)),
        ("mid_block.attentions.0", 32),
        *((f"up_blocks.{u}.attentions.{a}", 16 // u) for u in range(1, 3) for a in range(3)),
    ]
    for place, width in places:
        block = f"{place}.transformer_blocks.0"
        for attn, parts in itertools.product(("attn1", "attn2"), ("to_q", "to_k", "to_v", "to_out.0")):
            text = attn == "attn2" and parts in ("to_k", "to_v")
            layers[f"{block}.{attn}.{parts}.weight"] = (width, 20 if text else width)
        layers[f"{block}.ff.net.0.proj.weight"] = (8 * width, width)
    return layers


@pytest.mark.parametrize("gates", [False, True])
def test_numbered_layers_get_their_names(gates):
    """cloneofsimo/lora walks a UNet's modules, whose middle comes last; `lora_diffusion.lora.extract_lora_ups_down`."""
    layers = sd_layers()
    blocks = list(dict.fromkeys(name.partition(".transformer_blocks")[0] for name in layers))
    blocks.sort(key=lambda name: "mid_block" in name)
    order = [f"attn1.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")]
    order += ["ff.net.0.proj"] * gates + [name.replace("attn1", "attn2") for name in order]
    names = [f"{block}.transformer_blocks.0.{part}" for block in blocks for part in order]
    state, truth = {}, {}
    for number, name in enumerate(names):
        out, width = layers[f"{name}.weight"]
        state[f"unet:{number}:up"] = truth[f"unet.{name}.lora_up.weight"] = torch.randn(out, 2)
        state[f"unet:{number}:down"] = truth[f"unet.{name}.lora_down.weight"] = torch.randn(2, width)
    state["text_encoder:5:up"] = truth["text_encoder.text_model.encoder.layers.1.self_attn.v_proj.lora_up.weight"] = (
        torch.ones(8, 2)
    )
    for number in range(6):
        state.setdefault(f"text_encoder:{number}:up", torch.zeros(8, 2))
        state[f"text_encoder:{number}:down"] = torch.zeros(2, 8)
    found = numbered_names(state, layers)
    assert len(found) == len(state) and all(found[name] is tensor for name, tensor in truth.items())
    with pytest.raises(ValueError, match="of this model, 88 or 99 in their order, got .* numbered ones of another"):
        numbered_names({**state, "unet:0:up": torch.zeros(9, 2)}, layers)
    del state["unet:3:down"]
    with pytest.raises(ValueError, match="expected both factors of unet:0, unet:1 and so on"):
        numbered_names(state, layers)


# ---- LyCORIS ------------------------------------------------------------------------------------------------------


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def magnitudes(weight, scale, rows):
    axes = [axis for axis in range(weight.ndim) if axis != (0 if rows else 1)]
    return (
        weight
        / torch.linalg.vector_norm(weight, dim=axes, keepdim=True)
        * scale.reshape([-1 if n not in axes else 1 for n in range(weight.ndim)])
    )


def lora(t, base, options):
    r = len(t["lora_down.weight"])
    scale = options.get("alpha", 1) / (math.sqrt(r) if options.get("rs_lora") else r)
    if "lora_mid.weight" in t:
        up, mid, down = (t[f"lora_{part}.weight"] for part in ("up", "mid", "down"))
        delta = torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    else:
        delta = (t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)).reshape(base.shape)
    merged = base + scale * delta
    return magnitudes(merged, t["dora_scale"], options.get("wd_on_out", True)) if "dora_scale" in t else merged


def loha(t, base, options):
    r = len(t["hada_w1_b"])
    if "hada_t1" in t:
        halves = [
            torch.einsum("ijkl,jr,ip->prkl", t[f"hada_t{n}"], t[f"hada_w{n}_b"], t[f"hada_w{n}_a"]) for n in (1, 2)
        ]
    else:
        halves = [t[f"hada_w{n}_a"] @ t[f"hada_w{n}_b"] for n in (1, 2)]
    merged = base + (halves[0] * halves[1]).reshape(base.shape) * options.get("alpha", 1) / r
    return magnitudes(merged, t["dora_scale"], True) if "dora_scale" in t else merged


def lokr(t, base, options):
    r = options["lora_dim"]
    whole = "lokr_w1" in t and "lokr_w2" in t
    scale = (r if whole else options.get("alpha", 1)) / (math.sqrt(r) if options.get("rs_lora") else r)
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        second = torch.einsum("ijkl,jr,ip->prkl", t["lokr_t2"], t["lokr_w2_b"], t["lokr_w2_a"])
    else:
        second = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
        second = second.reshape(len(second), -1, *base.shape[2:])
    delta = torch.zeros_like(base)
    for a, b in itertools.product(range(first.shape[0]), range(first.shape[1])):
        rows, columns = second.shape[:2]
        delta[a * rows : (a + 1) * rows, b * columns : (b + 1) * columns] = first[a, b] * second
    merged = base + scale * delta
    return magnitudes(merged, t["dora_scale"], True) if "dora_scale" in t else merged


def turns(blocks, bound):
    skew = blocks - blocks.mT
    if bound and skew.norm() > bound:
        skew = skew * bound / skew.norm()
    n = blocks.shape[-1]
    return (eye(n) + skew) @ torch.linalg.inv(eye(n) - skew)


def oft(t, base, options):
    turn = turns(t["oft_blocks"], options.get("constraint", 0) * len(base))
    rows = torch.block_diag(*turn).T @ base.flatten(1)
    return rows.reshape(base.shape) * t.get("rescale", torch.ones(1))


def boft(t, base, options):
    size = t["oft_blocks"].shape[-1]
    rows = base.flatten(1)
    for stage, turn in enumerate(turns(t["oft_blocks"], options.get("constraint", 0) * len(base))):
        # Rows that lie 2^stage * size / 2 apart are turned together.
        stride = 2**stage * size // 2
        order = torch.arange(len(base)).reshape(-1, 2, stride).transpose(1, 2).flatten()
        turned = torch.block_diag(*turn) @ rows[order]
        rows = torch.empty_like(rows)
        rows[order] = turned
    return rows.reshape(base.shape) * t.get("rescale", torch.ones(1))


def glora(t, base, options):
    a1, a2, b1, b2 = (t[f"{part}.weight"].flatten(1) for part in ("a1", "a2", "b1", "b2"))
    turned = torch.einsum("oi...,ij->oj...", base, a1 @ a2)
    return base + (turned + (b1 @ b2).reshape(base.shape)) * options.get("alpha", 1) / len(a2)


def ia3(t, base, options):
    return base * (1 + t["weight"].reshape([1, -1] if options.get("train_on_input") else [-1, 1]))


LYCORIS = {
    "LoCon": ("locon", "LoConModule", lora, {"alpha": 2}),
    "LoCon, rank-stabilised": ("locon", "LoConModule", lora, {"alpha": 2, "rs_lora": True}),
    "LoCon, conv": ("locon", "LoConModule", lora, {"conv": True}),
    "LoCon, conv, core": ("locon", "LoConModule", lora, {"conv": True, "use_tucker": True}),
    "DoRA": ("locon", "LoConModule", lora, {"weight_decompose": True, "alpha": 2}),
    "DoRA, conv": ("locon", "LoConModule", lora, {"weight_decompose": True, "conv": True}),
    "DoRA of the inputs": ("locon", "LoConModule", lora, {"weight_decompose": True, "wd_on_out": False}),
    "LoHa": ("loha", "LohaModule", loha, {"alpha": 3}),
    "LoHa, conv, core": ("loha", "LohaModule", loha, {"conv": True, "use_tucker": True}),
    "LoHa, DoRA": ("loha", "LohaModule", loha, {"weight_decompose": True}),
    "LoKr": ("lokr", "LokrModule", lokr, {"lora_dim": 2, "alpha": 3}),
    "LoKr, rank-stabilised": ("lokr", "LokrModule", lokr, {"lora_dim": 2, "alpha": 3, "rs_lora": True}),
    "LoKr, both in factors": ("lokr", "LokrModule", lokr, {"lora_dim": 1, "decompose_both": True, "alpha": 3}),
    "LoKr, whole": ("lokr", "LokrModule", lokr, {"lora_dim": 8, "full_matrix": True}),
    "LoKr, whole, rank-stabilised": ("lokr", "LokrModule", lokr, {"lora_dim": 8, "full_matrix": True, "rs_lora": True}),
    "LoKr, conv": ("lokr", "LokrModule", lokr, {"lora_dim": 2, "conv": True}),
    "LoKr, conv, core": ("lokr", "LokrModule", lokr, {"lora_dim": 2, "conv": True, "use_tucker": True}),
    "LoKr, DoRA": ("lokr", "LokrModule", lokr, {"lora_dim": 2, "weight_decompose": True}),
    "OFT": ("diag_oft", "DiagOFTModule", oft, {}),
    "OFT, rescaled": ("diag_oft", "DiagOFTModule", oft, {"rescaled": True}),
    "OFT, rescaled, conv": ("diag_oft", "DiagOFTModule", oft, {"rescaled": True, "conv": True}),
    "OFT, bounded": ("diag_oft", "DiagOFTModule", oft, {"constraint": 0.05}),
    "BOFT": ("boft", "ButterflyOFTModule", boft, {"rescaled": True}),
    "BOFT, bounded": ("boft", "ButterflyOFTModule", boft, {"constraint": 0.05}),
    "GLoRA": ("glora", "GLoRAModule", glora, {"alpha": 2}),
    "IA3": ("ia3", "IA3Module", ia3, {}),
    "IA3 of the inputs": ("ia3", "IA3Module", ia3, {"train_on_input": True}),
}


def trained(module, name, options):
    """A layer, its weight before, LyCORIS' module on it with random weights, and what it writes."""
    options = dict(options)
    torch.manual_seed(7)
    layer = (
        torch.nn.Conv2d(IN, OUT, KERNEL, bias=False) if options.pop("conv", False) else torch.nn.Linear(IN, OUT, False)
    )
    base = layer.weight.detach().clone()
    library = pytest.importorskip(f"lycoris.modules.{module}", reason="lycoris-lora is not installed")
    adapter = getattr(library, name)(NAME, layer, **{"lora_dim": RANK, "alpha": 1, **options}).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        adapter.apply_to()
        written = adapter.custom_state_dict() if hasattr(adapter, "custom_state_dict") else adapter.state_dict()
        written = {
            key: value.clone() for key, value in (written or adapter.state_dict()).items() if torch.is_tensor(value)
        }
    return layer, base, {key: value for key, value in written.items() if not key.startswith("org_module")}


def weight_in_use(layer):
    """The weight that a layer works with, from what it makes of the unit inputs."""
    with torch.no_grad():
        if isinstance(layer, torch.nn.Linear):
            return layer(torch.eye(IN)).T
        units = torch.eye(IN * KERNEL**2).reshape(-1, IN, KERNEL, KERNEL)
        return layer(units)[:, :, 0, 0].T.reshape(OUT, IN, KERNEL, KERNEL)


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_files_do_what_their_trainer_did(name, tmp_path):
    module, kind, formula, options = LYCORIS[name]
    layer, base, written = trained(module, kind, options)
    truth = formula({key: value.double() for key, value in written.items()}, base.double(), options)
    near(weight_in_use(layer), truth, 1e-4)
    save_file({f"{NAME}.{key}": value.contiguous() for key, value in written.items()}, tmp_path / "x.safetensors")
    adapter = read_one(*read(tmp_path / "x.safetensors"))
    near(change(adapter, base), truth - base.double(), 1e-4)
    assert adapter.bias() is None


def test_whole_lokr_takes_its_rank_from_the_other_layers():
    """Rank 4 rank-stabilised has the alpha 8 of plain rank 8: the other layers tell."""
    whole = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2), "alpha": torch.tensor(8.0)}
    group = {part: Named(part, tensor) for part, tensor in whole.items()}
    assert scale_of(LAYER, group, {}, 4) == pytest.approx(2.0)
    assert scale_of(LAYER, group, {}, 8) == scale_of(LAYER, group, {}, None) == 1.0
    group["alpha"] = Named("alpha", torch.tensor(8**1.5))
    assert scale_of(LAYER, group, {}, None) == pytest.approx(math.sqrt(8), rel=1e-5)
    factors = {"a.lokr_w1": torch.ones(2, 2), "a.lokr_w2_a": torch.ones(2, 3), "a.lokr_w2_b": torch.ones(3, 2)}
    assert lokr_rank(grouped(factors)[0]) == 3


def test_differences_norms_and_weights_in_full():
    base = torch.randn(OUT, IN)
    other, row = torch.randn(OUT, IN), torch.randn(OUT)
    adapter = read_one({f"{NAME}.diff": other, f"{NAME}.diff_b": row})
    assert torch.equal(change(adapter, base), other) and torch.equal(adapter.bias(), row)
    assert torch.equal(change(read_one({f"{NAME}.set_weight": other}), base), other - base)
    adapter = read_one({f"{NAME}.w_norm": row, f"{NAME}.b_norm": row})
    assert torch.equal(change(adapter, torch.ones(OUT)), row) and torch.equal(adapter.bias(), row)
    alone = read_one({f"{NAME}.diff_b": row})
    assert not alone.changes_weight and torch.equal(alone.bias(), row)


def test_an_alpha_of_0_is_no_scaling_and_glora_s_old_names_are_read():
    up, down, base = torch.randn(OUT, RANK), torch.randn(RANK, IN), torch.randn(OUT, IN)
    adapter = read_one(
        {f"{NAME}.lora_up.weight": up, f"{NAME}.lora_down.weight": down, f"{NAME}.alpha": torch.tensor(0.0)}
    )
    near(change(adapter, base), up @ down)
    a2, a1 = torch.randn(IN, RANK), torch.randn(RANK, IN)
    old = {"a1": a1, "a2": a2, "b1": down, "b2": up}
    adapter = read_one({f"{NAME}.{part}.weight": tensor for part, tensor in old.items()})
    near(change(adapter, base), up @ down + base @ a2 @ a1)


# ---- PEFT ---------------------------------------------------------------------------------------------------------


def peft_file(folder, config, bias=True):
    """What PEFT writes for one layer of random adapter weights: base weight, the weight in use, bias in use, file."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(3)
    model = torch.nn.ModuleDict({"attn2": torch.nn.ModuleDict({"to_k": torch.nn.Linear(IN, OUT, bias)})})
    layer = model["attn2"]["to_k"]
    base = layer.weight.detach().clone()
    before = 0 if layer.bias is None else layer.bias.detach().clone()
    model = peft.get_peft_model(model, getattr(peft, config.pop("kind"))(target_modules=["to_k"], **config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        layer = model.base_model.model["attn2"]["to_k"]
        offset = layer(torch.zeros(1, IN))[0]
        used = (layer(torch.eye(IN)) - offset).T
    model.save_pretrained(folder)
    state, _ = read(folder / "adapter_model.safetensors")
    return base, used, offset - before, state, {"adapter_config": (folder / "adapter_config.json").read_text()}


PEFT = {
    "LoRA": {"kind": "LoraConfig", "r": 4, "lora_alpha": 8},
    "rank-stabilised": {"kind": "LoraConfig", "r": 4, "lora_alpha": 8, "use_rslora": True},
    "DoRA": {"kind": "LoraConfig", "r": 4, "lora_alpha": 6, "use_dora": True},
    "bias": {"kind": "LoraConfig", "r": 4, "lora_alpha": 6, "lora_bias": True},
    "patterns": {
        **{"kind": "LoraConfig", "r": 4, "lora_alpha": 6},
        **{"rank_pattern": {"to_k": 2}, "alpha_pattern": {"attn2.to_k": 5}},
    },
    "LoHa": {"kind": "LoHaConfig", "r": 4, "alpha": 6},
    "LoKr": {"kind": "LoKrConfig", "r": 2, "alpha": 6},
}


@pytest.mark.parametrize("name", PEFT)
def test_peft_s_files_do_what_their_trainer_did(name, tmp_path):
    base, used, offset, state, about = peft_file(tmp_path, dict(PEFT[name]))
    assert all(key.startswith("base_model.model.attn2.to_k.") for key in state)
    adapter = read_one(state, about)
    near(change(adapter, base), used - base, 1e-4)
    if name == "bias":
        near(adapter.bias(), offset, 1e-4)
    else:
        assert adapter.bias() is None and not offset.abs().max() > 1e-6
    if name == "DoRA":
        a, b, m = (
            next(t.double() for key, t in state.items() if part in key) for part in ("lora_A", "lora_B", "magnitude")
        )
        merged = base.double() + 6 / 4 * b @ a
        near(change(adapter, base), m[:, None] * merged / merged.norm(dim=1, keepdim=True) - base)


def test_diffusers_keeps_peft_s_scale_in_the_metadata():
    group = grouped({"unet.a.to_k.lora_A.weight": torch.ones(4, 2), "unet.a.to_k.lora_B.weight": torch.ones(2, 4)})[0]
    ((layer, group),) = group.items()
    about = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.lora_alpha": 3})}
    assert scale_of(layer, group, about) == 2.0
    assert scale_of(layer, group, {}) is scale_of(layer, group, {"lora_adapter_metadata": "["}) is None
    with pytest.raises(ValueError, match="file: expected a LoRA for the base model as it is, got one .* with pissa"):
        scale_of(layer, group, {"adapter_config": json.dumps({"init_lora_weights": "pissa_niter_4"})})


# ---- refusals -----------------------------------------------------------------------------------------------------

UP, DOWN = {"lora_up.weight": torch.ones(OUT, RANK)}, {"lora_down.weight": torch.ones(RANK, IN)}
REFUSED = {
    "whole LoRA, got '.*lora_up.weight' without its down": UP,
    "whole LoKr, got '.*lokr_w1' without its lokr_w2_": {"lokr_w1": torch.ones(2, 2)},
    "whole LoHa, got '.*' without its hada_w2_b": {f"hada_w{part}": torch.ones(2, 2) for part in ("1_a", "1_b", "2_a")},
    "tensors of an adapter, got '.*alpha' alone": {"alpha": torch.ones(())},
    "all be used, got '.*rescale', which is none of a LoRA": {**UP, **DOWN, "rescale": torch.ones(1)},
    "all be used, got '.*on_input', which is none of a LoRA": {**UP, **DOWN, "on_input": torch.ones(1)},
    "all be used, got '.*lokr_w1_b', which is none of a LoKr": {
        **{f"lokr_w{n}": torch.ones(2, 2) for n in (1, 2)},
        "lokr_w1_b": torch.ones(2, 2),
    },
    "all be used, got '.*lokr_t2', which is none of a LoKr": {
        **{f"lokr_w{n}": torch.ones(2, 2) for n in (1, 2)},
        "lokr_t2": torch.ones(2, 2),
    },
    "all be used, got '.*hada_t1', which is none of a LoHa": {
        **{f"hada_w{part}": torch.ones(2, 2) for part in ("1_a", "1_b", "2_a", "2_b")},
        "hada_t1": torch.ones(2, 2, 1, 1),
    },
    "all be used, got '.*lora_B.bias', which is none of a LoRA": {
        **UP,
        **DOWN,
        "lora_magnitude_vector": torch.ones(OUT),
        "lora_B.bias": torch.ones(OUT),
    },
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_tensors_that_are_missing_or_unused_are_named(sentence):
    with pytest.raises(ValueError, match=f"^file: expected .*{sentence}"):
        read_one({f"{NAME}.{part}": tensor for part, tensor in REFUSED[sentence].items()})


@pytest.mark.parametrize(
    "parts",
    [
        {**UP, "lora_down.weight": torch.ones(RANK, IN - 1)},
        {**UP, "lora_down.weight": torch.ones(RANK - 1, IN)},
        {**UP, **DOWN, "dora_scale": torch.ones(OUT + 1, 1)},
        {**{f"hada_w{n}_a": torch.ones(OUT, 2) for n in "12"}, **{f"hada_w{n}_b": torch.ones(2, 5) for n in "12"}},
        {f"lokr_w{n}": torch.ones(4, 5) for n in "12"},
        {"oft_blocks": torch.zeros(3, 4, 4)},
        {"diff": torch.ones(OUT, IN + 1)},
        {"set_weight": torch.ones(IN)},
        {"weight": torch.ones(3), "on_input": torch.tensor(0)},
    ],
)
def test_shapes_of_another_model_are_named(parts):
    adapter = read_one({f"{NAME}.{part}": tensor for part, tensor in parts.items()})
    with pytest.raises(ValueError, match=r"^file: expected .* for a weight of shape \(16, 24\), got .*\("):
        adapter.weight(torch.ones(OUT, IN))
