"""Multi-concept fusion (Concept Weaver, arXiv 2404.03913) in ComfyUI: every concept in its own part of one picture.

One latent is denoised, with one row per conditioning for any number of concepts. At every cross-attention layer, the
positive rows' output is mixed from the outputs of the base and the concepts (`attention.fusion`). A concept's keys and
values depend only on its prompt and weights, so they are computed once per run, and its weights are not needed
afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.sampler_helpers
import torch

from ...attention.fusion import ConceptGroup, fuse, group_concepts
from ...encoders.concepts import PARTS, Concept
from ...encoders.words import find_word
from ...subjects.masks import check_aspect
from ...subjects.partition import THRESHOLD, Partition, layer_masks
from ..advice import advise
from ..model import passes
from ..model.families import family_of, network_of
from ..model.layers import LayerHandler, LayerHooks, layer_hooks
from ..model.patching import POSITIVE, ROLE_TAG, Evaluation, Sampling, attach
from ..model.sites import CROSS, AttentionCall, Handler, Site, sees_whole
from ..model.window import Window
from .concepts import keys_and_values
from .layers import Change, MaskedLayer, OwnQueries, Rows, changes_of

KEY = "conceptloom_concept_fusion"
NAME = "Multi-Concept Fusion (Concept Weaver)"

ALL_LAYERS, DECODER = "all layers", "decoder"
LAYERS = (ALL_LAYERS, DECODER)
IN_PLACE, LEFT_OUT = "inside its mask", "left out"
ELSEWHERE = (IN_PLACE, LEFT_OUT)
FEATURES, SCORES = "features", "scores"
MODES = (FEATURES, SCORES)

_CONCEPT = "conceptloom concept "

# These limit a conditioning to a part of the picture, to which the partition cannot be matched. Hooks do not: they
# only wrap calls, or change weights as a LoRA on the model does.
_NOT_IN_POSITIVE = ("area", "mask", "gligen")


@dataclass(frozen=True)
class FusionSettings:
    """How concepts are fused.

    Attributes:
        mode: FEATURES mixes the outputs of cross-attention, as in Concept Weaver. SCORES is the baseline: every concept
            denoises the whole picture separately, and the results are mixed by the masks.
        suppression: lambda of the paper, how far to move away from the base without concepts.
        norm_cap: see `attention.fusion.fuse`; 0 sets no limit.
        layers: ALL_LAYERS, as in the paper, or DECODER.
        window: the part of the schedule in which concepts are used.
        elsewhere: what to do with changes outside keys and values: IN_PLACE or LEFT_OUT.
    """

    mode: str = FEATURES
    suppression: float = 0.3
    norm_cap: float = 0.0
    layers: str = ALL_LAYERS
    window: Window = Window()
    elsewhere: str = IN_PLACE


@dataclass(frozen=True, eq=False)
class PromptedConcept:
    """A concept with the conditioning of its own prompt."""

    concept: Concept
    conditioning: list


def apply(
    model,
    positive: list,
    concepts: Sequence[PromptedConcept],
    partition: Partition,
    settings: FusionSettings,
    background: PromptedConcept | None = None,
) -> tuple[Any, list]:
    """Returns a clone of the MODEL that generates each concept in its part of the picture, and the positive
    conditioning to sample it with.

    Without a concept that has both a strength and a mask, the clone is unchanged.

    Args:
        model: ComfyUI's MODEL.
        positive: conditioning of the plain prompt.
        concepts: in the order of the partition.
        partition: the part of each concept.
        settings: how to fuse the concepts.
        background: concept for the background; without one, the background is the base model's.

    Raises:
        ValueError: the inputs do not fit together.
    """
    network = network_of(model.model, CROSS)
    family = family_of(network)
    sites = [site for site in family.sites(network) if site.kind == CROSS]
    if len(partition) != len(concepts):
        raise ValueError(f"partition: expected one mask for each of the {len(concepts)} concepts, got {len(partition)}")
    placed = [*zip(concepts, partition.weights, strict=False)]
    if background is not None:
        placed.append((background, partition.weights[-1]))
    width = family.text_width(model.model)
    for prompted, _ in placed:
        given = prompted.concept.text_width
        if given not in (None, width):
            raise ValueError(
                f"concepts: expected those of a model with text states of width {width}, got "
                f"{prompted.concept.name} with {given}"
            )
    active = [i for i, (prompted, mask) in enumerate(placed) if prompted.concept.strength and mask.any()]
    if not active:
        without = "strength" if any(mask.any() for _, mask in placed) else "place in the partition"
        advise(NAME, f"no concept has a {without}, so the plain prompt is drawn")
        return model.clone(), positive
    advice = _misplaced(concepts, partition.names)
    if settings.suppression > 1 and settings.mode == FEATURES:
        advice.append(f"a suppression of {settings.suppression:g} is far beyond 0.3 and burns colors")
    if settings.layers == DECODER:
        sites = [site for site in sites if site.in_decoder]
    if settings.mode == SCORES and not settings.window.is_whole:
        raise ValueError("mode: expected features where start_percent and end_percent leave steps out, got scores")
    maps = torch.stack([mask for _, mask in placed])
    chosen = [placed[i][0] for i in active]
    changes: dict[str, list[Change]] = {}
    if settings.elsewhere == IN_PLACE:
        changes, left_out = changes_of([prompted.concept for prompted in chosen], model, sites)
        if left_out:
            advice.append(f"{left_out} patches in layers that see no places are left out")
    layers = {family.layer(site.key, part): (part, site) for site in sites for part in PARTS}
    fused = attach(model, KEY, ConceptFusion(chosen, maps[active], sites, layers, changes, settings, tuple(advice)))
    if settings.mode == FEATURES:
        return fused, positive
    rest = (1 - maps[active].sum(0)).clamp(min=0)
    parts = [(positive, rest, POSITIVE)] if rest.any() else []
    for number, (prompted, mask) in enumerate(zip(chosen, maps[active], strict=True)):
        parts.append((prompted.conditioning, mask, f"{_CONCEPT}{number}"))
    return fused, [
        [context, {**extras, "mask": mask[None], "mask_strength": 1.0, ROLE_TAG: role}]
        for conditioning, mask, role in parts
        for context, extras in conditioning
    ]


def _misplaced(concepts: Sequence[PromptedConcept], names: Sequence[str]) -> list[str]:
    """Advice on each concept whose mask was found by a noun that does not match its class word."""
    advice = []
    for number, (prompted, name) in enumerate(zip(concepts, names, strict=False), 1):
        kind = prompted.concept.class_word
        if kind and not find_word(kind, name) and not find_word(name, kind):
            advice.append(
                f'mask {number} shows "{name}", but its concept {prompted.concept.name} is a "{kind}": give masks and '
                "concepts in the same order"
            )
    return advice


@dataclass(frozen=True, eq=False)
class ConceptFusion:
    """The system attached to a MODEL.

    Attributes:
        concepts: those with a strength and a mask.
        maps: (n, H, W), the parts of the concepts.
        sites: the cross-attention sites in which they are used.
        layers: part and site by the name of each linear layer of these sites.
        changes: what the concepts change except keys and values, by layer.
        settings: how the concepts are fused.
        advice: what to tell the user when sampling begins.
    """

    name = NAME

    concepts: Sequence[PromptedConcept]
    maps: torch.Tensor
    sites: Sequence[Site]
    layers: Mapping[str, tuple[str, Site]]
    changes: Mapping[str, Sequence[Change]]
    settings: FusionSettings
    advice: tuple[str, ...] = ()

    def begin(self, sampling: Sampling) -> FusionRun:
        """Opens a run.

        Raises:
            ValueError: the partition has another aspect ratio than the picture, or the positive input is not a single
                conditioning for the whole picture.
        """
        check_aspect(self.maps.sum(0), tuple(sampling.noise.shape[-2:]), f"{NAME}: partition", latent=True)
        for sentence in self.advice:
            advise(NAME, sentence, sampling.node)
        if self.settings.mode == SCORES:
            return FusionRun(self, sampling)
        entries = sampling.guider.conds.get(POSITIVE) or []
        cut = sorted({name for entry in entries for name in _NOT_IN_POSITIVE if entry.get(name) is not None})
        if len(entries) > 1 or cut:
            given = f"{len(entries)} of them" if len(entries) > 1 else f"one with {', '.join(cut)}"
            raise ValueError(f"{NAME}: positive: expected one conditioning for the whole picture, got {given}")
        return FusionRun(self, sampling)


class FusionRun:
    """One sampling of several concepts."""

    def __init__(self, system: ConceptFusion, sampling: Sampling):
        self.system = system
        self.node = sampling.node
        self.seed = sampling.seed
        self.size = tuple(sampling.noise.shape[-2:])
        model_sampling = sampling.guider.model_patcher.get_model_object("model_sampling")
        self.levels = system.settings.window.levels(model_sampling)
        self._keys: dict[tuple, dict[Site, list[tuple[torch.Tensor, torch.Tensor]]]] = {}
        self._sized: dict[tuple, torch.Tensor] = {}
        self._groups: dict[tuple, list[ConceptGroup]] = {}
        self._changes: dict[torch.device, dict[str, list[Change]]] = {}
        self._layers: dict[tuple, tuple[LayerHooks, dict[Site, OwnQueries]]] = {}
        # For one evaluation; each device runs its own.
        self._queries: dict[torch.device, dict[Site, OwnQueries]] = {}
        self._suppressed: dict[tuple[Site, torch.device, int], torch.Tensor] = {}
        self._with_own_outputs = {
            site for layer, (part, site) in system.layers.items() if part == "out" and layer in system.changes
        }
        # For each concept its largest share of any token, and the grid of the layer with this token.
        self._seen: dict[PromptedConcept, tuple[float, tuple[int, int]]] = {}

    def handlers(self, evaluation: Evaluation) -> dict[Site, Handler]:
        """See `patching.Run`."""
        if not self._rows(evaluation):
            return {}
        # Hooks change weights within a run, and each device needs its own tensors.
        hooks, strengths = evaluation.hooks
        key = (evaluation.x.device, hooks, strengths)
        if key not in self._keys:
            # A scheduled strength is not used again after it has changed.
            self._keys = {old: kept for old, kept in self._keys.items() if old[:2] != key[:2]}
            self._groups = {old: kept for old, kept in self._groups.items() if old[0][1][:2] != key[:2]}
            self._keys[key] = self._project(evaluation)
        return {site: partial(self._attend, (site, key), evaluation) for site in self.system.sites}

    def layers(self, evaluation: Evaluation) -> LayerHooks:
        """See `patching.LayerRun`."""
        rows, device = self._rows(evaluation), evaluation.x.device
        if not rows or not self.system.changes:
            return ()
        key = (device, len(evaluation.x), evaluation.roles)
        if key not in self._layers:
            self._layers[key] = self._handle_layers(evaluation, rows)
        hooks, self._queries[device] = self._layers[key]
        return hooks

    def _handle_layers(self, evaluation: Evaluation, rows: Sequence[Rows]) -> tuple[LayerHooks, dict[Site, OwnQueries]]:
        """The hooks of all layers that concepts change, and by site the handlers that compute queries."""
        network, device, count = network_of(evaluation.model), evaluation.x.device, len(evaluation.x)
        if device not in self._changes:
            dtype, changes = evaluation.model.get_dtype_inference(), self.system.changes
            self._changes[device] = {n: [one.to(device, dtype) for one in found] for n, found in changes.items()}
        masks = partial(self._masks, device=device)
        handlers: dict[str, LayerHandler] = {}
        queries: dict[Site, OwnQueries] = {}
        # With FEATURES, concepts share rows with the base. The base must not use their queries, and suppression must
        # not change the input of their output layers.
        shared = self.system.layers if self.system.settings.mode == FEATURES else {}
        for name, found in self._changes[device].items():
            layer = network.get_submodule(name)
            part, site = shared.get(name, ("", None))
            if part == "q":
                handlers[name] = queries[site] = OwnQueries(layer, found, count, rows)
            else:
                missing = {"missing": partial(self._taken_away, site, device)} if part == "out" else {}
                handlers[name] = MaskedLayer(layer, found, masks, count, rows, **missing)
        return layer_hooks(network, handlers), queries

    def _taken_away(self, site: Site, device: torch.device, part: Rows) -> torch.Tensor | None:
        return self._suppressed.pop((site, device, part.rows.start), None)

    def _rows(self, evaluation: Evaluation) -> list[Rows]:
        """The rows that use concepts, one entry per conditioning."""
        if evaluation.noise_level not in self.levels:
            return []
        n, found = evaluation.rows_per_role, []
        for i, role in enumerate(evaluation.roles):
            rows = slice(i * n, (i + 1) * n)
            if role.startswith(_CONCEPT):
                found.append(Rows(rows, int(role.removeprefix(_CONCEPT))))
            elif role == POSITIVE and self.system.settings.mode == FEATURES:
                found.append(Rows(rows, None))
        return found

    def _masks(self, grid: tuple[int, int], device: torch.device) -> torch.Tensor:
        """The concepts' shares (n, h, w) of the tokens of a layer, computed once per size."""
        if (grid, device) not in self._sized:
            maps = self.system.maps
            # The rest is resized too, so that the shares add up to 1 at every size.
            rest = (1 - maps.sum(0, keepdim=True)).clamp(min=0)
            self._sized[grid, device] = layer_masks(torch.cat([maps, rest]), grid)[:-1].to(device)
        return self._sized[grid, device]

    def _project(self, evaluation: Evaluation) -> dict[Site, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Computes the keys and values of all concepts at all sites."""
        model = evaluation.model
        dtype = model.get_dtype_inference()
        projected: dict[Site, list] = {site: [] for site in self.system.sites}
        for one in self.system.concepts:
            entry = comfy.sampler_helpers.convert_cond(one.conditioning)[0]
            conds = passes.encode(model, entry, evaluation.x[:1], POSITIVE, self.seed)
            context = conds["c_crossattn"].to(dtype)
            for site, kept in projected.items():
                kept.append(keys_and_values(one.concept, model, site, context))
        return projected

    def _attend(self, where: tuple[Site, tuple], evaluation: Evaluation, call: AttentionCall) -> torch.Tensor:
        base = call.attend(call.q, call.k, call.v)
        # What another node adds here (such as IPAdapter) is added to the fused output.
        added = None if call.previous is None else call.previous(call.q, call.k, call.v) - base
        site, key = where
        settings, keys_values = self.system.settings, self._keys[key][site]
        groups = self._group(where, evaluation, call) if settings.mode == FEATURES else []
        out = base.clone()
        for part in self._rows(evaluation):
            query = call.q[part.rows]
            if part.concept is None:
                suppression, here = settings.suppression, (site, query.device)
                queries = self._queries.get(query.device, {}).get(site)
                own = {} if queries is None else queries.take(part)
                out[part.rows] = fuse(query, base[part.rows], groups, call.attend, suppression, settings.norm_cap, own)
                if suppression and site in self._with_own_outputs:
                    self._suppressed[(*here, part.rows.start)] = suppression * base[part.rows]
            else:
                concept_key, concept_value = (x.expand(len(query), -1, -1) for x in keys_values[part.concept])
                out[part.rows] = call.attend(query, concept_key, concept_value)
        return out if added is None else out + added

    def _group(self, where: tuple[Site, tuple], evaluation: Evaluation, call: AttentionCall) -> list[ConceptGroup]:
        """The groups of concepts at a layer, computed once per size."""
        grid = call.grid
        in_place = tuple(evaluation.x.shape[-2:]) == self.size
        if not in_place or not sees_whole(call.q, len(evaluation.x), grid):
            raise ValueError(
                f"{NAME}: model: expected one whose cross-attention sees the whole picture, got parts of shape "
                f"{tuple(call.q.shape)} from another node"
            )
        at = (where, grid, call.q.dtype)
        if at not in self._groups:
            site, key = where
            masks, keys_values = self._masks(grid, call.q.device), self._keys[key][site]
            self._groups[at] = group_concepts(masks.to(call.q), keys_values)
            for group in self._groups[at]:
                for row, number in enumerate(group.concepts):
                    # Views of the group's tensors, so that no tensor is kept twice.
                    keys_values[number] = (group.key[row : row + 1], group.value[row : row + 1])
            for one, most in zip(self.system.concepts, masks.amax((1, 2)).tolist(), strict=True):
                self._seen[one] = max((most, grid), self._seen.get(one, (0.0, grid)))
        return self._groups[at]

    def finish(self, _samples: torch.Tensor) -> None:
        """Gives advice on concepts smaller than a token in every layer. In coarse layers alone that is normal."""
        for one, (most, (height, width)) in self._seen.items():
            if most < THRESHOLD:
                advise(
                    NAME,
                    f"the concept {one.concept.name} is smaller than a cell of every layer, even of that of "
                    f"{width}x{height}, so it is weak; enlarge its mask or the picture",
                    self.node,
                )

    def close(self) -> None:
        """Releases all tensors."""
        self._keys.clear()
        self._sized.clear()
        self._groups.clear()
        self._changes.clear()
        self._layers.clear()
        self._queries.clear()
        self._suppressed.clear()
