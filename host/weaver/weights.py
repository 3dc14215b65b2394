"""Converts a concept's file to differences of a MODEL's own weights.

A difference is taken to the unpatched weight: delta = W' - W. Factors remain factors. LoRAs are read by
`encoders.adapters`, because ComfyUI's reader silently leaves tensors out and computes some kinds differently from their
trainers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.weight_adapter.lora import LoRAAdapter

from ...encoders.adapter_names import (
    ANYWHERE,
    DIFFUSION,
    Group,
    Layer,
    Named,
    grouped,
    is_numbered,
    layer_of,
    lokr_rank,
    lost_its_scale,
    numbered_names,
    scale_of,
)
from ...encoders.adapters import Adapter
from ...encoders.concept_formats import LORA, ConceptFile
from ...encoders.concepts import PARTS, Concept, Delta, keys_fingerprint
from ..advice import advise
from ..model.families import family_of, network_of
from ..model.patching import unload_compiled
from ..model.sites import CROSS, CrossAttentionFamily

DIFFUSION_MODEL = "diffusion_model."
# Networks that were trained separately differ by more than their own norm. Differences have a small norm.
_MOST_CHANGE, _LIKE_SIZE = 1.0, (0.5, 2.0)


@dataclass(frozen=True)
class Weights:
    """The weights of a model before all patches, and the linear layers of its cross-attention.

    Attributes:
        family: the model's family.
        patches: ComfyUI's key patches, whose first entry is the weight itself.
        layers: site key and part by the layer's name.
    """

    family: CrossAttentionFamily
    patches: Mapping[str, list]
    layers: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, model) -> Weights:
        """The weights of a MODEL.

        Raises:
            ValueError: its family has no cross-attention, or a transformer block lacks it.
        """
        network = network_of(model.model, CROSS)
        family = family_of(network)
        keys = [site.key for site in family.sites(network) if site.kind == CROSS]
        layers = {DIFFUSION_MODEL + family.layer(key, part): (key, part) for key in keys for part in PARTS}
        unload_compiled(model)
        patches = key_patches(model, DIFFUSION_MODEL)
        if not layers or any(f"{layer}.weight" not in patches for layer in layers):
            raise ValueError(
                "model: expected one with cross-attention in every block that attends, such as SD 1.5, got another"
            )
        return cls(family, patches, layers)

    def __contains__(self, key: str) -> bool:
        return key in self.patches

    def __getitem__(self, key: str) -> torch.Tensor:
        """A copy of a weight, float, on the CPU."""
        return unpatched(self.patches, key)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return tuple(self.patches[key][0][0].shape)

    @property
    def text_width(self) -> int:
        """Width of the text states that cross-attention uses."""
        return next(self.shape(f"{layer}.weight")[1] for layer, (_, part) in self.layers.items() if part == "k")

    @property
    def architecture(self) -> str:
        """Name of the models with this text width, for error messages."""
        return self.family.architecture(self.text_width)

    def fingerprint(self) -> str:
        """See `encoders.concepts.keys_fingerprint`."""
        return keys_fingerprint(self[f"{next(iter(self.layers))}.weight"])


def key_patches(patcher, prefix: str = "") -> dict[str, list]:
    """ComfyUI's key patches of a model patcher: of each parameter whose name begins with `prefix` its value before all
    patches with the function that converts it, and the patches.

    ComfyUI's own function fails on quantized layers, which list the scales of a weight that are a part of it.
    """
    with patcher.use_ejected():
        names = [name for name in patcher.model.state_dict() if name.startswith(prefix)]
    found = {}
    for name in names:
        try:
            weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, name)
        except AttributeError:
            continue
        if name in patcher.backup:
            weight = patcher.backup[name].weight
        if name in patcher.hook_backup:
            weight = patcher.hook_backup[name][0]
        found[name] = [(weight, convert or _as_it_is), *patcher.patches.get(name, ())]
    return found


def _as_it_is(weight: torch.Tensor, **_) -> torch.Tensor:
    return weight


def unpatched(patches: Mapping[str, list], key: str) -> torch.Tensor:
    """A copy of a weight before all patches, from ComfyUI's key patches; float, on the CPU."""
    weight, convert = patches[key][0]
    copy = comfy.model_management.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
    return convert(copy, inplace=True)


