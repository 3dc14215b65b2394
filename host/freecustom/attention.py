"""FreeCustom (arXiv 2405.13870) in ComfyUI: self-attention to the keys and values of reference passes.

In the active range, every evaluation of the picture is preceded by one *reference pass*: the references, with noise of
their own at the same noise level, go through the model once, and their keys and values at the chosen layers are
recorded. The references do not attend to the picture, so the result equals the published batch of picture and
references, and the keys and values depend only on the references, the noise level and the model. Therefore a *bank*
keeps them for further pictures.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...attention import mrsa
from ...subjects.masks import binarize, check_aspect, same_aspect
from ...subjects.pictures import fit
from ...subjects.subject import DEFAULT_WEIGHT, Subject
from ..advice import advise, executing_node
from ..model.families import family_of, network_of
from ..model.patching import NEGATIVE, POSITIVE, TEXT, Evaluation, Sampling, attach, attached
from ..model.sites import SELF, AttentionCall, Handler, Site, choose_self_attention, sees_whole
from ..workflow_texts import executing_prompt
from .bank import Bank
from .job import SAMPLER_SEED, SHARE_POSITIVE, ActiveSubject, MrsaSettings, Reference, ReferenceJob
from .references import ReferencePasses
from .shares import ShareRecord, ShareRun

log = logging.getLogger("conceptloom")

KEY = "conceptloom_freecustom"
NAME = "Multi-Reference Self-Attention (FreeCustom)"
CROWDED = 20.0
"""Attention odds of the references from which a picture at the default weight is lost."""
LATENT_SIZES_KEPT = 4

_NOT_FOR_REFERENCES = (
    "control",
    "area",
    "mask",
    "hooks",
    "gligen",
    "concat_latent_image",
    "concat_mask",
    "noise_concat",
)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A subject with the conditioning of its reference prompt."""

    subject: Subject
    conditioning: list


def apply(model, vae, clip, subjects: Sequence[Subject], settings: MrsaSettings):
    """Returns a clone of the MODEL that attends to the subjects' references.

    If the MODEL already has FreeCustom, the subjects are added to the existing ones, and these settings apply to all.
    Without subjects, the clone is unchanged.

    Raises:
        ValueError: the model, the VAE, the CLIP or a setting cannot be used.
    """
    network = network_of(model.model, SELF)
    sites = choose_self_attention(family_of(network).sites(network), settings.blocks)
    if vae is None or clip is None:
        missing = "vae" if vae is None else "clip"
        raise ValueError(f"{missing}: expected the one of the model's checkpoint, got none from the file given")
    wanted, given = model.model.latent_format.latent_channels, vae.latent_channels
    if wanted != given:
        raise ValueError(f"vae: expected one with {wanted} latent channels for this model, got {given}")
    if settings.formula not in mrsa.FORMULAS:
        raise ValueError(f"formula: expected one of {', '.join(mrsa.FORMULAS)}, got {settings.formula!r}")
    if not subjects:
        return model.clone()
    known = {}
    for subject in subjects:
        if subject.prompt not in known:
            known[subject.prompt] = clip.encode_from_tokens_scheduled(clip.tokenize(subject.prompt))
    encoded = [Encoded(subject, known[subject.prompt]) for subject in subjects]
    before = attached(model, KEY)
    record = None
    if before is not None:
        encoded, record = [*before.encoded, *encoded], before.record
    return attach(model, KEY, FreeCustom(encoded, settings, sites, vae, record))


def record_shares(model, steps: str, blocks: str) -> tuple[object, ShareRecord]:
    """Returns a clone of a MODEL with FreeCustom that records attention shares, and the record that sampling will fill.

    Without FreeCustom, or without a subject of weight above 0, these are the MODEL itself and an empty record.

    Raises:
        ValueError: `steps` or `blocks` cannot be parsed, or FreeCustom is active in none of the blocks.
    """
    system = attached(model, KEY)
    if system is None or not system.references:
        return model, ShareRecord((), None, frozenset())
    record = ShareRecord.of(steps, blocks, system.sites, [e.subject.noun for e in system.encoded])
    again = FreeCustom(system.encoded, system.settings, system.sites, system.vae, record, system.node)
    return attach(model, KEY, again, system.node), record


