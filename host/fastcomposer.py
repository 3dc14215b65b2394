"""FastComposer in the host: its weights as MODEL, CLIP, CLIP_VISION and VAE, subjects encoded, prompts fused.

Xiao et al., "FastComposer: Tuning-Free Multi-Subject Image Generation with Localized Attention" (arXiv 2305.10431).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import save_file

from ..attention.subject import Subject
from ..encoders.fuser import Fuser, fuse_rows
from ..encoders.lora import factor
from ..encoders.reference import KEEP, prepare_reference
from .placeholders import MARK, find_subjects, locate, without_emphasis

log = logging.getLogger("conceptloom")

ENCODING = "fastcomposer"
SEPARATE, AVERAGED = "each is a subject", "all show one subject"
UNET, TEXT, VISION, FUSER, VAE = "unet.", "text_encoder.", "image_encoder.", "postfuse_module.", "vae."
LORA = ("lora_unet_", "diffusion_model.")
AS_LORA, AS_FILE, WITHOUT = "LoRA", "file", "none"
UNET_FORMS = (AS_LORA, AS_FILE, WITHOUT)

_FINGERPRINT = 16  # numbers of the last layer that tell one vision tower from another
_ROUNDING = 2e-3  # between towers kept in different half precisions


@dataclass(frozen=True, eq=False)
class LoadedFuser:
    """A fuser in its patcher, so that the host places and frees it.

    Attributes:
        patcher: holds the `Fuser`.
        tower: fingerprint of the vision tower it was trained with; None if the file did not hold it.
    """

    patcher: Any
    tower: torch.Tensor | None

    @property
    def module(self) -> Fuser:
        """The fuser itself."""
        return self.patcher.model


@dataclass(frozen=True, eq=False)
class Embedding:
    """What the subject encoder made of a subject.

    Attributes:
        vector: (E,), of its picture or the mean of several.
        tower: fingerprint of the vision tower.
    """

    vector: torch.Tensor
    tower: torch.Tensor


@dataclass(frozen=True, eq=False)
class Parts:
    """What a file and the user's own models give together; None where neither has it."""

    model: Any
    clip: Any
    clip_vision: Any
    vae: Any
    fuser: LoadedFuser | None


def split(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a FastComposer file by part, without the part's prefix: UNET, TEXT, VISION, FUSER, VAE, "lora".

    A LoRA keeps its names. The published file's position ids are left out: they are constants.

    Raises:
        ValueError: a tensor belongs to no part.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in (UNET, TEXT, VISION, FUSER, VAE, "lora")}
    for key, tensor in state.items():
        if key.endswith("position_ids"):
            continue
        prefix = next((p for p in (UNET, TEXT, VISION, FUSER, VAE) if key.startswith(p)), None)
        if prefix is not None:
            parts[prefix][key.removeprefix(prefix)] = tensor
        elif key.startswith(LORA):
            parts["lora"][key] = tensor
        else:
            raise ValueError(f"file: a FastComposer checkpoint or a part of one is wanted, not one with {key!r}")
    if not any(parts.values()):
        raise ValueError("file: a FastComposer checkpoint or a part of one is wanted, but it is empty")
    return parts


def load(path: str, model=None, clip=None, clip_vision=None, embedding_directory=None) -> Parts:
    """Everything a file holds, and the given models for what it does not; a LoRA and single vision layers in the file
    are put into copies of the given models.

    Raises:
        ValueError: the file is no FastComposer's, or holds something that wants a model which is not given or is of
            another kind.
    """
    parts = split(comfy.utils.load_torch_file(path, safe_load=True))
    if parts[UNET]:
        model = comfy.sd.load_diffusion_model_state_dict(parts[UNET])
        if model is None:
            raise ValueError("file: the UNet of a Stable Diffusion model is wanted under unet., not another network")
    if parts["lora"]:
        model = _with_lora(model, parts["lora"])
    if parts[TEXT]:
        state = {f"text_model.{key}": tensor for key, tensor in parts[TEXT].items()}
        clip = comfy.sd.load_text_encoder_state_dicts(
            [state], embedding_directory=embedding_directory, clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION
        )
    if parts[VISION]:
        clip_vision = _vision(parts[VISION], clip_vision)
    vae = comfy.sd.VAE(sd=parts[VAE]) if parts[VAE] else None
    fuser = _fuser(parts[FUSER], clip_vision) if parts[FUSER] else None
    return Parts(model, clip, clip_vision, vae, fuser)