def difference(change: Any, patches: Mapping[str, list], key: str) -> tuple[torch.Tensor, ...]:
    """What a change adds to the weight or bias `key`: one tensor of its shape, or the two factors of a plain LoRA.

    Args:
        change: an `Adapter`, or a ComfyUI patch ("set", (weight,)) or ("diff", (difference,)).
        patches: ComfyUI's key patches of the model.
        key: name of the weight or bias.

    Raises:
        ValueError: the shapes do not match.
    """
    shape = patches[key][0][0].shape
    if isinstance(change, Adapter):
        if not key.endswith(".bias"):
            # Most need the shape alone, and copies of the weights that they change would be as large as the model.
            return change.weight(unpatched(patches, key) if change.reads_weight else torch.empty(shape, device="meta"))
        change = ("diff", (change.bias(),))
    kind, (tensor,) = change
    if tensor.shape != shape:
        raise ValueError(f"file: expected the shape {tuple(shape)} for {key}, got {tuple(tensor.shape)}")
    tensor = tensor.detach().to("cpu", torch.float32)
    return (tensor - unpatched(patches, key),) if kind == "set" else (tensor,)


def named_layers(model) -> dict[str, str]:
    """Maps every name that files use for a layer of a MODEL, with underscores in place of dots, to ComfyUI's name.

    Raises:
        ValueError: the model's family has no cross-attention.
    """
    diffusers = family_of(network_of(model.model, CROSS)).diffusers_names(model.model)
    keys = [key for key in model.model_state_dict(DIFFUSION_MODEL) if key.endswith(".weight")]
    names = {key.removeprefix(DIFFUSION_MODEL): key for key in keys}
    names |= {name: DIFFUSION_MODEL + key for name, key in diffusers.items() if DIFFUSION_MODEL + key in keys}
    layers = {}
    for name, key in names.items():
        plain, layer = name.removesuffix(".weight").replace(".", "_"), key.removesuffix(".weight")
        layers[plain] = layer
        # diffusers' first attention processors have one output layer, without a number.
        if plain.endswith("_to_out_0"):
            layers[plain.removesuffix("_0")] = layer
    return layers


def is_whole(change: Any) -> bool:
    """Whether a change replaces the model's weight."""
    return isinstance(change, tuple) and change[0] == "set"


def host_patch(change: Any, own: Mapping[str, list], key: str) -> Any:
    """Converts a change to a ComfyUI patch that a strength can scale; None if it changes nothing.

    Args:
        change: see `difference`.
        own: ComfyUI's key patches of the model.
        key: name of the weight or bias.
    """
    changed = difference(change, own, key)
    if not all(factor.any() for factor in changed):
        return None
    return LoRAAdapter(set(), (*changed, None, None, None, None)) if len(changed) == 2 else ("diff", changed)


def adapters_by_weight(adapter: Adapter, layer: str) -> dict[str, Adapter]:
    """An adapter by the names of the weight and the bias that it changes in a layer."""
    found = {f"{layer}.weight": adapter} if adapter.changes_weight else {}
    return found if adapter.bias() is None else found | {f"{layer}.bias": adapter}


def read_weights(file: ConceptFile, model, name: str) -> Concept:
    """Makes a concept without tokens from the contents of a file.

    Raises:
        ValueError: the file is for another model, is incomplete, has tensors for a layer that cannot be used, or
            contains numbers that are not finite.
    """
    weights = Weights.of(model)
    text = dict(file.text)
    if file.lora:
        changes, of_text = _lora_changes(file, model, weights)
        text |= {"lora": of_text} if of_text else {}
    else:
        changes = _changes(file, model, weights)
    parts: dict[tuple[str, str], dict[str, tuple[torch.Tensor, ...]]] = {}
    others, sizes, moves = {}, [], []
    for key, change in changes.items():
        layer, _, kind = key.rpartition(".")
        whole = is_whole(change)
        if layer not in weights.layers and not whole:
            others[key] = change
            continue
        _check_width(_shape_of(change), key, weights)
        found = difference(change, weights.patches, key)
        if layer not in weights.layers:
            if found[0].any():
                others[key] = ("diff", (found[0].half(),))
            continue
        parts.setdefault(weights.layers[layer], {})[kind] = found
        if whole and kind == "weight":
            base = weights[key]
            norm = float(base.norm()) or 1.0
            sizes.append(float((base + found[0]).norm()) / norm)
            moves.append(float(found[0].norm()) / norm)
    _check_base(sizes, moves)
    _check_whole(file, parts, weights)
    deltas: dict[str, dict[str, Delta]] = {}
    for (key, part), found in parts.items():
        deltas.setdefault(key, {})[part] = _delta(found, weights.family.layer(key, part), weights)
    return Concept(
        name,
        deltas,
        text_patches=text,
        others=others,
        source_format=file.source_format,
        base=weights.fingerprint(),
    )