class FreeCustom:
    """The system attached to a MODEL. It owns the references' latents and the bank; both are freed with the MODEL.

    Raises:
        ValueError: a mask of a subject with weight above 0 is empty at the threshold.
    """

    name = NAME

    def __init__(
        self, encoded: Sequence[Encoded], settings: MrsaSettings, sites: Sequence[Site], vae, record, node=None
    ):
        self.encoded = tuple(encoded)
        self.settings = settings
        self.sites = tuple(sites)
        self.vae = vae
        self.record = record
        self.node = node or executing_node()
        self.bank = Bank(settings.bank_mib << 20, settings.bank_device)
        drawn_on = [i for i, e in enumerate(self.encoded) if e.subject.weight > 0]
        masks = [self._mask_of(self.encoded[i].subject) for i in drawn_on]
        coverages = [float(mask.float().mean()) for mask in masks]
        weights = [self.encoded[i].subject.weight for i in drawn_on]
        lifts = mrsa.balance_biases(coverages, settings.balance) if drawn_on else []
        self.active = tuple(
            ActiveSubject(i, self.encoded[i].subject, self.encoded[i].conditioning, mask, lift)
            for i, mask, lift in zip(drawn_on, masks, lifts, strict=True)
        )
        self.references = _rows(self.active)
        self.crowding = mrsa.crowding(coverages, weights) if settings.formula == "official" else 0.0
        self._latents: OrderedDict[tuple[int, int], list[torch.Tensor]] = OrderedDict()

    def _mask_of(self, subject: Subject) -> torch.Tensor:
        """Where the subject is in its reference, (H, W), boolean."""
        threshold = self.settings.mask_threshold
        for name, mask in (("mask", subject.mask), ("target mask", subject.target_mask)):
            if mask is not None and not binarize(mask, threshold).any():
                raise ValueError(
                    f"mask_threshold: expected at most {float(mask.max()):.2g}, the largest value in the {name} of "
                    f'"{subject.noun}", got {threshold:g}'
                )
        return binarize(subject.mask, threshold, tuple(subject.image.shape[:2]))

    def begin(self, sampling: Sampling) -> ReferenceRun | None:
        """Opens a run. Encodes the references for the size of this picture, unless that is already done.

        Returns:
            None if no subject has a weight above 0.

        Raises:
            ValueError: a target mask has another aspect ratio than the picture, or the VAE returns latents that are
                not finite.
        """
        if not self.references:
            return None
        patcher = sampling.guider.model_patcher
        self._advise(sampling)
        size = tuple(sampling.noise.shape[-2:])
        for subject in (one.subject for one in self.active):
            if subject.target_mask is not None:
                check_aspect(subject.target_mask, size, f'{NAME}: target_mask of "{subject.noun}"', latent=True)
        return ReferenceRun(self, sampling, self._encode(size, patcher.model))

    def _advise(self, sampling: Sampling) -> None:
        """Gives advice about settings that are allowed, but rarely intended."""
        # Shapeland names a weight of its own, from which references drown its few tokens.
        config = type(sampling.guider.model_patcher.model.model_config)
        usual = getattr(config, "reference_weight", DEFAULT_WEIGHT)
        if self.crowding > CROWDED * math.exp(usual - DEFAULT_WEIGHT):
            heavy = {one.subject.noun: one.subject.weight for one in self.active if one.subject.weight > usual}
            which = " and ".join(f'"{noun}" ({weight:g})' for noun, weight in heavy.items())
            remedy = f"lower the weight of {which} to about {usual:g}" if heavy else "lower the weights"
            advise(
                NAME,
                f"the references outweigh the picture {_ratio(self.crowding)} to 1: {remedy}, or tighten the masks",
                sampling.node,
            )
        prompt = executing_prompt()
        if prompt is None:
            return
        nouns = dict.fromkeys(one.subject.noun for one in self.active)
        # Parts of words count too, so that "dogs" names the dog.
        lacking = " and ".join(f'"{noun}"' for noun in nouns if noun.casefold() not in prompt.casefold())
        if lacking:
            advise(
                NAME, f"name {lacking} in the prompt: a subject appears where the picture shows its noun", sampling.node
            )

    def _encode(self, size: tuple[int, int], model) -> list[torch.Tensor]:
        """Latents of the references, (1, C, h, w) each, for a picture with the latent size `size`."""
        if size not in self._latents:
            factor = self.vae.spacial_compression_encode()
            by_size: dict[tuple[int, int], list[int]] = {}
            for i, reference in enumerate(self.references):
                by_size.setdefault(reference_size(reference.image.shape[:2], size), []).append(i)
            latents: dict[int, torch.Tensor] = {}
            for (h, w), members in by_size.items():
                pixels = torch.stack([fit(self.references[i].image, (h * factor, w * factor)) for i in members])
                encoded = model.process_latent_in(self.vae.encode(pixels))
                latents.update(zip(members, encoded.split(1), strict=True))
            for i, reference in enumerate(self.references):
                if not torch.isfinite(latents[i]).all():
                    raise ValueError(
                        f"{NAME}: vae: expected finite latents, got NaN or infinity for the reference "
                        f'"{reference.subjects[0].subject.noun}"'
                    )
            self._latents[size] = [latents[i] for i in range(len(self.references))]
            while len(self._latents) > LATENT_SIZES_KEPT:
                self._latents.popitem(last=False)
        self._latents.move_to_end(size)
        return self._latents[size]


