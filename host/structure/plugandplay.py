"""Plug-and-Play injection (Tumanyan et al., arXiv 2211.12572): keeps a picture's structure while its content changes.

For every evaluation of the sampled picture, the source picture goes through the model at the same noise level, with a
latent from its inversion. Its features replace those in all rows of the evaluation: the residual branch of one decoder
block, and the queries and keys of some self-attention layers. Both injections stop after a share of the steps.

The published program adds the source picture to the batch as a row. A separate pass for the source gives the same
result, and does not disturb nodes that depend on the number of rows (ControlNet, IPAdapter).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.sampler_helpers
import torch

from ..advice import advise
from ..model import passes
from ..model.carried import Carried
from ..model.families import family_of, network_of
from ..model.noise import adds_noise
from ..model.patching import POSITIVE, Evaluation, Sampling, attach
from ..model.sites import CROSS, RESIDUAL, SELF, AttentionCall, Handler, ResidualCall, Site, parse_numbers
from .inversion import SourceTrajectory

KEY = "conceptloom_plug_and_play"
NAME = "Plug-and-Play Injection"

PAPER, PUBLISHED = "three blocks (paper)", "all from the second on (published code)"
PRESETS = (PAPER, PUBLISHED)

_OFF = 1e-3  # largest relative difference between a noise level and the inversion's


@dataclass(frozen=True)
class InjectionSettings:
    """What is injected, and in which steps.

    Attributes:
        residual_until: share of the steps, from the first one, in which the residual branch is injected (tau_f), 0..1.
        attention_until: share of the steps in which queries and keys are injected (tau_A), 0..1.
        blocks: one of PRESETS, or numbers such as "4, 7-9" of the decoder blocks whose self-attention is injected.
    """

    residual_until: float = 0.8
    attention_until: float = 0.5
    blocks: str = PAPER


def choose_injected(sites: Sequence[Site], blocks: str) -> tuple[Site, tuple[Site, ...]]:
    """Selects the residual branch and the self-attention sites into which features are injected.

    The branch is in the second block of the coarsest decoder stage with attention: block 4 of SD 1.x and 2.x, 1 of
    SDXL. PAPER selects the second block of this stage, the second block of the next and the first block of the third
    (4, 7, 9; SDXL: 1, 4). PUBLISHED selects all blocks from the second on (4-11; SDXL: 1-5). In a stage with only one
    block, as in smaller models, that block is used.

    Raises:
        ValueError: `blocks` is neither a preset nor a list of decoder blocks with attention, or the model lacks the
            blocks that are needed.
    """
    own = [site for site in sites if site.kind == SELF and site.in_decoder]
    stages: dict[int, list[int]] = {}
    for site in own:
        numbers = stages.setdefault(site.stage, [])
        if site.block not in numbers:
            numbers.append(site.block)
    ordered = [stages[stage] for stage in sorted(stages)]
    if not ordered:
        raise ValueError("model: expected one with self-attention in its decoder, got one without")
    second = ordered[0][:2][-1]
    if blocks == PAPER:
        wanted = {numbers[: place + 1][-1] for numbers, place in zip(ordered, (1, 1, 0), strict=False)}
    elif blocks == PUBLISHED:
        wanted = {number for numbers in ordered for number in numbers if number >= second}
    else:
        wanted = parse_numbers(blocks, "blocks")
        with_attention = {number for numbers in ordered for number in numbers}
        if wanted - with_attention:
            raise ValueError(
                f"blocks: expected decoder blocks with attention, of this model {min(with_attention)} to "
                f"{max(with_attention)}, got {min(wanted - with_attention)}"
            )
    branch = next((site for site in sites if site.kind == RESIDUAL and site.block == second), None)
    if branch is None:
        raise ValueError(f"model: expected one residual layer in its decoder block {second}, got none or several")
    return branch, tuple(site for site in own if site.block in wanted)


def apply(model, source: SourceTrajectory, settings: InjectionSettings):
    """Returns a clone of the MODEL that keeps the structure of the source picture.

    Sampling must start from the inversion's noise and use its sigmas, with a sampler that adds no noise.

    Raises:
        ValueError: the model or a setting cannot be used.
    """
    network = network_of(model.model, SELF, CROSS, RESIDUAL)
    sites = family_of(network).sites(network)
    branch, attention = choose_injected(sites, settings.blocks)
    order = tuple(site for site in sites if site == branch or site in attention)
    return attach(model, KEY, PlugAndPlay(source, settings, order))


@dataclass(frozen=True, eq=False)
class PlugAndPlay:
    """The system attached to a MODEL. `sites` are those into which features are injected, in order of execution."""

    name = NAME

    source: SourceTrajectory
    settings: InjectionSettings
    sites: tuple[Site, ...]

    def begin(self, sampling: Sampling) -> InjectionRun | None:
        """Opens a run, or returns None if there is no step with an injection.

        Raises:
            ValueError: the inversion was made with another model or with what only its own sampling shows, or has
                another size or batch size.
        """
        steps = len(sampling.sigmas) - 1
        # A share that is a whole number of steps may be a little less as a float.
        shares = self.settings.residual_until, self.settings.attention_until
        until = tuple(int(share * steps + 1e-6) for share in shares)
        if not any(until):
            return None
        model = sampling.guider.model_patcher.model
        width = family_of(network_of(model)).text_width(model)
        given = self.source.conditioning[0][0].shape[-1]
        if given != width:
            raise ValueError(
                f"{NAME}: trajectory: expected one that was inverted with this model, whose text states are {width} "
                f"wide, got {given}"
            )
        inputs = self.source.conditioning[0][1].get("model_conds", {}).values()
        if any(isinstance(one, Carried) for one in inputs):
            raise ValueError(
                f"{NAME}: trajectory: expected an inversion with a plain prompt, got one with a composition or a word "
                "of PromptNet, which the source pass does not see; connect plain text to DDIM Inversion"
            )
        wanted, given = tuple(self.source.trajectory.latents.shape[1:]), tuple(sampling.noise.shape)
        if wanted[1:] != given[1:] or wanted[0] not in (1, given[0]):
            raise ValueError(
                f"{NAME}: latent: expected the size and batch of the inversion {wanted}, got {given}; sample from "
                "the noise that DDIM Inversion gives"
            )
        if sampling.noise.any():
            advise(
                NAME,
                "the sampler adds noise to that of the inversion, which hides the picture; sample with DisableNoise, "
                "or a KSampler (Advanced) with add_noise disabled",
                sampling.node,
            )
        if adds_noise(sampling.sampler):
            advise(
                NAME,
                "the sampler draws fresh noise in every step, which the inversion does not know; euler and others that "
                "are neither ancestral nor SDE keep the picture's structure",
                sampling.node,
            )
        known = torch.tensor(self.source.trajectory.sigmas)
        levels = torch.tensor(sampling.sigmas[: max(until)])
        if ((levels[:, None] - known).abs().amin(1) > _OFF * levels).any():
            advise(
                NAME,
                "sampling goes by other noise levels than the inversion's, whose SIGMAS fit better",
                sampling.node,
            )
        return InjectionRun(self, sampling, *until)


class InjectionRun:
    """One sampling into which the source's features are injected."""

    def __init__(self, system: PlugAndPlay, sampling: Sampling, residual_until: int, attention_until: int):
        self.system = system
        self.seed = sampling.seed
        self.residual_until, self.attention_until = residual_until, attention_until
        self._conds: dict[torch.device, passes.Conds] = {}
        self._records: dict[tuple, dict[Site, tuple[torch.Tensor, ...]]] = {}

    def handlers(self, evaluation: Evaluation) -> dict[Site, Handler]:
        """See `patching.Run`. Runs the source pass that this evaluation needs."""
        until = {RESIDUAL: self.residual_until, SELF: self.attention_until}
        wanted = [site for site in self.system.sites if evaluation.step < until[site.kind]]
        if not wanted:
            return {}
        # ComfyUI may evaluate the conditionings of one noise level in several calls, which share one source pass.
        key = (evaluation.x.device, evaluation.noise_level)
        if key not in self._records:
            self._records = {k: kept for k, kept in self._records.items() if k[1] == evaluation.noise_level}
            self._records[key] = self._source_pass(evaluation, wanted)
        records = self._records[key]
        return {
            site: partial(self._branch if site.kind == RESIDUAL else self._attend, records[site], evaluation)
            for site in wanted
        }

    def _source_pass(self, evaluation: Evaluation, wanted: Sequence[Site]) -> dict[Site, tuple[torch.Tensor, ...]]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        x = self.system.source.trajectory.at(evaluation.noise_level).to(evaluation.x)
        records: dict[Site, tuple[torch.Tensor, ...]] = {}

        def record_branch(site: Site, call: ResidualCall) -> torch.Tensor:
            out, branch = call.with_its_branch()
            return keep(site, (branch,), lambda: out)

        def record_attention(site: Site, call: AttentionCall) -> torch.Tensor:
            return keep(site, (call.q, call.k), call.unpatched)

        def keep(site, tensors, result):
            records[site] = tensors
            if site == wanted[-1]:
                raise passes.StopForward
            return result()

        record = {RESIDUAL: record_branch, SELF: record_attention}
        passes.forward(
            evaluation, x, self._encode(evaluation, x), {site: partial(record[site.kind], site) for site in wanted}
        )
        return records

    def _encode(self, evaluation: Evaluation, x: torch.Tensor) -> passes.Conds:
        """The source's prompt as inputs of a model call, once per device."""
        if x.device not in self._conds:
            # Raises if another node has injected video layers, which would treat the pass's batch as frames.
            network = network_of(evaluation.model)
            family_of(network).sites(network)
            entry = comfy.sampler_helpers.convert_cond(self.system.source.conditioning)[0]
            self._conds[x.device] = passes.encode(evaluation.model, entry, x[:1], POSITIVE, self.seed, len(x))
        return self._conds[x.device]

    def _branch(self, record, evaluation: Evaluation, call: ResidualCall) -> torch.Tensor:
        (branch,) = record
        _check(call.x, branch, 2, evaluation)
        return call.with_branch(_for_all_rows(branch, evaluation))

    def _attend(self, record, evaluation: Evaluation, call: AttentionCall) -> torch.Tensor:
        for own, kept in ((call.q, record[0]), (call.v, record[1])):
            _check(own, kept, 1, evaluation)
        q, k = (_for_all_rows(kept, evaluation) for kept in record)
        if call.previous is not None:
            return call.previous(q, k, call.v)
        return call.attend(q, k, call.v)

    def finish(self, samples: torch.Tensor) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Releases all tensors."""
        self._conds.clear()
        self._records.clear()


def _for_all_rows(source: torch.Tensor, evaluation: Evaluation) -> torch.Tensor:
    """Repeats the source's features (1 or pictures, ...) for each conditioning, to one per row of the evaluation."""
    return source.repeat(len(evaluation.x) // len(source), *(1,) * (source.ndim - 1))


def _check(own: torch.Tensor, source: torch.Tensor, first: int, evaluation: Evaluation) -> None:
    """Raises ValueError if another node has cut the picture into parts. `first` is the first spatial dimension."""
    if len(own) != len(evaluation.x) or own.shape[first : first + 2] != source.shape[first : first + 2]:
        raise ValueError(
            f"{NAME}: model: expected one whose layers see the whole picture and nothing else, got {tuple(own.shape)} "
            f"where the source has {tuple(source.shape)}; another node or the area of a conditioning makes it so"
        )
