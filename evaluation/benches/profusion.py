"""Fusion sampling: the evaluations of two stages, for subjects that are conditionings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import comfy.samplers
import torch

from ...host import shapeland
from ...host.model.window import Window
from ...host.profusion import promptnet as words
from ...host.profusion.guider import FusionGuider, Guidance
from ...host.profusion.sampler import fusion_sampler
from ...shapeland.world import SIZE
from ...subjects.subject import Subject
from ..reports.profusion import PROMPTNET
from ..rigs import SAMPLER, Rig
from . import Session

SUBJECTS = (1, 2)
RANGE = Window(0.8, 1.0)


def sessions(rig: Rig) -> list[Session]:
    """One session per number of subjects."""
    return [_session(rig, count) for count in SUBJECTS]


def _session(rig: Rig, count: int) -> Session:
    def begin():
        subjects = [rig.clip.encode_from_tokens_scheduled("") for _ in range(count)]
        fused = partial(_fused, rig, rig.model, rig.positive, subjects)
        samplings = {
            "default": fused(),
            "reuse": fused(reuse=True),
            "range": fused(window=RANGE),
            "composable": fused(repeats=0),
        }
        if count == 1 and rig.plan.label == "tiny":
            samplings |= _by_words(rig)
        return samplings

    # Two conditionings in the fusion stage and three in refinement, where plain guidance has two, for one subject.
    budgets = {"default": 2.5, "words": 2.5, "range": 1.6} if count == 1 else {"default": 3.5}
    return Session(count, begin, budgets)


def _fused(rig: Rig, model, text: list, subjects: list, repeats: int = 1, window: Window | None = None, reuse=False):
    guider = FusionGuider(model, text, rig.negative, subjects, Guidance(reuse=reuse))
    sampler = fusion_sampler(comfy.samplers.sampler_object(SAMPLER), repeats, 1.0, window or Window())
    return lambda: rig.sample_with(guider, sampler, 1)


def _by_words(rig: Rig) -> dict[str, Callable[[], object]]:
    """Shapeland's PromptNet and text encoder make the subject's word anew in each step, or once."""
    net, clip, vision = words.load(str(PROMPTNET)), shapeland.load_clip(), shapeland.load_clip_vision()
    star, model = Subject(torch.rand(SIZE, SIZE, 3), "star"), words.prepared(rig.model)
    found = {}
    for name, update in (("words", words.EVERY_STEP), ("words_once", words.ONCE)):
        text, subject = words.encode(net, clip, vision, rig.vae, "a star", [star], update=update)
        found[name] = _fused(rig, model, text, [subject])
    return found