def check_fit(concept: Concept, model) -> None:
    """Checks that a concept's deltas fit a MODEL, and gives advice if they were made on another base model.

    Raises:
        ValueError: the deltas are for another architecture.
    """
    weights = Weights.of(model)
    names = {where: layer for layer, where in weights.layers.items()}
    for key, parts in concept.deltas.items():
        for part, delta in parts.items():
            if (key, part) not in names:
                raise ValueError(
                    f"file: expected a concept for {weights.architecture}, got one with {PARTS[part]} of a layer {key}"
                )
            layer = f"{names[key, part]}.weight"
            _check_width(delta.shape, layer, weights)
            if delta.shape != weights.shape(layer):
                raise ValueError(f"file: expected the shape {weights.shape(layer)} for {layer}, got {delta.shape}")
    if concept.base and concept.base != weights.fingerprint():
        advise(
            "Load Concept",
            f"the concept {concept.name} was made on another base model of this kind, so it may look different here",
        )


def _changes(file: ConceptFile, model, weights: Weights) -> dict[str, Any]:
    """The changes in a Custom Diffusion file, by ComfyUI's weight names."""
    if file.text_width != weights.text_width:
        raise _other_width(file.text_width, weights)
    names = weights.family.diffusers_names(model.model)
    changes: dict[str, Any] = {name: ("set", (tensor,)) for name, tensor in file.weights.items()}
    for name, pair in file.factors.items():
        changes[name] = Adapter({part: Named(name, factor) for part, factor in zip(("up", "down"), pair, strict=True)})
    changes = {DIFFUSION_MODEL + names.get(name, name): change for name, change in changes.items()}
    foreign = next((key for key in changes if key not in weights), None)
    if foreign:
        raise ValueError(
            f"file: expected a concept for {weights.architecture}, got one with {foreign.removeprefix(DIFFUSION_MODEL)}"
        )
    return changes


def _lora_changes(file: ConceptFile, model, weights: Weights) -> tuple[dict[str, Adapter], dict[Layer, Adapter]]:
    """A LoRA's changes to the diffusion model, by ComfyUI's weight names, and to text encoders, by layer."""
    state = file.lora
    if all(map(is_numbered, state)):
        names = {name: DIFFUSION_MODEL + key for name, key in weights.family.diffusers_names(model.model).items()}
        state = numbered_names(state, {name: weights.shape(key) for name, key in names.items() if key in weights})
    groups, rest = grouped(state)
    layers = named_layers(model)
    rank = lokr_rank(groups)
    changes: dict[str, Adapter] = {}
    of_text: dict[Layer, Adapter] = {}
    unknown = []
    for layer, group in groups.items():
        if layer.place not in (DIFFUSION, ANYWHERE):
            of_text[layer] = _adapter(layer, group, file, rank)
        elif layer.name in layers:
            changes |= adapters_by_weight(_adapter(layer, group, file, rank), layers[layer.name])
        else:
            unknown += [named.name for named in group.values()]
    for name in rest:
        if _is_of_a_layer(name, layers) or layer_of(name).place not in (DIFFUSION, ANYWHERE):
            raise ValueError(f"file: expected tensors that can all be used, got {name!r}, which is of no known kind")
        unknown.append(name)
    if not any(key.rpartition(".")[0] in weights.layers for key in changes):
        raise ValueError(
            f"file: expected a LoRA that changes the cross-attention of {weights.architecture}, got one of "
            f"{len(file.lora)} tensors that do not, such as {next(iter(file.lora))!r}"
        )
    foreign = next((key for key in changes if key not in weights), None)
    if foreign:
        raise ValueError(f"file: expected a LoRA for this model, got one with {foreign}, which the model does not have")
    if lost_its_scale(state, file.about):
        advise(
            "Load Concept",
            "the file was saved by PEFT, which keeps its scale in adapter_config.json; without it the LoRA is taken at "
            "scale 1, so put that file beside it and name the LoRA adapter_model.safetensors",
        )
    if unknown:
        advise("Load Concept", f"{len(unknown)} tensors are for no layer of this model, such as {unknown[0]}")
    return changes, of_text


