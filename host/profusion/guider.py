"""Guidance by a text and any number of subjects, in the two stages of fusion sampling.

Each subject is a conditioning of its own: the prompt with a concept's word, with an embedding, with a fused or learned
token, or the plain prompt where the subject comes from a LoRA on a hook or from a patch of the model. The text is the
same prompt without subjects. In the roles of `model.patching` subjects are positive and the text is TEXT, so that
systems on the MODEL show their subjects in the first alone; for patches of other packs, which tell the sides by the
host's index, the text counts as unconditional.

All conditionings of a stage go to the host in one call, which evaluates them in one batch where memory allows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ...samplers.fusion import FOLLOWING, FUSION, REFINEMENT, STAGE, combine, shares
from ..advice import advise, executing_node, inform
from ..model.carried import is_seen
from ..model.patching import NEGATIVE, POSITIVE, ROLE_TAG, SIDES, TEXT
from ..words import GAMMA, SUBJECT_ROWS

NAME = "Fusion Guider"
KEY = "conceptloom_fusion_guider"
_AREA = "conceptloom_area"
"""Entry of a subject's conditioning: its area, taken from the host, which would evaluate the area alone and give all
other sides a part of the same area."""
_OWN = "conceptloom_own"
"""Marks the entries of a subject's conditioning: to sides without an area the host adds a part of each other side's
area, which for a subject would be strength where it has none."""
_REGION = ("mask", "mask_strength", "strength", "uuid")
_PART = {"mask", "area"}
_CONTROL = ("control", "control_apply_to_uncond")


@dataclass(frozen=True)
class Guidance:
    """How far guidance moves towards what.

    Attributes:
        text_scale: s_C, of the text in refinement.
        subject_scale: s_j, of each subject in refinement, times the strength of its conditioning; at 0 there are none
            in fusion either.
        fusion_scale: g_f, of the subjects in fusion.
        gamma: factor of the text states that carry a subject, in fusion.
        reuse: refinement takes the differences between text, negative and subjects from the fusion stage before it,
            and evaluates the subjects alone.

    Raises:
        ValueError: both scales of refinement are 0.
    """

    text_scale: float = 5.0
    subject_scale: float = 7.0
    fusion_scale: float = 7.0
    gamma: float = 0.6
    reuse: bool = False

    def __post_init__(self):
        if self.text_scale <= 0 and self.subject_scale <= 0:
            raise ValueError("subject_scale: expected more than 0 here or in text_scale, got 0 in both")


@dataclass(frozen=True, eq=False)
class _Kept:
    """What a fusion stage leaves to the refinement after it: differences to the mean of the subjects."""

    sigma: float
    negative: torch.Tensor
    text: torch.Tensor | None


class FusionGuider(comfy.samplers.CFGGuider):
    """The host's guider for one text and several subjects; with any sampler but Fusion Sampler it is refinement alone.

    Args:
        model_patcher: the host's MODEL.
        text, negative: conditionings.
        subjects: one conditioning for each.
        guidance: the scales.

    Raises:
        ValueError: there is no subject.
    """

    def __init__(self, model_patcher, text: list, negative: list, subjects: Sequence[list], guidance: Guidance):
        if not subjects:
            raise ValueError("subjects: expected at least one conditioning, got none")
        super().__init__(model_patcher)
        self.guidance = guidance
        self.count = len(subjects)
        self.node = executing_node()
        self.set_cfg(guidance.text_scale + guidance.subject_scale)  # the host logs it
        setattr(self, SIDES, (TEXT, NEGATIVE, *[POSITIVE] * self.count))
        conds = {POSITIVE: text, NEGATIVE: negative}
        for j, subject in enumerate(subjects):
            conds[_subject(j)] = _as_subject(subject)
            if guidance.gamma != 1 and any(SUBJECT_ROWS in extras for _, extras in subject):
                conds[_weakened(j)] = weakened(conds[_subject(j)], guidance.gamma)
        self.inner_set_conds(conds)

    def inner_set_conds(self, conds: dict[str, list]) -> None:
        """See the host; a ControlNet on the text acts on the subjects too, unless they have their own."""
        super().inner_set_conds(conds)
        controlled = [entry for entry in self.original_conds[POSITIVE] if "control" in entry]
        control = {name: controlled[0][name] for name in _CONTROL if name in controlled[0]} if controlled else {}
        for name, entries in self.original_conds.items():
            if name not in (POSITIVE, NEGATIVE):
                self.original_conds[name] = [entry if "control" in entry else {**entry, **control} for entry in entries]

    def outer_sample(self, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """See the host."""
        self.evaluations = self._plain = 0
        self._covered: dict[tuple, Any] = {}
        self._kept: _Kept | None = None
        options = self.model_options.setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._apply_model, options)
        try:
            samples = super().outer_sample(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self._covered, self._kept = {}, None
        if self._plain:
            ratio = self.evaluations / self._plain
            said = f"UNet evaluations: {self.evaluations}, {ratio:.2f} times the {self._plain} of plain guidance"
            inform(NAME, said, self.node)
        return samples

    def share(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor | float:
        """How much fusion acts where, 0..1: a map (n, 1, h, w), or a number for the whole picture."""
        found = list(self._coverage(x, sigma.reshape(1)).values())
        if not any(map(torch.is_tensor, found)):
            return min(1.0, max(found, default=0.0))
        return torch.stack([x.new_zeros(len(x), 1, *x.shape[2:]) + one for one in found]).amax(0).clamp(max=1)

    def predict_noise(self, x, timestep, model_options=None, seed=None):  # noqa: ARG002 (the host gives it by name)
        """Denoised latents (B, C, ...), for the stage that `model_options` name."""
        model_options = model_options or {}
        coverage = self._coverage(x, timestep)
        if model_options.get(STAGE) == FUSION:
            return self._fuse(coverage, x, timestep, model_options)
        return self._refine(coverage, x, timestep, model_options)

    def _fuse(self, coverage: dict, x, timestep, options) -> torch.Tensor:
        """D_f."""
        scale, reuse = self.guidance.fusion_scale, self.guidance.reuse and options.get(FOLLOWING) == REFINEMENT
        if reuse and not _covers_all(coverage):
            reuse = False
            # Where there is no subject, there is no estimate of the new latents that differences could be added to.
            advise(NAME, "reuse_differences is off, because the subjects do not cover the whole picture", self.node)
        if scale <= 1:
            advise(
                NAME,
                f"a fusion_scale of {scale:g} fuses the subjects without guidance, which loses them; 3 to 7 is usual",
                self.node,
            )
        subjects = [_weakened(j) if _weakened(j) in self.conds else _subject(j) for j in coverage]
        with_text = reuse and self._text_scale(x, timestep) is not None
        with_negative = reuse or _is_needed(scale, options)
        text, negative, *estimates = self._evaluate(with_text, with_negative, subjects, x, timestep, options)
        mixed, _ = combine(estimates, shares(list(coverage.values())), negative)
        if reuse:
            self._kept = _Kept(float(timestep[0]), negative - mixed, text - mixed if with_text else None)
        return self._guided(mixed, negative, scale, x, timestep, options)

    def _refine(self, coverage: dict, x, timestep, options) -> torch.Tensor:
        """D_r."""
        guidance = self.guidance
        self._plain += sum(len(_seen(self.conds[name], timestep)) for name in (POSITIVE, NEGATIVE))
        scales = [one * guidance.subject_scale for one in coverage.values()]
        subjects = list(map(_subject, coverage))
        text_scale = self._text_scale(x, timestep)
        with_text = text_scale is not None
        if with_text:
            scales = [text_scale, *scales]
        total = sum(scales)
        with_negative = torch.is_tensor(total) or _is_needed(total, options)
        kept, self._kept = self._kept, None
        if kept is not None and subjects and kept.sigma == float(timestep[0]):
            _, _, *estimates = self._evaluate(False, False, subjects, x, timestep, options)
            mean, _ = combine(estimates, shares(list(coverage.values())), None)
            negative, text = mean + kept.negative, mean + kept.text if with_text else None
        else:
            text, negative, *estimates = self._evaluate(with_text, with_negative, subjects, x, timestep, options)
        if not scales:
            advise(NAME, "nothing guides: text_scale is 0 and no subject acts; the negative prompt is drawn", self.node)
            return negative
        mixed, scale = combine([text, *estimates] if with_text else estimates, scales, negative)
        return self._guided(mixed, negative, scale, x, timestep, options)

    def _evaluate(self, text: bool, negative: bool, subjects: Sequence[str], x, timestep, options) -> list:
        """Denoised latents of text, negative and subjects, in this order, which other packs' patches know; None for
        what is not asked for."""
        names = [POSITIVE if text else None, NEGATIVE if negative else None, *subjects]
        conds = [self.conds[name] if name in (POSITIVE, NEGATIVE) else name and self._own(name) for name in names]
        found = comfy.samplers.calc_cond_batch(self.inner_model, conds, x, timestep, options)
        return [None if name is None else one for name, one in zip(names, found, strict=True)]

    def _apply_model(self, executor, x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs):
        """Counts, and tells patches of other packs which rows see subjects: they know 0, conditional, and 1,
        unconditional."""
        sides = transformer_options.get("cond_or_uncond")
        if sides is not None:
            self.evaluations += len(sides)
            transformer_options = {**transformer_options, "cond_or_uncond": [int(side < 2) for side in sides]}
        return executor(x, sigma, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def _own(self, name: str) -> list[dict]:
        """The entries of a subject's conditioning without those that the host added."""
        return [entry for entry in self.conds[name] if _OWN in entry]

    def _guided(self, mixed, negative, scale: float, x, timestep, options) -> torch.Tensor:
        """Guidance by the host, so that whatever else acts on it has its say."""
        sides = [self.conds[POSITIVE], None if negative is None else self.conds[NEGATIVE]]
        # What was not evaluated is 0 to the host.
        pair = [mixed, torch.zeros_like(mixed) if negative is None else negative]
        for change in options.get("sampler_pre_cfg_function", ()):
            given = {"conds": sides, "conds_out": pair, "cond_scale": scale, "timestep": timestep, "input": x}
            pair = change({**given, "sigma": timestep, "model": self.inner_model, "model_options": options})
        return comfy.samplers.cfg_function(
            self.inner_model, *pair, scale, x, timestep, model_options=options, cond=sides[0], uncond=sides[1]
        )

    def _text_scale(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor | float | None:
        """s_C where the text acts at this noise level and 0 elsewhere: a map (n, 1, h, w), or a number for the whole
        picture; None if it acts nowhere.

        Where a conditioning does not act, the host's estimate is 0. Without a subject the picture is the host's, with
        that estimate too.
        """
        scale, entries = self.guidance.text_scale, _seen(self.conds[POSITIVE], timestep)
        if scale <= 0:
            return None
        if any(not _PART & entry.keys() for entry in entries) or not self._has_subject(x, timestep):
            return scale
        if not entries:
            return None
        key = (x.shape, POSITIVE, *(entry["uuid"] for entry in entries))
        if key not in self._covered:
            acts = (_strongest(entries, x, timestep) > 0).to(x)
            self._covered[key] = scale * _as_number(acts) if acts.any() else None
        return self._covered[key]

    def _has_subject(self, x: torch.Tensor, timestep: torch.Tensor) -> bool:
        """Whether there is a subject at any noise level."""
        key = (x.shape, POSITIVE)
        if key not in self._covered:
            held = (self._own(_subject(j)) for j in range(self.count)) if self.guidance.subject_scale else ()
            self._covered[key] = any(bool(_strongest(entries, x, timestep).any()) for entries in held)
        return self._covered[key]

    def _coverage(self, x: torch.Tensor, timestep: torch.Tensor) -> dict[int, torch.Tensor | float]:
        """Of each subject that is seen at this noise level how strong it is where: a map (n, 1, h, w), or a number."""
        if not self.guidance.subject_scale:
            return {}
        entries = {j: _seen(self._own(_subject(j)), timestep) for j in range(self.count)}
        key = (x.shape, *(entry["uuid"] for held in entries.values() for entry in held))
        if key not in self._covered:
            maps = {j: _strongest(held, x, timestep) for j, held in entries.items() if held}
            self._covered[key] = {j: _as_number(one) for j, one in maps.items() if one.any()}
        return self._covered[key]


def weakened(conditioning: list, gamma: float) -> list:
    """A copy in which text states that carry a subject are multiplied by gamma. The rest is kept."""
    found = []
    for states, extras in conditioning:
        if rows := extras.get(SUBJECT_ROWS):
            states = states.clone()
            states[:, list(rows)] *= gamma
            extras = {**extras, GAMMA: gamma}
        found.append([states, extras])
    return found


def _subject(j: int) -> str:
    return f"subject_{j}"


def _weakened(j: int) -> str:
    return f"weakened_{j}"


def _as_subject(conditioning: list) -> list:
    found = []
    for states, extras in conditioning:
        extras = {ROLE_TAG: POSITIVE, **extras, _OWN: True}
        extras.pop("set_area_to_bounds", None)
        if "area" in extras:
            extras[_AREA] = extras.pop("area")
        found.append([states, extras])
    return found


def _is_needed(scale: float, options: dict) -> bool:
    """Whether guidance at this scale sees the negative."""
    return not math.isclose(scale, 1.0) or options.get("disable_cfg1_optimization", False)


def _seen(entries: list[dict], timestep: torch.Tensor) -> list[dict]:
    """Those of a conditioning's entries whose range of the schedule includes a noise level."""
    return [entry for entry in entries if is_seen(entry, timestep)]


def _covers_all(coverage: dict[int, torch.Tensor | float]) -> bool:
    """Whether there is a subject at every place."""
    total = sum(coverage.values())
    return not torch.is_tensor(total) or bool((total > 0).all())


def _strongest(entries: Sequence[dict], x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The largest strength (B, 1, h, w) of conditionings at each place, as the host reads their masks and areas."""
    found = torch.zeros_like(x[:, :1])
    for entry in entries:
        region = {name: entry[name] for name in _REGION if name in entry}
        if "area" in entry:
            region["area"] = entry["area"]
        if _AREA in entry:
            held = [{"area": entry[_AREA]}]
            comfy.samplers.resolve_areas_and_cond_masks_multidim(held, x.shape[2:], x.device)
            region |= held[0]
        part = comfy.samplers.get_area_and_mult({**region, "model_conds": {}}, x[:, :1], timestep)
        place, sides = found, len(x.shape) - 2
        for i in range(sides if part.area is not None else 0):
            place = place.narrow(i + 2, part.area[sides + i], part.area[i])
        torch.maximum(place, part.mult, out=place)
    return found


def _as_number(found: torch.Tensor) -> torch.Tensor | float:
    """A map that is the same everywhere as a number."""
    return float(found.flatten()[0]) if (found == found.flatten()[0]).all() else found
