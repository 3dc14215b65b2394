"""The settings of FreeCustom's nodes, and the inputs of the reference passes."""

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
    """How references are used. The defaults are those of the published code.

    Attributes:
        formula: one of `mrsa.FORMULAS`.
        style_fidelity: 1 keeps attention of the unconditional branch plain, 0 gives it the references too.
        blocks: preset or layer numbers, see `sites.choose_self_attention`.
        window: the part of the schedule in which references are used.
        reference_seed: seed of the references' noise; SAMPLER_SEED uses the sampler's seed.
        reference_noise: PER_STEP draws new noise in each step, as published; FIXED uses the same noise in all steps.
        balance: 0..1, see `mrsa.balance_biases`.
        mask_threshold: lowest mask value of a pixel that belongs to the subject.
        negative_references: which references the unconditional branch attends to if style_fidelity < 1:
            NEGATIVE_PROMPT those of a second pass with the negative prompt, SHARE_POSITIVE those of the positive.
        bank_mib: limit of the bank; 0 keeps nothing.
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
    """A subject with weight above 0.

    Attributes:
        number: its index among all subjects of the MODEL, including those with weight 0.
        subject: from Reference Subject or Concept Collage.
        conditioning: conditioning of the reference's prompt.
        mask: (H, W), boolean, where the subject is in the reference.
        lift: log-odds from `mrsa.balance_biases`, added to its weight.
    """

    number: int
    subject: Subject
    conditioning: list
    mask: torch.Tensor
    lift: float


@dataclass(frozen=True, eq=False)
class Reference:
    """A picture with a prompt, which is one row of the reference pass. It shows one or more subjects."""

    subjects: tuple[ActiveSubject, ...]

    @property
    def image(self) -> torch.Tensor:
        """The picture, (H, W, 3), 0..1."""
        return self.subjects[0].subject.image

    @property
    def conditioning(self) -> list:
        """The conditioning of the prompt."""
        return self.subjects[0].conditioning

    @property
    def name(self) -> int:
        """Identifies its noise: the number of its first subject, so that switching others off keeps the noise."""
        return self.subjects[0].number


@dataclass(frozen=True, eq=False)
class ReferenceJob:
    """The inputs of the reference passes of one sampling.

    Attributes:
        references: the rows.
        latents: latent of each row, (1, C, h, w).
        subject_count: number of subjects on the MODEL, including those with weight 0.
        sites: self-attention sites whose keys and values are recorded.
        settings: the node's settings.
        noise_seed: seed of the references' noise.
        negative: the guider's negative conditioning in ComfyUI's internal form, if the unconditional branch's
            references use it.
        bank: keeps the keys and values.
        sampling: the sampling that the passes belong to.
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