def convert(path: str, target: Path, unet: str, rank: int = 64, model=None) -> str:
    """Writes a FastComposer checkpoint as safetensors and returns a report of the files.

    `target`.safetensors gets the fuser and the vision layers that were trained (the last two), and with AS_LORA the
    UNet's difference to `model`: low-rank factors of its matrices, everything else in full. With AS_FILE the UNet
    becomes `target`_unet.safetensors, for the host's Load Diffusion Model.

    Raises:
        ValueError: the checkpoint lacks the fuser or the UNet, or `model` is wanted and absent or of other layers.
    """
    parts = split(comfy.utils.load_torch_file(path, safe_load=True))
    if not parts[FUSER]:
        raise ValueError("file: a FastComposer checkpoint is wanted, but this file has no postfuse_module")
    if unet != WITHOUT and not parts[UNET]:
        raise ValueError(f"file: a checkpoint with a UNet is wanted for unet: {unet}, but this file has none")
    small = {FUSER + key: tensor for key, tensor in parts[FUSER].items()}
    small |= {VISION + key: tensor for key, tensor in _trained_layers(parts[VISION]).items()}
    files = {target.with_name(f"{target.name}.safetensors"): small}
    if unet == AS_FILE:
        files[target.with_name(f"{target.name}_unet.safetensors")] = parts[UNET]
    existing = next((file for file in files if file.exists()), None)
    if existing:
        raise ValueError(f"filename: a name that is free is wanted, but {existing.name} exists already")
    if unet == AS_LORA:
        if model is None:
            raise ValueError("model: Stable Diffusion 1.5 is wanted, to which the LoRA is the difference")
        small |= _difference(parts[UNET], model, rank)
    target.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for file, state in files.items():
        # Under another name first: an interruption leaves no half file that looks whole.
        part = file.with_suffix(".part")
        save_file({key: tensor.clone() for key, tensor in state.items()}, part)
        part.replace(file)
        lines.append(f"{file.name}: {len(state)} tensors, {file.stat().st_size / 2**20:.0f} MiB")
    return "\n".join(lines)


def _trained_layers(vision: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """FastComposer trains the last two layers of the vision tower."""
    number = {key: int(key.split(".layers.")[1].split(".")[0]) for key in vision if ".layers." in key}
    last = max(number.values(), default=0)
    return {key: vision[key] for key, layer in number.items() if layer >= last - 1}


def _difference(state: dict[str, torch.Tensor], model, rank: int) -> dict[str, torch.Tensor]:
    """A UNet's difference to a MODEL as a LoRA with the names that every LoRA loader reads."""
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    own = model.model_state_dict("diffusion_model.")
    lora = {}
    progress = comfy.utils.ProgressBar(len(state))
    for key, tensor in state.items():
        comfy.model_management.throw_exception_if_processing_interrupted()
        base = own.get(f"diffusion_model.{names.get(key)}")
        if base is None or base.shape != tensor.shape:
            raise ValueError(f"model: the Stable Diffusion 1.5 that the file was trained from is wanted: {key} differs")
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


def _with_lora(model, state: dict[str, torch.Tensor]):
    if model is None:
        raise ValueError("model: the base model is wanted, for the file holds a LoRA for it")
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(state), names)
    patched = model.clone()
    if not patches or set(patched.add_patches(patches)) != set(patches):
        raise ValueError("model: the base model that the file's LoRA was made for is wanted, not one of other layers")
    return patched


def _vision(state: dict[str, torch.Tensor], base):
    if "vision_model.embeddings.class_embedding" in state:
        tower = comfy.clip_vision.load_clipvision_from_sd(dict(state))
        if tower is None:
            raise ValueError("file: a CLIP vision tower is wanted under image_encoder., not another network")
        return tower
    if base is None:
        raise ValueError("clip_vision: the vision tower is wanted whose last layers the file replaces")
    own = base.get_sd()
    foreign = [key for key, tensor in state.items() if key not in own or own[key].shape != tensor.shape]
    if foreign:
        raise ValueError(
            f"clip_vision: the vision tower is wanted whose last layers the file replaces, not one without {foreign[0]}"
        )
    tower = comfy.clip_vision.ClipVisionModel(base.config)
    tower.load_sd({**own, **state})
    return tower


def _fuser(state: dict[str, torch.Tensor], clip_vision) -> LoadedFuser:
    try:
        module = Fuser.from_state(state)
    except ValueError as error:
        raise ValueError(f"file: {error}") from error
    patcher = comfy.model_patcher.CoreModelPatcher(
        module,
        load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )
    return LoadedFuser(patcher, None if clip_vision is None else fingerprint(clip_vision))


def fingerprint(clip_vision) -> torch.Tensor:
    """Some numbers of a vision tower's last layer, which FastComposer has trained and a stock tower has not."""
    state = clip_vision.get_sd()
    last = max(
        (key for key in state if key.endswith("mlp.fc2.weight") and ".layers." in key),
        key=lambda key: int(key.split(".layers.")[1].split(".")[0]),
    )
    return state[last].flatten()[:_FINGERPRINT].float().cpu()


