"""The Composer adapter in ComfyUI: a conditioning carries a composition, and a prepared MODEL adds what it says.

For each conditioning the adapter runs once per sampling and set of representations that act together. What it gives is
added to the conditioning's own rows, whatever else is in the batch. Where none acts, the call is the host's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.conds
import comfy.model_sampling
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP

from ...compositions.composition import CAPTION, LOCAL, Caption, Composition
from ...compositions.inputs import check_fits, conditions_of
from ...encoders.composer_adapter import EPSILON, VELOCITY, ComposerAdapter, Conditions, Features
from ...encoders.composer_adapter import load as read_adapter
from ...subjects.masks import ASPECT_TOLERANCE, same_aspect
from ..model import carried
from ..model.carried import carried_by, carry
from ..model.families import family_of, network_of
from ..model.networks import compute_dtype, in_patcher
from ..model.passes import KERNEL_OVERRIDE
from ..model.patching import RUNS, is_compiled
from ..model.sites import CROSS
from ..model.window import Window

TAG = "conceptloom_composer"
NAME = "Composer Conditioning"

NOTHING = Features(None, None, None, {})
_UNPREPARED = (
    "Composer Conditioning: model: expected one from Load Composer Adapter in the sampler, got another (connect yours "
    "to Load Composer Adapter's input)."
)


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """An adapter in a model patcher, so that ComfyUI manages its memory."""

    patcher: Any

    @property
    def module(self) -> ComposerAdapter:
        """The network."""
        return self.patcher.model


@dataclass(frozen=True, eq=False)
class Composed:
    """What a conditioning carries.

    Attributes:
        adapter: makes features of the composition.
        composition: what acts, with strengths and parts of the schedule.
        sentence: (1, D), the caption's pooled embedding, or None.
    """

    adapter: LoadedAdapter
    composition: Composition
    sentence: torch.Tensor | None


def load(path: str, model) -> LoadedAdapter:
    """Loads an adapter for a MODEL.

    Raises:
        ValueError: the file is no adapter, or one for another model.
    """
    return wrap(checked(read_adapter(path, comfy.ops.manual_cast, dtype=compute_dtype()), model))


def checked(net: ComposerAdapter, model) -> ComposerAdapter:
    """The adapter, if it fits a MODEL.

    Raises:
        ValueError: it does not, or the model's family has no encoder with levels.
    """
    network = network_of(model.model, CROSS)
    family, config = family_of(network), net.config
    own = family.text_width(model.model), tuple(channels for _, channels in family.levels(network))
    if own != (config.context_width, config.levels):
        wanted = config.base or f"text width {config.context_width} and levels {config.levels}"
        raise ValueError(
            f"model: expected one for this adapter ({wanted}), got {family.architecture(own[0])} with levels {own[1]}"
        )
    predicted = _prediction(model.get_model_object("model_sampling"))
    if config.prediction not in ("", predicted):
        raise ValueError(
            f"model: expected one that predicts {config.prediction} for this adapter, got one that predicts "
            f"{predicted or 'something else'}"
        )
    return net


def _prediction(sampling) -> str:
    if isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        return VELOCITY
    return EPSILON if isinstance(sampling, comfy.model_sampling.EPS) else ""


def wrap(net: ComposerAdapter) -> LoadedAdapter:
    """A network in a patcher."""
    return LoadedAdapter(in_patcher(net))


def encode(adapter: LoadedAdapter, clip, composition: Composition, conditioning: list | None = None) -> list:
    """The conditioning of a composition.

    Args:
        clip: encodes its caption; an absent one is the empty prompt.
        conditioning: used in place of the caption.

    Raises:
        ValueError: the adapter does not understand the composition or the text encoder, or the conditioning has a
            composition already.
    """
    config = adapter.module.config
    check_fits(composition, config)
    own = conditioning is None
    caption = composition.get(CAPTION) or Caption((("", 1.0),))
    entries = encode_caption(clip, caption) if own else conditioning
    found = []
    for states, extras in entries:
        if carried_by(extras, TAG):
            raise ValueError(
                "conditioning: expected one without a composition, got one with it; connect Merge Compositions"
            )
        pooled = extras.get("pooled_output") if own and CAPTION in composition and config.sentence_width else None
        if pooled is not None and pooled.shape[-1] != config.sentence_width:
            raise ValueError(
                f"clip: expected a text encoder with sentences of width {config.sentence_width} for this adapter, got "
                f"{pooled.shape[-1]}"
            )
        found.append([states, carry(extras, TAG, Composed(adapter, composition, pooled), _UNPREPARED)])
    return found


def encode_caption(clip, caption: Caption) -> list:
    """The conditioning of a caption; of a mixture the weighted mean of the text states, as ComfyUI averages prompts.

    Raises:
        ValueError: the CLIP has scheduled hooks, and the caption is a mixture.
    """
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text, _ in caption.texts]
    if len(encoded) == 1:
        return encoded[0]
    if any(len(entries) > 1 for entries in encoded):
        raise ValueError("clip: expected one without scheduled hooks for a mixture of captions, got one with them")
    length = max(entries[0][0].shape[1] for entries in encoded)
    empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))[0]
    states, pooled = 0, 0
    for (_, share), ((own, extras), *_) in zip(caption.texts, encoded, strict=True):
        missing = (length - own.shape[1]) // empty[0].shape[1]
        states = states + share * torch.cat([own, *[empty[0]] * missing], 1)
        if extras.get("pooled_output") is not None:
            pooled = pooled + share * extras["pooled_output"]
    extras = dict(encoded[0][0][1])
    if torch.is_tensor(pooled):
        extras["pooled_output"] = pooled
    return [[states, extras]]


def prepared(model):
    """Returns a clone of the MODEL that adds what compositions in conditionings say, and is otherwise the same."""

    def open_run(composed: Composed, patcher, noise: torch.Tensor) -> ComposedRun:
        if noise.ndim != 4:
            raise ValueError(f"{NAME}: latent: expected pictures, got a latent of {noise.ndim} dimensions")
        try:
            checked(composed.adapter.module, patcher)
        except ValueError as error:
            raise ValueError(f"{NAME}: {error}") from error
        # The model has this clone's own only once it is loaded, which it is not yet.
        return ComposedRun(composed, patcher.get_model_object("model_sampling"), noise)

    model = carried.prepared(model, TAG, open_run, lambda composed: (composed.adapter.patcher,), _joinable)
    model.remove_wrappers_with_key(WrappersMP.DIFFUSION_MODEL, TAG)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, TAG, _diffusion_model)
    return model


def _diffusion_model(executor, *args, **kwargs):
    features = kwargs.pop(TAG, None)
    if features is None or _is_nothing(features):
        return executor(*args, **kwargs)
    return family_of(executor.class_obj).with_additions(executor, features, *args, **kwargs)


class ComposedRun:
    """One sampling with a composition.

    Args:
        composed: the content of the conditioning.
        sampling: the model's `model_sampling`.
        noise: (B, C, h, w), with the size of the latents.

    Raises:
        ValueError: maps have another aspect ratio.
    """

    def __init__(self, composed: Composed, sampling, noise: torch.Tensor):
        self.composed, self.size = composed, (noise.shape[-2], noise.shape[-1])
        given = composed.composition
        tolerance = max(ASPECT_TOLERANCE, 1 / min(self.size))
        if any(name in given for name in LOCAL) and not same_aspect(given.size, self.size, tolerance):
            wanted, got = (f"{one[1]}x{one[0]}" for one in (self.size, given.size))
            raise ValueError(
                f"Composer Conditioning: composition: expected the shape of the latent ({wanted}), got {got}; connect "
                "Align Composition"
            )
        self.windows = {
            name: Window(part.start_percent, part.end_percent).levels(sampling)
            for name, part in composed.composition.parts.items()
        }
        self._kept: dict[tuple[str, ...], Features | None] = {}

    def write(
        self, inputs: Mapping[str, Any], _entry: Mapping[str, Any], _x: torch.Tensor, sigma: torch.Tensor
    ) -> dict:
        """See `carried.CarriedRun`: the inputs with what acts at this noise level."""
        features = self.at(float(sigma[0]))
        if features is None:
            return dict(inputs)
        text = inputs["c_crossattn"].cond.shape[1]
        return {**inputs, TAG: FeaturesCond(features, text)}

    def at(self, sigma: float) -> Features | None:
        """What is added at a noise level (n = 1), or None where nothing acts."""
        active = tuple(name for name, levels in self.windows.items() if sigma in levels)
        if active not in self._kept:
            self._kept[active] = self._features(active)
        return self._kept[active]

    @torch.no_grad()
    def _features(self, active: Sequence[str]) -> Features | None:
        composed = self.composed
        parts = {name: part for name, part in composed.composition.parts.items() if name in active}
        acting = Composition(composed.composition.size, parts)
        given = conditions_of(acting, composed.sentence)
        if not given.globals and not given.maps:
            return None
        device = composed.adapter.patcher.load_device
        features = composed.adapter.module(_moved(given, device), self.size)
        return None if _is_nothing(features) else features


def _is_nothing(features: Features) -> bool:
    return features.time is None and features.tokens is None and not features.levels


def _moved(given: Conditions, device: torch.device) -> Conditions:
    return Conditions(
        *(
            {name: value.to(device) for name, value in one.items()}
            for one in (given.globals, given.maps, given.strengths)
        )
    )


class FeaturesCond(comfy.conds.CONDRegular):
    """`Features` of one conditioning (n = 1) as an input of a model call: repeated for the batch, cropped with the area
    of the conditioning, and joined with those of other conditionings.

    Prompt and negative prompt are evaluated in one call: where one of them lacks what is added to the timestep
    embedding or to a level, zeros take its place, and in cross-attention each row sees its own tokens alone.

    Args:
        features: see `Features`.
        text: number of text states that its tokens follow. ComfyUI repeats the shorter of two texts in a batch, in
            which tokens would count for less: such conditionings are evaluated apart.
        rows: pictures in the call.
        alike: only conditionings with as many tokens may join it.
        exact: only conditionings with as many text states may join it. ComfyUI asks the first of a batch alone, so
            this is for all of an evaluation if one of them has tokens.
    """

    def __init__(self, features: Features, text: int, rows: int = 1, alike: bool = False, exact: bool = False):
        super().__init__(features)
        self.text, self.rows, self.alike, self.exact = text, rows, alike, exact

    @property
    def count(self) -> int:
        """Number of tokens."""
        return 0 if self.cond.tokens is None else self.cond.tokens.shape[1]

    def process_cond(self, batch_size: int, area=None, **_) -> FeaturesCond:
        """The features for a call of `batch_size` pictures on an area (h, w, y, x) of the latent."""
        time, tokens, _kept, levels = self.cond
        levels = {level: _cropped(value, level, area) for level, value in levels.items()}
        rows = Features(
            None if time is None else time.expand(batch_size, -1),
            None if tokens is None else tokens.expand(batch_size, -1, -1),
            None,
            {level: value.expand(batch_size, -1, -1, -1) for level, value in levels.items()},
        )
        return FeaturesCond(rows, self.text, batch_size, self.alike, self.exact)

    def can_concat(self, other) -> bool:
        """Whether tokens follow as much text, and rows may see different numbers of them. Levels fit where the areas
        have one size."""
        if not isinstance(other, FeaturesCond):
            return False
        if self.text != other.text and (self.exact or other.exact):
            return False
        return self.count == other.count or not (self.alike or other.alike)

    def concat(self, others) -> Features:
        """All rows in one."""
        every = [self, *others]
        numbers = {level for one in every for level in one.cond.levels}
        return Features(
            _rows([one.cond.time for one in every], every),
            *_tokens(every),
            {level: _rows([one.cond.levels.get(level) for one in every], every) for level in numbers},
        )

    def size(self) -> list[int]:
        """For ComfyUI's estimate of memory: no input of its own grows with it."""
        return [1]


