"""What FreeCustom's nodes decide, and what a run hands to its reference passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...subjects.subject import Subject
from ..model.patching import Sampling
from ..model.sites import LAST_TWO_STAGES, Site
from ..model.window import Window
from .bank import RAM, Bank

NEGATIVE_PROMPT, SHARE_POSITIVE = "negative prompt", "share positive"
PER_STEP, FIXED = "per_step", "fixed"
SAMPLER_SEED = -1


@dataclass(frozen=True)
class MrsaSettings:
    """How subjects are drawn on. The defaults are those of the published code.

    Attributes:
        formula: one of `mrsa.FORMULAS`.
        style_fidelity: 1 keeps the unconditional branch plain, 0 gives it the references too.
        blocks: preset or layer numbers, see `sites.choose_self_attention`.
        window: in which references are seen.
        reference_seed: of the references' noise; SAMPLER_SEED follows the sampler.
        reference_noise: PER_STEP draws new noise each step as published, FIXED keeps one.
        balance: 0..1, see `mrsa.balance_biases`.
        mask_threshold: mask value from which a pixel belongs to the subject.
        negative_references: what prompt the unconditional branch's references have, for style_fidelity < 1.
        bank_mib: most that the bank may hold; 0 keeps nothing.
        bank_device: RAM or VRAM.
    """

    formula: str = "official"
    style_fidelity: float = 1.0
    blocks: str = LAST_TWO_STAGES
    window: Window = Window()
    reference_seed: int = 0
    reference_noise: str = PER_STEP
    balance: float = 0.0
    mask_threshold: float = 0.5
    negative_references: str = NEGATIVE_PROMPT
    bank_mib: int = 1024
    bank_device: str = RAM


@dataclass(frozen=True, eq=False)
class ActiveSubject:
    """A subject that is drawn on.

    Attributes:
        number: its place among all subjects of the MODEL, those of weight 0 too.
        subject: as Reference Subject gives it.
        conditioning: the host's, of the reference's prompt.
        mask: (H, W), boolean, of the reference.
        lift: what `mrsa.balance_biases` adds to its weight.
    """

    number: int
    subject: Subject
    conditioning: list
    mask: torch.Tensor
    lift: float


@dataclass(frozen=True, eq=False)
class Reference:
    """One picture with one prompt: a row of the reference pass. It shows one subject or several."""

    subjects: tuple[ActiveSubject, ...]

    @property
    def image(self) -> torch.Tensor:
        """(H, W, 3), 0..1."""
        return self.subjects[0].subject.image

    @property
    def conditioning(self) -> list:
        """The host's, of its prompt."""
        return self.subjects[0].conditioning

    @property
    def name(self) -> int:
        """Of its noise: the number of its first subject, so that switching another subject off changes no noise."""
        return self.subjects[0].number


@dataclass(frozen=True, eq=False)
class ReferenceJob:
    """What the reference passes of one sampling are made of.

    Attributes:
        references: the rows.
        latents: of each row, (1, C, h, w).
        subject_count: how many subjects the MODEL has, those of weight 0 too.
        sites: self-attention sites whose keys and values are kept.
        settings: see there.
        noise_seed: of the references' noise.
        negative: the guider's negative conditioning in the host's inner form, where the unconditional branch's
            references are to see it.
        bank: keeps what the passes leave.
        sampling: the run's.
    """

    references: Sequence[Reference]
    latents: Sequence[torch.Tensor]
    subject_count: int
    sites: Sequence[Site]
    settings: MrsaSettings
    noise_seed: int
    negative: dict | None
    bank: Bank
    sampling: Sampling
