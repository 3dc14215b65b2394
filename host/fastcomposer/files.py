"""FastComposer's weights as the host's MODEL, CLIP, CLIP_VISION and VAE, and smaller files made of them."""

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
from ..weaver.weights import DIFFUSION_MODEL, adapters_by_weight, host_patch, named_layers
from . import delay

AS_LORA, AS_FILE, WITHOUT = "LoRA", "file", "none"
UNET_FORMS = (AS_LORA, AS_FILE, WITHOUT)

_ROUNDING = 1e-2


@dataclass(frozen=True, eq=False)
class LoadedFuser:
    """A fuser in its patcher, so that the host places and frees it.

    Attributes:
        patcher: holds the `Fuser`.
        tower: fingerprint of the vision tower it was trained with; None if the file says nothing of it.
    """

    patcher: Any
    tower: torch.Tensor | None

    @property
    def module(self) -> Fuser:
        """The fuser itself."""
        return self.patcher.model


@dataclass(frozen=True, eq=False)
class Parts:
    """What a file and the user's own models give together; None where neither has it."""

    model: Any
    clip: Any
    clip_vision: Any
    vae: Any
    fuser: LoadedFuser | None


def load(path: str, model=None, clip=None, clip_vision=None, embedding_directory: Sequence[str] | None = None) -> Parts:
    """Everything a file holds, and the given models for what it does not; a LoRA and single vision layers in the file
    are put into copies of the given models. The MODEL is ready for delayed conditionings.

    Raises:
        ValueError: the file is no FastComposer's, or holds something that wants a model which is not given or is of
            another kind.
    """
    parts = split(load_state(path))
    if parts[UNET]:
        model = _unet(parts[UNET])
        # The host makes a second, fully loaded model by this for what its dynamic memory cannot do.
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
    """The MODEL of a file that holds a UNet."""
    return _unet(split(load_state(path))[UNET], disable_dynamic)


def load_text_patcher(path: str, embedding_directory: Sequence[str] | None, disable_dynamic: bool = False):
    """The patcher of the CLIP of a file that holds a text encoder."""
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
    layers, own = named_layers(model), model.get_key_patches(DIFFUSION_MODEL)
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
    """A fuser from its weights, with the fingerprint of its vision tower if that is known.

    Raises:
        ValueError: they are not a fuser's.
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
    """A row of a vision tower's last layer, which FastComposer has trained and a stock tower has not."""
    state = clip_vision.get_sd()
    last = max(
        (key for key in state if key.endswith("mlp.fc2.weight") and ".layers." in key),
        key=lambda key: int(key.split(".layers.")[1].split(".")[0]),
    )
    return state[last][0].float().cpu()


def same_tower(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two fingerprints are one tower's, kept in whatever half precision."""
    return a.shape == b.shape and bool((a - b).norm() <= _ROUNDING * b.norm())


def convert(path: str, folder: Path, name: str, unet: str, rank: int = 64, model=None) -> str:
    """Writes a FastComposer checkpoint as safetensors and returns a report of the files.

    `folder`/fastcomposer/`name`.safetensors gets the fuser and the vision layers that were trained (the last two), and
    with AS_LORA the UNet's difference to `model`: low-rank factors of its matrices, everything else in full. With
    AS_FILE the UNet becomes `folder`/diffusion_models/`name`.safetensors, for the host's Load Diffusion Model.

    Raises:
        ValueError: the checkpoint lacks the fuser or the UNet, a file of the name exists or cannot be written, or
            `model` is needed and is absent, patched or of other layers.
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
    """A UNet's difference to a MODEL as a LoRA with the names that every LoRA loader reads."""
    names = family_of(network_of(model.model, CROSS)).diffusers_names(model.model)
    unload_compiled(model)
    own = model.model_state_dict(DIFFUSION_MODEL)
    lora = {}
    progress = comfy.utils.ProgressBar(len(state))
    for key, tensor in state.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        base = own.get(f"diffusion_model.{names.get(key)}")
        if base is None or base.shape != tensor.shape:
            raise ValueError(
                f"model: expected the Stable Diffusion 1.5 that the file was trained from, got one with another {key}"
            )
        difference = tensor.float() - base.float().cpu()
        name = f"diffusion_model.{names[key].removesuffix('.weight').removesuffix('.bias')}"
        if difference.any():
            if tensor.ndim >= 2:
                up, down = factor(difference, rank)
                lora |= {f"{name}.lora_up.weight": up.half(), f"{name}.lora_down.weight": down.half()}
            else:
                lora[f"{name}.{'diff_b' if key.endswith('.bias') else 'diff'}"] = difference.half()
        progress.update(1)
    return lora
