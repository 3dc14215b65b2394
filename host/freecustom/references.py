"""FreeCustom's reference passes: references go through the model before the picture, and give keys and values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import comfy.sampler_helpers
import torch

from ...attention import mrsa
from ...subjects.masks import binarize, token_mask
from ..model import passes
from ..model.families import family_of, network_of
from ..model.patching import NEGATIVE, POSITIVE, Evaluation
from ..model.sites import AttentionCall, Handler, Site
from .bank import BankGroup
from .job import FIXED, ReferenceJob


@dataclass(frozen=True, eq=False)
class Batch:
    """References of equal shape that go through the model together.

    Attributes:
        members: indices into the job's references.
        latents: (R, C, h, w).
        conds: inputs of the model call for each role.
    """

    members: tuple[int, ...]
    latents: torch.Tensor
    conds: dict[str, passes.Conds]


class ReferencePasses:
    """A job's tensors on one device.

    Attributes:
        layouts: layout of the keys and values of each site, once there are any.
        has_target_masks: whether a subject is limited to a part of the picture.
        count: number of passes that were run here.
    """

    def __init__(self, job: ReferenceJob, evaluation: Evaluation):
        self.job = job
        self.count = 0
        self.model = evaluation.model
        self.device = evaluation.x.device
        self.layouts: dict[Site, mrsa.KeyLayout] = {}
        self._subjects = [subject for reference in job.references for subject in reference.subjects]
        self.has_target_masks = any(one.subject.target_mask is not None for one in self._subjects)
        # Raises if another node has injected video layers, which would treat the pass's batch as frames.
        network = network_of(self.model)
        family_of(network).sites(network)
        self._batches = self._make_batches(evaluation)
        self._plans: dict[tuple, mrsa.KeyPlan] = {}
        self._joined: dict[tuple, mrsa.KeyLayout] = {}
        self._biases: dict[tuple, torch.Tensor] = {}
        self._groups: dict[tuple, list[mrsa.QueryGroup] | None] = {}
        self._current: dict[tuple, dict[Site, torch.Tensor]] = {}
        self._group = self._open_bank(evaluation)

    def _make_batches(self, evaluation: Evaluation) -> list[Batch]:
        """Encodes the references' conditionings, and batches those of equal shapes as far as memory allows."""
        job, model = self.job, self.model
        entries = []
        for i, (reference, latent) in enumerate(zip(job.references, job.latents, strict=True)):
            latent = latent.to(self.device)
            conds = {POSITIVE: self._encode(reference.conditioning[:1], latent)}
            if job.negative is not None:
                conds[NEGATIVE] = self._encode(None, latent)
            shapes = tuple(
                (role, name, c.shape if torch.is_tensor(c) else c)
                for role, named in conds.items()
                for name, c in named.items()
            )
            entries.append(((latent.shape, shapes), i, latent, conds))
        alike: dict[tuple, list] = {}
        for shapes, *entry in entries:
            alike.setdefault(shapes, []).append(entry)
        batches = []
        for members in alike.values():
            room = len(members)
            free = model.current_patcher.get_free_memory(self.device)
            while room > len(evaluation.x) and model.memory_required([room, *members[0][1].shape[1:]]) * 1.5 > free:
                room -= 1
            for start in range(0, len(members), room):
                chosen = members[start : start + room]
                conds = {
                    role: {
                        name: torch.cat([c[role][name] for _, _, c in chosen]) if torch.is_tensor(first) else first
                        for name, first in named.items()
                    }
                    for role, named in chosen[0][2].items()
                }
                batches.append(Batch(tuple(i for i, _, _ in chosen), torch.cat([z for _, z, _ in chosen]), conds))
        return batches

    def _encode(self, conditioning: list | None, latent: torch.Tensor) -> passes.Conds:
        """Encodes one conditioning as inputs of a model call; None is the guider's negative."""
        if conditioning is None:
            return passes.encode(self.model, self.job.negative, latent, NEGATIVE, self.job.noise_seed)
        entry = comfy.sampler_helpers.convert_cond(conditioning)[0]
        return passes.encode(self.model, entry, latent, POSITIVE, self.job.noise_seed)

    def _open_bank(self, evaluation: Evaluation) -> BankGroup | None:
        """The bank's group for this run, or None if nothing can be kept."""
        job, bank = self.job, self.job.bank
        patcher = job.sampling.guider.model_patcher
        if bank.limit == 0 or self.device != patcher.load_device:
            return None
        changing = [
            *patcher.object_patches.items(),
            *((name, x) for name, xs in patcher.injections.items() for x in xs),
            *((name, x) for name, xs in passes.feature_patches(evaluation).items() for x in xs),
            (passes.KERNEL_OVERRIDE, evaluation.options.get(passes.KERNEL_OVERRIDE)),
        ]
        key = (
            patcher.patches_uuid,
            tuple((name, id(x)) for name, x in changing),
            str(self.device),
            self.model.get_dtype_inference(),
            tuple(job.sampling.noise.shape[-2:]),
            job.sampling.sigmas,
            job.noise_seed,
            tuple(batch.members for batch in self._batches),
            None if job.negative is None else _digest_of(job.negative),
        )
        group = bank.open(key, tuple(x for _, x in changing))
        self.layouts = dict(group.layouts)
        return group

    def references(self, role: str, evaluation: Evaluation) -> dict[Site, torch.Tensor]:
        """The references' keys and values per site, (2, M, C): from this evaluation's pass, the bank or a new pass."""
        hooks = self.model.current_patcher.current_hooks
        entry = (evaluation.noise_level, evaluation.step, role, hooks)
        if entry in self._current:
            return self._current[entry]
        self._current = {key: kept for key, kept in self._current.items() if key[0] == evaluation.noise_level}
        group = self._group if hooks is None else None
        if group is not None and entry in group.entries:
            tensors = {site: t.to(self.device) for site, t in group.entries[entry].items()}
        else:
            tensors = self._reference_pass(role, evaluation)
            if group is not None:
                group.layouts = group.layouts or dict(self.layouts)
                self.job.bank.put(group, entry, tensors)
        self._current[entry] = tensors
        return tensors

    def _reference_pass(self, role: str, evaluation: Evaluation) -> dict[Site, torch.Tensor]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.count += 1
        collected: dict[Site, list[torch.Tensor]] = {site: [] for site in self.job.sites}
        grids: dict[Site, list[tuple]] = {site: [] for site in collected}
        last = max(collected, key=lambda site: site.index)
        for number, batch in enumerate(self._batches):

            def record(site: Site, call: AttentionCall, number=number) -> torch.Tensor:
                k, v = (x[:, call.picture] for x in (call.k, call.v))
                collected[site].append(torch.stack(self._plan(number, call.grid).collect(k, v)))
                grids[site].append((number, call.grid))
                if site == last:
                    raise passes.StopForward
                return call.unpatched()

            self._forward(batch, role, evaluation, {site: partial(record, site) for site in collected})
        for site, where in grids.items():
            key = tuple(where)
            if key not in self._joined:
                self._joined[key] = mrsa.KeyLayout.join([self._plans[one].layout for one in where])
            self.layouts[site] = self._joined[key]
        return {site: tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1) for site, tensors in collected.items()}

    def _forward(self, batch: Batch, role: str, evaluation: Evaluation, handlers: dict[Site, Handler]) -> None:
        """Runs the model on noised references, up to the last site."""
        model = self.model
        rows = len(batch.members)
        sigma = evaluation.sigma[:1].repeat(rows)
        step = 0 if self.job.settings.reference_noise == FIXED else evaluation.step
        shape = batch.latents.shape[1:]
        names = [self.job.references[i].name for i in batch.members]
        noise = torch.cat([reference_noise(self.job.noise_seed, step, name, shape) for name in names])
        x = model.model_sampling.noise_scaling(sigma, noise.to(self.device), batch.latents.to(noise.dtype))
        passes.forward(evaluation, x, batch.conds[role], handlers)

    def _plan(self, batch: int, grid: tuple[int, int]) -> mrsa.KeyPlan:
        """Which tokens to take from a batch for a token grid; the same in all steps."""
        key = (batch, grid)
        if key not in self._plans:
            members = self._batches[batch].members
            shown = [(row, one) for row, i in enumerate(members) for one in self.job.references[i].subjects]
            self._plans[key] = mrsa.plan_keys(
                torch.stack([token_mask(one.mask, grid) for _, one in shown]),
                [row for row, _ in shown],
                len(members),
                [one.subject.weight for _, one in shown],
                [one.lift for _, one in shown],
                [one.number for _, one in shown],
                self.job.settings.formula,
                self.device,
            )
        return self._plans[key]

    def bias(self, layout: mrsa.KeyLayout, n_own: int, own_tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """`mrsa.bias_row`, computed once per layout and size."""
        key = (id(layout), n_own, own_tokens, dtype)
        if key not in self._biases:
            self._biases[key] = mrsa.bias_row(layout, n_own, own_tokens, dtype)
        return self._biases[key]

    def groups(self, layout: mrsa.KeyLayout, call: AttentionCall, in_place: bool) -> list[mrsa.QueryGroup] | None:
        """`mrsa.query_groups`, computed once per layout and size; None if all queries attend to all subjects.

        Target masks are used if `in_place`, which means that the call has the tokens of the whole picture.
        """
        n_queries, n_own, grid, picture = call.q.shape[1], call.k.shape[1], call.grid, call.picture
        masked = in_place and self.has_target_masks
        if not masked and (picture.start, picture.stop) == (0, n_queries):
            return None
        key = (id(layout), n_queries, n_own, grid, picture.start, picture.stop, masked)
        if key not in self._groups:
            visible = torch.zeros(self.job.subject_count, n_queries, dtype=torch.bool)
            visible[:, picture] = True
            if masked:
                for one in self._subjects:
                    target = binarize(one.subject.target_mask, self.job.settings.mask_threshold, grid)
                    visible[one.number, picture] = token_mask(target, grid)
            self._groups[key] = mrsa.query_groups(visible, layout.owner, n_own)
        return self._groups[key]


def reference_noise(seed: int, step: int, name: int, shape: Sequence[int]) -> torch.Tensor:
    """Noise (1, *shape) for the reference `name` in one step, independent of the sampler's random numbers."""
    digest = hashlib.blake2b(f"{seed} {step} {name}".encode(), digest_size=7).digest()
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")))


def _digest_of(cond: Mapping) -> str:
    """Fingerprint of a conditioning's tensors and numbers."""
    digest = hashlib.sha256()
    for name in sorted(cond):
        value = cond[name]
        if torch.is_tensor(value):
            digest.update(name.encode() + value.detach().float().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, (int, float, str)):
            digest.update(f"{name}={value}".encode())
    return digest.hexdigest()
