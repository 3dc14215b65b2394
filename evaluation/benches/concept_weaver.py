"""Concept Weaver: one row per conditioning, however many concepts there are; a structure source adds a row."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ...encoders import concept_files
from ...encoders.concepts import Concept, Delta
from ...host.model.families import family_of
from ...host.model.sites import CROSS
from ...host.structure.inversion import SourceTrajectory
from ...host.structure.plugandplay import InjectionSettings as Injection
from ...host.structure.plugandplay import apply as inject
from ...host.weaver.fusion import SCORES, FusionSettings, PromptedConcept, apply
from ...samplers.inversion import Trajectory
from ...subjects.partition import Partition
from ..rigs import Rig
from . import Session

SUBJECTS = (1, 2, 5)
RANK, BANK = 16, 100
COVERED = 0.5  # share of the picture that all concepts cover together


def sessions(rig: Rig) -> list[Session]:
    """One session per number of concepts."""
    return [_session(rig, count) for count in SUBJECTS]


def _session(rig: Rig, count: int) -> Session:
    def begin():
        concepts = [PromptedConcept(_concept(rig, i), rig.clip.encode_from_tokens_scheduled("")) for i in range(count)]
        partition = _stripes(count, rig.plan.side)
        source = _source(rig)

        def fused(mode: str = FusionSettings.mode, injected: bool = False):
            model = inject(rig.model, source, Injection()) if injected else rig.model
            model, positive = apply(model, rig.positive, concepts, partition, FusionSettings(mode=mode))
            return lambda: rig.sample(model, 1, positive)

        return {"default": fused(), "with_source": fused(injected=True), "score_mixing": fused(SCORES)}

    # Injection runs the source's row in 0.8 of the steps, in addition to the two rows of plain sampling.
    return Session(count, begin, {"default": 1.10, "with_source": 1.50})


def facts(rig: Rig) -> list[str]:
    """The size of a concept, and the time to read a large bank."""
    with TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.safetensors" for i in range(BANK)]
        for i, file in enumerate(files):
            concept_files.save(_concept(rig, i), file)
        size = files[0].stat().st_size / 2**20
        begin = time.perf_counter()
        bank = [concept_files.load(file) for file in files]
        seconds = time.perf_counter() - begin
    element = rig.model.model.get_dtype_inference().itemsize
    channels = sum(parts["k"].shape[0] + parts["v"].shape[0] for parts in bank[0].deltas.values())
    held = rig.positive[0][0].shape[1] * channels * element / 2**20
    return [
        f"A concept of rank {RANK} takes {size:.2f} MiB on disk and as much in memory; while it is drawn, its keys and "
        f"values take {held:.2f} MiB.",
        f"A bank of {BANK} such concepts is read in {seconds:.2f} s from files that the system holds in memory.",
    ]


def _concept(rig: Rig, number: int) -> Concept:
    """A concept with random factors at all cross-attention layers."""
    unet = rig.model.model.diffusion_model
    deltas = {}
    family = family_of(unet)
    for site in family.sites(unet):
        if site.kind == CROSS:
            weight = unet.get_submodule(family.layer(site.key, "k")).weight
            out, width = weight.shape
            deltas[site.key] = {
                part: Delta((torch.randn(out, RANK) * 0.01, torch.randn(RANK, width) * width**-0.5)) for part in "kv"
            }
    return Concept(f"concept {number}", deltas)


def _stripes(count: int, side: int) -> Partition:
    """Divides part of a picture (side, side) into `count` stripes of equal width; the rest is background."""
    weights = torch.zeros(count + 1, side, side)
    edges = torch.linspace(0, side * COVERED, count + 1).round().long().tolist()
    for i, (left, right) in enumerate(zip(edges, edges[1:], strict=False)):
        weights[i, :, left:right] = 1
    weights[-1] = 1 - weights[:-1].sum(0)
    return Partition(weights)


def _source(rig: Rig) -> SourceTrajectory:
    """A trajectory from noise to noise, which costs the same as any other."""
    latents = torch.randn(2, 1, rig.vae.latent_channels, rig.plan.side, rig.plan.side)
    return SourceTrajectory(Trajectory((0.0, 20.0), latents), rig.positive, 0.0)
