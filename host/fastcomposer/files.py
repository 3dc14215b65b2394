"""FastComposer's weights as ComfyUI's MODEL, CLIP, CLIP_VISION and VAE, and their conversion to smaller files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import save_file

from ...encoders.adapter_names import grouped
from ...encoders.adapters import Adapter
from ...encoders.fastcomposer import FUSER, LORA, TEXT, UNET, VAE, VISION, State, split, trained_layers
from ...encoders.files import checked_folder, checked_name, whole_file
from ...encoders.fuser import Fuser
from ...encoders.lora import factor
from ..model.families import family_of, network_of
from ..model.files import load_state
from ..model.patching import unload_compiled
from ..model.sites import CROSS
from ..weaver.weights import DIFFUSION_MODEL, adapters_by_weight, host_patch, key_patches, named_layers, unpatched
from . import delay

AS_LORA, AS_FILE, WITHOUT = "LoRA", "file", "none"
UNET_FORMS = (AS_LORA, AS_FILE, WITHOUT)

_ROUNDING = 1e-2


@dataclass(frozen=True, eq=False)
class LoadedFuser:
    """A fuser in a model patcher, so that ComfyUI manages its memory.

    Attributes:
        patcher: contains the `Fuser`.
        tower: fingerprint of the vision tower that it was trained with; None if the file does not contain the tower.
    """

    patcher: Any
    tower: torch.Tensor | None

    @property
    def module(self) -> Fuser:
        """The fuser module."""
        return self.patcher.model


@dataclass(frozen=True, eq=False)
class Parts:
    """The models from a file, or else the user's own; None for a model that is in neither."""

    model: Any
    clip: Any
    clip_vision: Any
    vae: Any
    fuser: LoadedFuser | None


def load(path: str, model=None, clip=None, clip_vision=None, embedding_directory: Sequence[str] | None = None) -> Parts:
    """Loads all models in a file, and passes the given models through for those that the file lacks.

    A LoRA and single vision layers in the file are applied to copies of the given models. The MODEL works with delayed
    conditionings.

    Raises:
        ValueError: the file is not a FastComposer file, or it needs a given model that is missing or of another kind.
    """
    parts = split(load_state(path))
    if parts[UNET]:
        model = _unet(parts[UNET])
        # ComfyUI loads a second copy with this for what dynamic memory does not support.
        model.cached_patcher_init = (load_unet, (path,))
    if parts[LORA]:
        model = _with_lora(model, parts[LORA])
    if parts[TEXT]:
        clip = _text(parts[TEXT], embedding_directory)
        clip.patcher.cached_patcher_init = (load_text_patcher, (path, embedding_directory))
    fuser_tower = None
    if parts[VISION]:
        clip_vision = _vision(parts[VISION], clip_vision)
        fuser_tower = tower_fingerprint(clip_vision)
    vae = comfy.sd.VAE(sd=parts[VAE]) if parts[VAE] else None
    fuser = wrap_fuser(parts[FUSER], fuser_tower) if parts[FUSER] else None
    return Parts(None if model is None else delay.prepared(model), clip, clip_vision, vae, fuser)


def load_unet(path: str, disable_dynamic: bool = False):
    """Loads the UNet of a file as a MODEL."""
    return _unet(split(load_state(path))[UNET], disable_dynamic)


def load_text_patcher(path: str, embedding_directory: Sequence[str] | None, disable_dynamic: bool = False):
    """Loads the text encoder of a file, and returns the patcher of its CLIP."""
    state = split(load_state(path))[TEXT]
    return _text(state, embedding_directory, disable_dynamic).patcher


def _unet(state: State, disable_dynamic: bool = False):
    model = comfy.sd.load_diffusion_model_state_dict(dict(state), disable_dynamic=disable_dynamic)
    if model is None:
        raise ValueError("file: expected the UNet of a Stable Diffusion model under unet., got another network")
    return model


def _text(state: State, embedding_directory: Sequence[str] | None, disable_dynamic: bool = False):
    return comfy.sd.load_text_encoder_state_dicts(
        [{f"text_model.{key}": tensor for key, tensor in state.items()}],
        embedding_directory=embedding_directory,
        clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION,
        disable_dynamic=disable_dynamic,
    )


def _with_lora(model, state: dict[str, torch.Tensor]):
    if model is None:
        raise ValueError("model: expected the base model, for the file holds a LoRA for it")
    groups, rest = grouped(state)
    if rest:
        raise ValueError(f"file: expected tensors that can all be used, got {next(iter(rest))!r}")
    layers, own = named_layers(model), key_patches(model, DIFFUSION_MODEL)
    changes: dict[str, Adapter] = {}
    for layer, group in groups.items():
        changes |= adapters_by_weight(Adapter(group), layers.get(layer.name, layer.name))
    if not set(changes) <= set(own):
        raise ValueError("model: expected the base model that the file's LoRA was made for, got one of other layers")
    patches = {key: host_patch(change, own, key) for key, change in changes.items()}
    patched = model.clone()
    patched.add_patches({key: patch for key, patch in patches.items() if patch is not None})
    return patched


