"""Checkpoints with the key names, shapes and dtype of the published ones, and random values.

UNets, CLIP-L and autoencoders get their names from the host's own modules, which keep the published ones; CLIP-G has
the names of OpenCLIP in SDXL's file, which are written out here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch


def _unet_config(kind: str) -> dict:
    """SD 1.5's UNet, or SDXL's at the reduced depth of Segmind Vega, which the host reads as SDXL: 10 transformer
    blocks become 2, 2 become 1, and the middle has none."""
    from conceptloom.evaluation.rigs import SD15_UNET, sdxl_unet

    if kind == "sd15":
        return {**SD15_UNET, "num_heads": 8}
    depth = {
        "transformer_depth": [0, 0, 1, 1, 2, 2],
        "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
        "transformer_depth_middle": -1,
    }
    return {**sdxl_unet(2), **depth, "num_head_channels": 64}


def _unet(config: dict) -> dict[str, torch.Size]:
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    model = UNetModel(**config, device="meta", operations=comfy.ops.disable_weight_init)
    return {f"model.diffusion_model.{name}": tensor.shape for name, tensor in model.state_dict().items()}


def _autoencoder() -> dict[str, torch.Size]:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {
        "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoencoderKL(ddconfig=config, embed_dim=4)
    return {f"first_stage_model.{name}": tensor.shape for name, tensor in model.state_dict().items()}


def _clip_l(prefix: str) -> dict[str, torch.Size]:
    import comfy.ops
    from comfy.clip_model import CLIPTextModel

    config = {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
        "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407,
    }  # fmt: skip
    model = CLIPTextModel(config, torch.float16, "meta", comfy.ops.disable_weight_init)
    names = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith("text_proj")}
    return {f"{prefix}{name}": shape for name, shape in names.items()}


def _clip_g(prefix: str) -> dict[str, torch.Size]:
    width = 1280
    shapes = {
        "token_embedding.weight": (49408, width),
        "positional_embedding": (77, width),
        "text_projection": (width, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "logit_scale": (),
    }
    for layer in range(32):
        block = f"transformer.resblocks.{layer}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}{norm}.weight": (width,), f"{block}{norm}.bias": (width,)}
        for linear, out, into in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            shapes |= {f"{block}{linear}weight": (out, into), f"{block}{linear}bias": (out,)}
    return {f"{prefix}{name}": torch.Size(shape) for name, shape in shapes.items()}


def _controlnet() -> dict[str, torch.Size]:
    """A ControlNet 1.1 for SD 1.5, in the names of its published file."""
    import comfy.ops
    from comfy.cldm.cldm import ControlNet

    config = {name: value for name, value in _unet_config("sd15").items() if name != "out_channels"}
    model = ControlNet(**config, hint_channels=3, device="meta", operations=comfy.ops.disable_weight_init)
    return {f"control_model.{name}": tensor.shape for name, tensor in model.state_dict().items()}


def _clip_l_vision() -> dict[str, torch.Size]:
    import comfy.clip_model
    import comfy.ops

    config = json.loads((Path(comfy.clip_model.__file__).parent / "clip_vision_config_vitl.json").read_text())
    model = comfy.clip_model.CLIPVisionModelProjection(config, torch.float16, "meta", comfy.ops.disable_weight_init)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def coadapter_state(kind: str) -> dict[str, torch.Tensor]:
    """The sketch, color or style CoAdapter, or their fuser, as published, with random values."""
    from comfy.t2i_adapter import adapter
    from conceptloom.encoders.coadapter import CoAdapterFuser

    channels = [320, 640, 1280, 1280]
    torch.manual_seed(0)
    if kind == "sketch":
        net = adapter.Adapter(cin=64, channels=channels, nums_rb=2, ksize=1, sk=True, use_conv=False)
    elif kind == "color":
        net = adapter.Adapter_light(cin=192, channels=channels, nums_rb=4)
    elif kind == "style":
        net = adapter.StyleAdapter(width=1024, context_dim=768, num_head=8, n_layes=3, num_token=8)
    else:
        net = CoAdapterFuser()
    return net.state_dict()


def shapes_of(kind: str) -> dict[str, torch.Size]:
    """Names and shapes of a checkpoint's tensors; `kind` is sd15, sdxl (of reduced depth), sd15_controlnet, or
    clip_l_vision."""
    if kind == "sd15_controlnet":
        return _controlnet()
    if kind == "clip_l_vision":
        return _clip_l_vision()
    if kind == "sd15":
        return _unet(_unet_config("sd15")) | _autoencoder() | _clip_l("cond_stage_model.transformer.")
    clips = _clip_l("conditioner.embedders.0.transformer.") | _clip_g("conditioner.embedders.1.model.")
    return _unet(_unet_config("sdxl")) | _autoencoder() | clips


def write_checkpoint(kind: str, path: Path) -> None:
    """Writes a checkpoint in fp16, tensor by tensor: gigabytes that are never in memory together.

    All tensors repeat one block of random values. Norms are 1, so that activations stay finite through the depth.
    """
    block = (torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02).half().numpy().tobytes()
    ones = torch.ones(1 << 16).half().numpy().tobytes()
    shapes, header, end = shapes_of(kind), {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            values = ones if "norm" in name and name.endswith("weight") else block
            whole, rest = divmod(2 * shape.numel(), len(values))
            for _ in range(whole):
                file.write(values)
            file.write(values[:rest])


def kohya_lora(
    kind: str, seed: int, rank: int = 4, with_text: bool = True, layer: str = ".attentions."
) -> dict[str, torch.Tensor]:
    """A LoRA as kohya's trainer writes it by default: every linear layer of the transformer blocks and their
    projections, and of the text encoders unless the UNet alone was trained. `layer`: part of the names of the UNet's
    layers that are in it."""
    import comfy.utils

    config = _unet_config(kind)
    host = {name.removeprefix("model.diffusion_model."): shape for name, shape in _unet(config).items()}
    names = {ours: host[name] for ours, name in comfy.utils.unet_to_diffusers(config).items() if name in host}
    layers = {
        f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}": shape
        for name, shape in names.items()
        if layer in name and name.endswith(".weight") and len(shape) > 1
    }
    towers = {"lora_te_": (768, 12)} if kind == "sd15" else {"lora_te1_": (768, 12), "lora_te2_": (1280, 32)}
    for prefix, (width, depth) in towers.items() if with_text else ():
        for i in range(depth):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                layers[f"{prefix}text_model_encoder_layers_{i}_self_attn_{part}"] = torch.Size((width, width))
    generator, state = torch.Generator().manual_seed(seed), {}
    for name, shape in layers.items():
        ones = (1,) * (len(shape) - 2)
        state[f"{name}.lora_up.weight"] = torch.randn(shape[0], rank, *ones, generator=generator).half() * 0.01
        state[f"{name}.lora_down.weight"] = torch.randn(rank, shape[1], *ones, generator=generator).half() * 0.05
        state[f"{name}.alpha"] = torch.tensor(float(rank)).half()
    return state


def fastcomposer_shapes() -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Names, shapes and dtypes of the tensors in FastComposer's published pytorch_model.bin."""
    from conceptloom.encoders.fuser import Fuser
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    full, half = torch.float32, torch.bfloat16
    found = {f"unet.{name}": (shape, full) for name, shape in _diffusers_unet().items()}
    text = {name.removeprefix("text_model."): shape for name, shape in _clip_l("").items()}
    found |= {f"text_encoder.{name}": (shape, half) for name, shape in text.items()}
    found["text_encoder.embeddings.position_ids"] = (torch.Size((1, 77)), torch.int64)
    config = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768, "image_size": 224,
    }  # fmt: skip
    with torch.device("meta"):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**config)).state_dict()
        fuser = Fuser(768, 768).state_dict()
    trained = ("layers.22.", "layers.23.")
    for name, tensor in vision.items():
        if name.endswith("position_ids"):
            continue
        found[f"image_encoder.{name}"] = (tensor.shape, full if any(t in name for t in trained) else half)
    found["image_encoder.vision_model.embeddings.position_ids"] = (torch.Size((1, 257)), torch.int64)
    found |= {f"postfuse_module.{name}": (tensor.shape, full) for name, tensor in fuser.items()}
    return found | {f"vae.{name}": (shape, half) for name, shape in _diffusers_autoencoder().items()}