def _rows(values: Sequence[torch.Tensor | None], every: Sequence[FeaturesCond]) -> torch.Tensor | None:
    """The values of several conditionings in one tensor, with zeros for None; None if all are."""
    like = next((value for value in values if value is not None), None)
    if like is None:
        return None
    filled = (
        like.new_zeros(one.rows, *like.shape[1:]) if value is None else value
        for value, one in zip(values, every, strict=True)
    )
    return torch.cat(list(filled))


def _tokens(every: Sequence[FeaturesCond]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The tokens of several conditionings in one tensor, and which rows have which (see `Features`)."""
    most = max(one.count for one in every)
    like = next((one.cond.tokens for one in every if one.count), None)
    if like is None:
        return None, None
    padded = [
        like.new_zeros(one.rows, most, like.shape[2])
        if one.cond.tokens is None
        else torch.nn.functional.pad(one.cond.tokens, (0, 0, 0, most - one.count))
        for one in every
    ]
    if all(one.count == most for one in every):
        return torch.cat(padded), None
    # Made on the tokens' device: a copy from the CPU would wait for the GPU at every step.
    kept = [
        torch.nn.functional.pad(like.new_ones(one.rows, one.count, dtype=torch.bool), (0, most - one.count))
        for one in every
    ]
    return torch.cat(padded), torch.cat(kept)


def _joinable(conds: list[list[dict] | None], options: dict) -> list[list[dict] | None]:
    """Conditionings of one evaluation, of which each has features if one has: otherwise ComfyUI would evaluate those
    without apart. Where cross-attention is not the host's own, or is compiled, rows of a call cannot see different
    numbers of tokens."""
    told = options.get("transformer_options", {})
    alike = (
        "attn2" in told.get("patches_replace", {})
        or "attn2_patch" in told.get("patches", {})
        or bool(told.get(RUNS))
        # Kernels of other packs reject or ignore the bias that hides a row's missing tokens.
        or KERNEL_OVERRIDE in told
        or is_compiled(told)
    )
    every = [entry.get("model_conds", {}) for entries in conds if entries for entry in entries]
    if not any(TAG in inputs for inputs in every):
        return conds
    exact = any(inputs[TAG].count for inputs in every if TAG in inputs)

    def joined(entry: dict) -> dict:
        inputs = entry.get("model_conds", {})
        if "c_crossattn" not in inputs:
            return entry
        own = inputs.get(TAG)
        features = own.cond if own else NOTHING
        given = FeaturesCond(features, inputs["c_crossattn"].cond.shape[1], 1, alike, exact)
        return {**entry, "model_conds": {**inputs, TAG: given}}

    return [entries and [joined(entry) for entry in entries] for entries in conds]


def _cropped(value: torch.Tensor, level: int, area) -> torch.Tensor:
    """A level's map on an area, at the size that the level has there wherever the area is."""
    if area is None:
        return value
    height, width, y, x = area
    step = 2 ** max(0, level)
    part = value[:, :, y // step : -(-(y + height) // step), x // step : -(-(x + width) // step)]
    own = -(-height // step), -(-width // step)
    return part if part.shape[2:] == own else torch.nn.functional.interpolate(part, own, mode="nearest-exact")