def _vision(state: dict[str, torch.Tensor], base):
    if "vision_model.embeddings.class_embedding" in state:
        tower = comfy.clip_vision.load_clipvision_from_sd(dict(state))
        if tower is None:
            raise ValueError("file: expected a CLIP vision tower under image_encoder., got another network")
        return tower
    if base is None:
        raise ValueError("clip_vision: expected the vision tower whose last layers the file replaces, got none")
    own = base.get_sd()
    foreign = [key for key, tensor in state.items() if key not in own or own[key].shape != tensor.shape]
    if foreign:
        raise ValueError(
            f"clip_vision: expected the vision tower whose last layers the file replaces, got one without {foreign[0]}"
        )
    tower = comfy.clip_vision.ClipVisionModel(base.config)
    tower.load_sd({**own, **state})
    return tower


def wrap_fuser(state: State, tower: torch.Tensor | None) -> LoadedFuser:
    """Builds a fuser from its weights.

    Args:
        state: the weights.
        tower: fingerprint of its vision tower, or None if that is not known.

    Raises:
        ValueError: the weights are not a fuser's.
    """
    try:
        module = Fuser.from_state(state)
    except ValueError as error:
        raise ValueError(f"file: {error}") from error
    patcher = comfy.model_patcher.CoreModelPatcher(
        module,
        load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
    return LoadedFuser(patcher, tower)


def tower_fingerprint(clip_vision) -> torch.Tensor:
    """A row (C,) of the vision tower's last layer, float, on the CPU. FastComposer has trained this layer, so that it
    differs from other towers' layers."""
    state = clip_vision.get_sd()
    last = max(
        (key for key in state if key.endswith("mlp.fc2.weight") and ".layers." in key),
        key=lambda key: int(key.split(".layers.")[1].split(".")[0]),
    )
    return state[last][0].float().cpu()


def same_tower(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fingerprints belong to the same tower, up to rounding to half precision."""
    return a.shape == b.shape and bool((a - b).norm() <= _ROUNDING * b.norm())


def convert(path: str, folder: Path, name: str, unet: str, rank: int = 64, model=None) -> str:
    """Converts a FastComposer checkpoint to safetensors, and returns a report of the files.

    `folder`/fastcomposer/`name`.safetensors contains the fuser and the vision layers that were trained (the last two).
    With AS_LORA it also contains the UNet's difference to `model`: low-rank factors of its matrices, and everything
    else in full. With AS_FILE the UNet is written to `folder`/diffusion_models/`name`.safetensors, for ComfyUI's Load
    Diffusion Model.

    Args:
        path: the checkpoint.
        folder: where the files go.
        name: name of the files, without extension.
        unet: one of UNET_FORMS.
        rank: rank of the low-rank factors.
        model: MODEL to which the UNet's difference is computed; needed for AS_LORA.

    Raises:
        ValueError: the checkpoint lacks the fuser or the UNet, a file of this name exists or cannot be written, or
            `model` is needed and is missing, patched or has other layers.
    """
    name = checked_name(name)
    parts = split(load_state(path))
    if not parts[FUSER]:
        raise ValueError("file: expected a FastComposer checkpoint, got a file without postfuse_module")
    if unet != WITHOUT and not parts[UNET]:
        raise ValueError(f"file: expected a checkpoint with a UNet for unet: {unet}, got one without")
    small = {FUSER + key: tensor for key, tensor in parts[FUSER].items()}
    small |= {VISION + key: tensor for key, tensor in trained_layers(parts[VISION]).items()}
    files = {folder / "fastcomposer" / f"{name}.safetensors": small}
    if unet == AS_FILE:
        files[folder / "diffusion_models" / f"{name}.safetensors"] = parts[UNET]
    existing = next((file for file in files if file.exists()), None)
    if existing:
        raise ValueError(f"filename: expected a name that is free, got that of {existing.name}, which exists already")
    for file in files:
        checked_folder(file.parent)
    if unet == AS_LORA:
        if model is None:
            raise ValueError("model: expected Stable Diffusion 1.5, to which the LoRA is the difference, got none")
        if model.patches:
            raise ValueError("model: expected an unchanged Stable Diffusion 1.5, got one with LoRAs on it")
        small |= _difference(parts[UNET], model, rank)
    lines = []
    for file, state in files.items():
        with whole_file(file) as part:
            save_file({key: tensor.clone() for key, tensor in state.items()}, part)
        lines.append(f"{file.parent.name}/{file.name}: {len(state)} tensors, {file.stat().st_size / 2**20:.0f} MiB")
    return "\n".join(lines)


def _difference(state: dict[str, torch.Tensor], model, rank: int) -> dict[str, torch.Tensor]:
    """The difference of a UNet to a MODEL, as a LoRA with names that every LoRA loader reads."""
    names = family_of(network_of(model.model, CROSS)).diffusers_names(model.model)
    unload_compiled(model)
    # Not the weights as they are now: those of another clone with LoRAs may be loaded.
    own = key_patches(model, DIFFUSION_MODEL)
    lora = {}
    progress = comfy.utils.ProgressBar(len(state))
    for key, tensor in state.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        base = f"diffusion_model.{names.get(key)}"
        if base not in own or own[base][0][0].shape != tensor.shape:
            raise ValueError(
                f"model: expected the Stable Diffusion 1.5 that the file was trained from, got one with another {key}"
            )
        difference = tensor.float() - unpatched(own, base)
        name = f"diffusion_model.{names[key].removesuffix('.weight').removesuffix('.bias')}"
        if difference.any():
            if tensor.ndim >= 2:
                up, down = factor(difference, rank)
                lora |= {f"{name}.lora_up.weight": up.half(), f"{name}.lora_down.weight": down.half()}
            else:
                lora[f"{name}.{'diff_b' if key.endswith('.bias') else 'diff'}"] = difference.half()
        progress.update(1)
    return lora