def _adapter(layer: Layer, group: Group, file: ConceptFile, rank: int | None) -> Adapter:
    return Adapter(group, scale_of(layer, group, file.about, rank))


def _is_of_a_layer(name: str, layers: Mapping[str, str]) -> bool:
    """Whether a tensor's name begins with the name of a layer of the model."""
    pieces = name.split(".")
    return any(layer_of(".".join(pieces[:n])).name in layers for n in range(1, len(pieces) + 1))


def _shape_of(change: Any) -> tuple[int, ...]:
    """Shape of the weight that a change is for; empty if its tensors do not determine it."""
    if not isinstance(change, Adapter):
        return tuple(change[1][0].shape)
    if change.kind != "LoRA":
        return ()
    return len(change.group["up"].tensor), change.group["down"].tensor.flatten(1).shape[1]


def _check_width(given: tuple[int, ...], key: str, weights: Weights) -> None:
    """Raises ValueError, naming the right model, if a change of keys or values is for another text width."""
    layer, _, kind = key.rpartition(".")
    wanted = weights.shape(key)
    reads_text = kind == "weight" and weights.layers.get(layer, ("", ""))[1] in ("k", "v")
    if reads_text and len(given) == 2 and given[0] == wanted[0] and given[1] != wanted[1]:
        raise _other_width(given[1], weights)


def _other_width(given: int, weights: Weights) -> ValueError:
    named = weights.family.architecture(given)
    return ValueError(f"file: expected a concept for {weights.architecture}, got one for {named}")


def _check_base(sizes: list[float], moves: list[float]) -> None:
    """Raises ValueError if whole weights are far from the model's own, as differences or another base's weights are."""
    if not sizes:
        return
    size, change = statistics.median(sizes), statistics.median(moves)
    if not _LIKE_SIZE[0] <= size <= _LIKE_SIZE[1] or not change <= _MOST_CHANGE:
        raise ValueError(
            f"file: expected whole weights that were trained from this model, got some {size:.2g} times its own in "
            f"size and {change:.2g} times that away from them: the base is another, or they are differences"
        )


def _check_whole(file: ConceptFile, parts: Mapping[tuple[str, str], Mapping], weights: Weights) -> None:
    """Raises ValueError if a Custom Diffusion file lacks keys or values of a layer, or if a file changes nothing. A
    LoRA may leave layers out."""
    if file.source_format != LORA:
        wanted = {where: layer for layer, where in weights.layers.items() if where[1] in ("k", "v")}
        missing = [layer.removeprefix(DIFFUSION_MODEL) for where, layer in wanted.items() if where not in parts]
        if missing:
            raise ValueError(
                f"file: expected keys and values of all cross-attention layers of {weights.architecture}, "
                f"got a file without {len(missing)} of them, such as {missing[0]}"
            )
    # A product is zero if one of its factors is: one factor of an untrained LoRA is zero.
    nothing = not any(all(factor.any() for factor in found) for kinds in parts.values() for found in kinds.values())
    if nothing and file.source_format == LORA:
        raise ValueError(
            f"file: expected a LoRA for {weights.architecture}, got one that changes no weight of "
            "cross-attention: it was never trained"
        )
    if nothing and not file.tokens:
        raise ValueError("file: expected weights that were trained from this model's, got the model's own")


def _delta(found: Mapping[str, tuple[torch.Tensor, ...]], name: str, weights: Weights) -> Delta:
    factors, bias = found.get("weight"), found.get("bias")
    if factors is None:
        out, width = weights.shape(f"{DIFFUSION_MODEL}{name}.weight")
        factors = torch.zeros(out, 0), torch.zeros(0, width)
    try:
        return Delta(factors, bias and bias[0])
    except ValueError as error:
        raise ValueError(f"file: {error}, in {name}") from error