def _diffusers_unet() -> dict[str, torch.Size]:
    """SD 1.5's UNet under diffusers' names."""
    import comfy.utils

    config = _unet_config("sd15")
    shapes = {name.removeprefix("model.diffusion_model."): shape for name, shape in _unet(config).items()}
    return {ours: shapes[host] for ours, host in comfy.utils.unet_to_diffusers(config).items() if host in shapes}


def _diffusers_autoencoder() -> dict[str, torch.Size]:
    """SD 1.5's autoencoder under the names of diffusers 0.16, which had other names for its attention layers."""
    from diffusers import AutoencoderKL

    blocks = 4
    with torch.device("meta"):
        model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
        )
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    shapes = {}
    for name, tensor in model.state_dict().items():
        for new, former in old.items():
            name = name.replace(f".{new}.", f".{former}.")
        shapes[name] = tensor.shape
    return shapes


def fastcomposer_state() -> dict[str, torch.Tensor]:
    """The published file's layout with random values. All tensors of a dtype are views of one block, which keeps file
    and memory small."""
    shapes = fastcomposer_shapes()
    size = max(shape.numel() for shape, _ in shapes.values()) + 1000
    block = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.02
    blocks = {torch.float32: block, torch.bfloat16: block.bfloat16()}
    state = {}
    for i, (name, (shape, dtype)) in enumerate(shapes.items()):
        if dtype == torch.int64:
            state[name] = torch.arange(shape.numel()).view(shape)
        elif "norm" in name and name.endswith("weight"):
            state[name] = torch.ones(shape, dtype=dtype)
        else:
            state[name] = blocks[dtype][i % 1000 :][: shape.numel()].view(shape)
    return state