def _rows(subjects: Sequence[ActiveSubject]) -> tuple[Reference, ...]:
    """Groups subjects with the same picture and prompt into one row of the reference pass."""
    rows: dict[tuple, list[ActiveSubject]] = {}
    for one in subjects:
        image = one.subject.image
        rows.setdefault((image.data_ptr(), image.shape, image.stride(), one.subject.prompt), []).append(one)
    return tuple(Reference(tuple(shown)) for shown in rows.values())


def reference_size(image: Sequence[int], target: tuple[int, int]) -> tuple[int, int]:
    """Latent size (h, w) for a reference picture (H, W): the area of `target`, the aspect ratio of the picture.

    Equal aspect ratios give exactly `target`, so that the references can be batched.
    """
    if same_aspect(tuple(image), tuple(target)):
        return tuple(target)
    ratio, area = image[0] / image[1], target[0] * target[1]
    return max(1, round(math.sqrt(area * ratio))), max(1, round(math.sqrt(area / ratio)))


class Missed:
    """Collects where things were done and where they failed, by site, sampling step and conditioning.

    A failure counts only if the same thing was not done in another evaluation of the step: guidance such as PAG
    evaluates the picture a second time, with layers replaced on purpose.
    """

    def __init__(self):
        self._done: dict[str, set[tuple]] = {}
        self._failed: dict[str, dict[str, set[tuple]]] = {}

    def done(self, what: str, places: Iterable[tuple]) -> None:
        """Notes that `what` was done at these places, (site, step, conditioning) each."""
        self._done.setdefault(what, set()).update(places)

    def failed(self, what: str, why: str, places: Iterable[tuple]) -> None:
        """Notes that `what` failed at these places in one evaluation, and why."""
        self._failed.setdefault(what, {}).setdefault(why, set()).update(places)

    def reasons(self) -> list[str]:
        """The reasons of all failures at places where the same thing was never done."""
        return [
            why
            for what, reasons in self._failed.items()
            for why, places in reasons.items()
            if places - self._done.get(what, set())
        ]


SEEN, PLACED = "references are seen", "target masks are placed"
_REPLACED = "another node replaces self-attention at layers of ours; there it wins and references are not seen"
_TILED = "another node tiles or reorders the batch at layers of ours; references are not seen there"
_UNPLACED = "target masks cannot be placed on a part of the picture or merged tokens, so they are ignored"


@dataclass(frozen=True)
class Part:
    """Rows of the picture's batch that are treated alike.

    Attributes:
        rows: a slice if the rows are contiguous, else their indices.
        conditionings: the indices of their conditionings.
        role: the role whose references they attend to; None for plain attention.
        style_fidelity: share of plain attention in the result.
        recorded: number of conditionings whose attention shares are recorded; 0 for the negative.
    """

    rows: slice | torch.Tensor
    conditionings: tuple[int, ...]
    role: str | None
    style_fidelity: float
    recorded: int


def _negative_prompt(sampling: Sampling, settings: MrsaSettings) -> dict | None:
    """The guider's negative conditioning if the unconditional branch's references use it, else None."""
    entries = sampling.guider.conds.get(NEGATIVE)
    if settings.style_fidelity >= 1 or settings.negative_references == SHARE_POSITIVE or not entries:
        return None
    return {k: v for k, v in entries[0].items() if k not in _NOT_FOR_REFERENCES}


