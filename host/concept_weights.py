"""From a concept's file to differences of a MODEL's own weights.

Whole weights, factors and adapters all become patches of the host, by the host's own reader where it has one, and a
difference is what a patch makes of the unpatched weight: delta = W' - W. Factors stay factors.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.model_management
import comfy.utils
import torch
from comfy.weight_adapter.base import WeightAdapterBase
from comfy.weight_adapter.lora import LoRAAdapter

from ..encoders.concept_formats import LORA, ConceptFile
from ..encoders.concepts import PARTS, Concept, Delta, Key, architecture, fingerprint, layer_name
from .advice import advise
from .sites import CROSS, family_of

UNET = "diffusion_model."
_TEXT_LORA = ("lora_te", "text_encoder")
# Networks of one architecture that share no training differ by more than their own size; a difference is far smaller.
_MOST_CHANGE, _LIKE_SIZE = 1.0, (0.5, 2.0)


@dataclass(frozen=True)
class Weights:
    """The weights of a model before all patches, and the linear layers of its cross-attention.

    Attributes:
        patches: the host's key patches, whose first entry is the weight itself.
        layers: site's key and part by the layer's name.
    """

    patches: Mapping[str, list]
    layers: Mapping[str, tuple[Key, str]]

    @classmethod
    def of(cls, model) -> Weights:
        """Those of a MODEL.

        Raises:
            ValueError: it is of no family with cross-attention.
        """
        unet = model.model.diffusion_model
        keys = [site.key for site in family_of(unet).sites(unet) if site.kind == CROSS]
        layers = {f"{UNET}{layer_name(key)}.{tail}": (key, part) for key in keys for part, tail in PARTS.items()}
        patches = model.get_key_patches(UNET)
        if not layers or any(f"{layer}.weight" not in patches for layer in layers):
            raise ValueError("model: one with cross-attention in every block that attends is wanted, such as SD 1.5")
        return cls(patches, layers)

    def __contains__(self, key: str) -> bool:
        return key in self.patches

    def __getitem__(self, key: str) -> torch.Tensor:
        """A copy of a weight in float on the CPU."""
        return unpatched(self.patches, key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a weight."""
        return tuple(self.patches[key][0][0].shape)

    @property
    def text_width(self) -> int:
        """Of the text states that cross-attention reads."""
        return next(self.shape(f"{layer}.weight")[1] for layer, (_, part) in self.layers.items() if part == "k")

    def fingerprint(self) -> str:
        """See `encoders.concepts.fingerprint`."""
        return fingerprint(self[f"{next(iter(self.layers))}.weight"])


def unpatched(patches: Mapping[str, list], key: str) -> torch.Tensor:
    """A copy of a weight as it is before all patches, from the host's key patches; float, on the CPU."""
    weight, convert = patches[key][0]
    copy = comfy.model_management.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
    return convert(copy, inplace=True)


def difference(patch: Any, base: torch.Tensor, key: str) -> tuple[torch.Tensor, ...]:
    """What a patch of the host adds to a weight: (out, in), or the factors of a plain LoRA.

    Raises:
        ValueError: its shape is another's, which the host would only log.
    """
    if isinstance(patch, LoRAAdapter) and all(part is None for part in patch.weights[3:]):
        up, down, alpha = patch.weights[:3]
        up, down = up.flatten(1).float().cpu(), down.flatten(1).float().cpu()
        _check_shape((up.shape[0], down.shape[1]), tuple(base.flatten(1).shape), key)
        return (up if alpha is None else up * (alpha / len(down))), down
    if not isinstance(patch, WeightAdapterBase):
        _check_shape(tuple(patch[-1][0].shape), tuple(base.shape), key)
    return (comfy.lora.calculate_weight([(1.0, patch, 1.0, None, None)], base.clone(), key) - base,)


def is_whole(patch: Any) -> bool:
    """Whether a patch of the host puts a weight in place of the model's, which no strength can scale."""
    return isinstance(patch, tuple) and patch[0] == "set"