def encode_subjects(
    clip_vision, subjects: Sequence[Subject], background: str = KEEP, crop: bool = False, pictures: str = SEPARATE
) -> tuple[Subject, ...]:
    """The subjects with their embeddings.

    Args:
        clip_vision: the host's CLIP vision tower.
        subjects: each with one picture.
        background, crop: see `encoders.reference.prepare_reference`; for subjects that have a mask.
        pictures: SEPARATE, or AVERAGED if all are photos of one subject: then one comes back, the first, with the mean
            of the embeddings.

    Raises:
        ValueError: there is no subject, or the tower has no projection as CLIP's has.
    """
    if not subjects:
        raise ValueError("subjects: at least one subject is wanted, not none")
    if clip_vision.model_type != "clip_vision_model" or "projection_dim" not in clip_vision.config:
        raise ValueError(f"clip_vision: a CLIP vision tower is wanted, not {clip_vision.model_type}")
    side = clip_vision.image_size
    pictures_seen = torch.stack([prepare_reference(s.image, s.mask, side, background, crop) for s in subjects])
    vectors = clip_vision.encode_image(pictures_seen).image_embeds.float()
    tower = fingerprint(clip_vision)
    if pictures == AVERAGED:
        subjects, vectors = subjects[:1], vectors.mean(0, keepdim=True)
    return tuple(s.with_encoding(ENCODING, Embedding(v, tower)) for s, v in zip(subjects, vectors, strict=True))


def fuse(
    clip, fuser: LoadedFuser, prompt: str, subjects: Sequence[Subject], mark: str = MARK, strength: float = 1.0
) -> tuple[list, list, str]:
    """The prompt's conditioning without and with the subjects, and a report of the token each one landed on.

    Both differ in the subjects' rows alone. A subject of weight 0 stays text.

    Raises:
        ValueError: a subject has no embedding, widths do not fit, the CLIP skips layers, or a place cannot be found.
    """
    embeddings = _embeddings_of(subjects, fuser)
    if clip.layer_idx not in (None, -1):
        raise ValueError(f"clip: its last layer is wanted, as in training, not layer {clip.layer_idx} (CLIP skip)")
    plain, ends = find_subjects(prompt, [subject.noun for subject in subjects], mark)
    tokens, places = locate(clip, plain, ends)
    report = "\n".join(
        f"{number}. {subject.noun}: token {place.row} {place.word!r}" + ("" if subject.weight else ", off (weight 0)")
        for number, (subject, place) in enumerate(zip(subjects, places, strict=True), 1)
    )
    text_only = clip.encode_from_tokens_scheduled(tokens)
    width = text_only[0][0].shape[-1]
    if width != fuser.module.text_width:
        raise ValueError(
            f"fuser: one for text states of width {width} is wanted for this CLIP, not {fuser.module.text_width}"
        )
    active = [i for i, subject in enumerate(subjects) if subject.weight]
    if not active or strength == 0:
        return text_only, [[rows, dict(extras)] for rows, extras in text_only], report
    active_places = [places[i] for i in active]
    emphasis = torch.tensor([place.weight for place in active_places])
    unweighted, neutral = text_only, None
    if (emphasis != 1).any():
        unweighted = clip.encode_from_tokens_scheduled(without_emphasis(tokens, active_places))
        neutral = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    rows = torch.tensor([place.row for place in active_places])
    indices = torch.tensor([place.index for place in active_places])
    comfy.model_management.load_model_gpu(fuser.patcher)
    device = fuser.patcher.load_device
    fused = []
    for entry, (states, extras) in enumerate(text_only):
        weighting = {}
        if neutral is not None:
            weighting = {"emphasis": emphasis.to(device), "neutral": neutral[entry][0][0, indices].to(device)}
        new = fuse_rows(
            fuser.module,
            unweighted[entry][0][0, rows].to(device),
            embeddings[active].to(device),
            strength,
            **weighting,
        )
        # A copy: the host caches the text alone, which must not change.
        states = states.clone()
        states[:, rows] = new.to(states)
        fused.append([states, dict(extras)])
    return text_only, fused, report


def _embeddings_of(subjects: Sequence[Subject], fuser: LoadedFuser) -> torch.Tensor:
    """(n, E) of all subjects; says in the log when a vision tower is not the fuser's."""
    if not subjects:
        raise ValueError("subjects: at least one subject is wanted, not none")
    found: list[Embedding] = []
    for number, subject in enumerate(subjects, 1):
        embedding = subject.encodings.get(ENCODING)
        if embedding is None:
            raise ValueError(
                f"subjects: subjects from Subject Encoder (FastComposer) are wanted, but subject {number} "
                f"({subject.noun}) has no embedding"
            )
        if len(embedding.vector) != fuser.module.image_width:
            raise ValueError(
                f"fuser: one for embeddings of width {len(embedding.vector)} is wanted for this CLIP_VISION, not "
                f"{fuser.module.image_width}"
            )
        found.append(embedding)
    if fuser.tower is not None and any(
        e.tower.shape != fuser.tower.shape or not torch.allclose(e.tower, fuser.tower, atol=_ROUNDING) for e in found
    ):
        log.warning(
            "FastComposer: the subjects were encoded by another vision tower than the fuser's own, which weakens their "
            "likeness: take CLIP_VISION from Load FastComposer."
        )
    return torch.stack([e.vector for e in found])