class ReferenceRun:
    """One sampling with references."""

    def __init__(self, system: FreeCustom, sampling: Sampling, latents: list[torch.Tensor]):
        settings = system.settings
        self.levels = settings.window.levels(sampling.guider.model_patcher.get_model_object("model_sampling"))
        self.job = ReferenceJob(
            references=system.references,
            latents=latents,
            subject_count=len(system.encoded),
            sites=system.sites,
            settings=settings,
            noise_seed=sampling.seed if settings.reference_seed == SAMPLER_SEED else settings.reference_seed,
            negative=_negative_prompt(sampling, settings),
            bank=system.bank,
            sampling=sampling,
        )
        self.share = ShareRun(system.record, sampling.noise) if system.record is not None else None
        self.devices: dict[torch.device, ReferencePasses] = {}
        self.missed = Missed()

    def handlers(self, evaluation: Evaluation) -> dict[Site, Handler]:
        """See `patching.Run`. Runs the reference passes that this evaluation needs."""
        if evaluation.noise_level not in self.levels:
            return {}
        parts = self._parts(evaluation)
        roles = {part.role for part in parts} - {None}
        if not roles:
            return {}
        device = self.devices.get(evaluation.x.device)
        if device is None:
            device = self.devices[evaluation.x.device] = ReferencePasses(self.job, evaluation)
        seen = {role: device.references(role, evaluation) for role in roles}
        return {site: partial(self._attend, site, device, parts, seen, evaluation) for site in device.layouts}

    def _parts(self, evaluation: Evaluation) -> list[Part]:
        """Splits the rows by the references that they attend to."""
        fidelity = self.job.settings.style_fidelity
        chunks: dict[str | None, list[int]] = {}
        for i, role in enumerate(evaluation.roles):
            if role == TEXT or (role == NEGATIVE and fidelity >= 1):
                kind = None
            elif role != NEGATIVE:
                kind = POSITIVE
            else:
                kind = NEGATIVE
            chunks.setdefault(kind, []).append(i)
        parts = []
        n = evaluation.rows_per_role
        for kind, members in chunks.items():
            together = members[-1] - members[0] == len(members) - 1
            if together:
                rows = slice(members[0] * n, (members[-1] + 1) * n)
            else:
                rows = torch.cat([torch.arange(m * n, (m + 1) * n) for m in members]).to(evaluation.x.device)
            role = POSITIVE if kind == NEGATIVE and self.job.negative is None else kind
            is_negative = kind == NEGATIVE
            recorded = 0 if kind != POSITIVE else len(members)
            parts.append(Part(rows, tuple(members), role, fidelity if is_negative else 0.0, recorded))
        return parts

    def _attend(self, site, device, parts, seen, evaluation, call: AttentionCall) -> torch.Tensor:
        """The picture's attention at one site, with references where they apply."""
        places = self._places(site, parts, evaluation)
        if call.previous is not None:
            self.missed.failed(SEEN, _REPLACED, places)
            return call.unpatched()
        q, k, v = call.q, call.k, call.v
        if len(q) != len(k) or len(q) != len(evaluation.x):
            self.missed.failed(SEEN, _TILED, places)
            return call.unpatched()
        self.missed.done(SEEN, places)
        out = None
        for part in parts:
            rows = part.rows
            if part.role is None:
                result = call.attend(q[rows], k[rows], v[rows])
            else:
                result = self._see_references(site, device, part, seen[part.role][site], evaluation, call)
            if len(parts) == 1:
                return result
            if out is None:
                out = torch.empty_like(q)
            out[rows] = result
        return out

    def _see_references(self, site, device, part, reference, evaluation, call) -> torch.Tensor:
        q, k, v = (x[part.rows] for x in (call.q, call.k, call.v))
        keys, values = reference.unbind(0)
        layout = device.layouts[site]
        grid = call.grid
        bias = device.bias(layout, k.shape[1], grid[0] * grid[1], q.dtype)
        whole = sees_whole(call.q[:, call.picture], len(evaluation.x), grid)
        in_place = whole and evaluation.x.shape[-2:] == self.job.sampling.noise.shape[-2:]
        groups = device.groups(layout, call, in_place)
        if device.has_target_masks:
            places = self._places(site, [part], evaluation)
            self.missed.done(PLACED, places) if in_place else self.missed.failed(PLACED, _UNPLACED, places)
        mixed = mrsa.multi_reference_attention(call.attend, q, k, v, keys, values, bias, groups)
        if self.share is not None and part.recorded and in_place and self.share.wants(site, evaluation.step):
            shares = mrsa.subject_shares(
                call.attend, q, k, keys, bias, layout.owner, self.job.subject_count, call.heads, groups
            )
            self.share.add(shares[:, call.picture], part.recorded, grid)
        if part.style_fidelity > 0:
            return mrsa.keep_style(call.attend(q, k, v), mixed, part.style_fidelity)
        return mixed

    def _places(self, site: Site, parts: Sequence[Part], evaluation: Evaluation) -> list[tuple]:
        """(site, step, conditioning) for all parts that attend to references."""
        uuids = evaluation.options.get("uuids") or [None]
        return [
            (site, evaluation.step, uuids[i]) for part in parts if part.role is not None for i in part.conditionings
        ]

    def finish(self, samples: torch.Tensor) -> None:
        """Completes the record of attention shares, advises on what was missed, and logs the size of the bank."""
        for reason in self.missed.reasons():
            advise(NAME, reason, self.job.sampling.node)
        if self.share is not None:
            self.share.finish(samples)
        bank = self.job.bank
        log.info(
            "FreeCustom: reference passes: %d; the bank holds %.1f of %d MiB in %s",
            sum(device.count for device in self.devices.values()),
            bank.size / 2**20,
            bank.limit >> 20,
            bank.device,
        )

    def close(self) -> None:
        """Releases all tensors."""
        self.devices.clear()
        self.share = self.job = None


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"