def lora_patches(state: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The host's patches for a LoRA's tensors, and the tensors for which `names` has no layer."""
    unknown = [key for key in state if not _names_a_layer(key, names)]
    try:
        return comfy.lora.load_lora(dict(state), names, log_missing=False), unknown
    except KeyError as error:
        raise ValueError(f"file: a whole LoRA is wanted, but {error} is not there") from error


def read_weights(file: ConceptFile, model, name: str) -> Concept:
    """A concept without tokens from what a file holds.

    Raises:
        ValueError: the file is for another model, is not whole, or holds numbers that are not finite.
    """
    weights = Weights.of(model)
    patches = _patches(file, model, weights)
    parts: dict[tuple[Key, str], dict[str, tuple[torch.Tensor, ...]]] = {}
    others, sizes, changes = {}, [], []
    for key, patch in patches.items():
        layer, _, kind = key.rpartition(".")
        whole = is_whole(patch)
        if layer not in weights.layers and not whole:
            others[key] = patch
            continue
        base = weights[key]
        found = difference(patch, base, key)
        if layer not in weights.layers:
            if found[0].any():
                others[key] = ("diff", (found[0].half(),))
            continue
        parts.setdefault(weights.layers[layer], {})[kind] = found
        if whole and kind == "weight":
            norm = float(base.norm()) or 1.0
            sizes.append(float((base + found[0]).norm()) / norm)
            changes.append(float(found[0].norm()) / norm)
    _check_base(sizes, changes)
    _check_whole(file, parts, weights)
    deltas: dict[Key, dict[str, Delta]] = {}
    for (key, part), found in parts.items():
        deltas.setdefault(key, {})[part] = _delta(found, f"{layer_name(key)}.{PARTS[part]}", weights)
    text = dict(file.text)
    if spoken := {key: value for key, value in file.lora.items() if key.startswith(_TEXT_LORA)}:
        text["lora"] = spoken
    return Concept(
        name,
        deltas,
        text_patches=text,
        others=others,
        source_format=file.source_format,
        base=weights.fingerprint(),
    )


def check_fit(concept: Concept, model) -> None:
    """Raises ValueError where a concept's deltas are for another architecture than a MODEL's, and warns where they were
    made on another model of the same."""
    weights = Weights.of(model)
    names = {where: layer for layer, where in weights.layers.items()}
    for key, parts in concept.deltas.items():
        for part, delta in parts.items():
            if (key, part) not in names:
                wanted = architecture(weights.text_width)
                raise ValueError(f"file: a concept for {wanted} is wanted, not one with a layer {layer_name(key)}")
            layer = f"{names[key, part]}.weight"
            _check_shape(delta.shape, weights.shape(layer), layer)
    if concept.base and concept.base != weights.fingerprint():
        advise(
            "Load Concept",
            f"the concept {concept.name} was made on another base model of this kind, so it may look different here",
        )


def _patches(file: ConceptFile, model, weights: Weights) -> dict[str, Any]:
    """The host's patches of the diffusion model for what a file holds, by the host's names."""
    if file.lora:
        state = {key: value for key, value in file.lora.items() if not key.startswith(_TEXT_LORA)}
        patches, unknown = lora_patches(state, comfy.lora.model_lora_keys_unet(model.model, {}))
        if not any(key.rpartition(".")[0] in weights.layers for key in patches):
            raise ValueError(
                f"file: a LoRA that changes the cross-attention of {architecture(weights.text_width)} is wanted, but "
                f"none of its {len(file.lora)} tensors does"
            )
        if unknown:
            advise("Load Concept", f"{len(unknown)} tensors are for no layer of this model, such as {unknown[0]}")
        return patches
    if file.text_width != weights.text_width:
        _refuse_width(file.text_width, weights.text_width)
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    patches = {name: ("set", (tensor,)) for name, tensor in file.weights.items()}
    patches |= {name: LoRAAdapter(set(), (*pair, None, None, None, None)) for name, pair in file.factors.items()}
    patches = {UNET + names.get(name, name): patch for name, patch in patches.items()}
    foreign = next((key for key in patches if key not in weights), None)
    if foreign:
        wanted = architecture(weights.text_width)
        raise ValueError(f"file: a concept for {wanted} is wanted, but it has {foreign.removeprefix(UNET)}")
    return patches


def _names_a_layer(key: str, names: Mapping[str, str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:n]).removesuffix("_lora") in names for n in range(1, len(parts) + 1))


def _check_shape(given: tuple[int, ...], wanted: tuple[int, ...], key: str) -> None:
    if given == wanted:
        return
    if key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) and given[0] == wanted[0]:
        _refuse_width(given[1], wanted[1])
    raise ValueError(f"file: the shape {tuple(wanted)} is wanted for {key}, not {tuple(given)}")


def _refuse_width(given: int, wanted: int) -> None:
    raise ValueError(f"file: a concept for {architecture(wanted)} is wanted, not one for {architecture(given)}")


def _check_base(sizes: list[float], changes: list[float]) -> None:
    """Whole weights must be near the model's own; a file of differences, or of another base, is not."""
    if not sizes:
        return
    size, change = statistics.median(sizes), statistics.median(changes)
    if not _LIKE_SIZE[0] <= size <= _LIKE_SIZE[1] or not change <= _MOST_CHANGE:
        raise ValueError(
            f"file: whole weights that were trained from this model are wanted, but these are {size:.2g} times its own "
            f"in size and {change:.2g} times that away from them: the base is another, or they are differences"
        )


def _check_whole(file: ConceptFile, parts: Mapping[tuple[Key, str], Mapping], weights: Weights) -> None:
    """Custom Diffusion trains the keys and values of every layer; a LoRA may leave layers out, but an adapter that the
    host could not apply leaves all of them as they were."""
    if file.source_format != LORA:
        wanted = {where: layer for layer, where in weights.layers.items() if where[1] in ("k", "v")}
        missing = [layer.removeprefix(UNET) for where, layer in wanted.items() if where not in parts]
        if missing:
            raise ValueError(
                f"file: keys and values of all cross-attention layers of {architecture(weights.text_width)} are "
                f"wanted, but {len(missing)} are missing, such as {missing[0]}"
            )
    elif all(len(found) == 1 and not found[0].any() for kinds in parts.values() for found in kinds.values()):
        raise ValueError(
            f"file: a LoRA for {architecture(weights.text_width)} is wanted, but this one changes no weight of "
            "cross-attention: it was never trained, or its shapes are another model's"
        )


def _delta(found: Mapping[str, tuple[torch.Tensor, ...]], name: str, weights: Weights) -> Delta:
    factors, bias = found.get("weight"), found.get("bias")
    if factors is None:
        out, width = weights.shape(f"{UNET}{name}.weight")
        factors = torch.zeros(out, 0), torch.zeros(0, width)
    try:
        return Delta(factors, bias and bias[0])
    except ValueError as error:
        raise ValueError(f"file: {error}, in {name}") from error
