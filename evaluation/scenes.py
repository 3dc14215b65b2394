"""The fixed cases of the report: what is asked for, and the references. The same number always gives the same case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..shapeland import world

_LOT = 7_310_521  # separate from all seeds of training


@dataclass(frozen=True, eq=False)
class Reference:
    """One thing on a background, like a person's photo of a subject.

    Attributes:
        noun: what the thing is called in a prompt.
        prompt: describes the reference picture without its identity.
        image: (SIZE, SIZE, 3), values 0..1.
        mask: (SIZE, SIZE), exact, with soft edges.
        identity: its appearance.
    """

    noun: str
    prompt: str
    image: torch.Tensor
    mask: torch.Tensor
    identity: world.Identity


@dataclass(frozen=True, eq=False)
class Case:
    """One set of references, and the picture asked for: the same nouns, no word about their looks, another background.

    Attributes:
        seed: seed of the pictures' noise.
        prompt: names the nouns and the new background.
        mentions: what the prompt names, one per reference.
        references: the references, which share their background.
        background: index of the new background's color.
        asked, left: colors (3,) of the new background and of the references'.
    """

    seed: int
    prompt: str
    mentions: tuple[world.Mention, ...]
    references: tuple[Reference, ...]
    background: int
    asked: torch.Tensor
    left: torch.Tensor

    def draw(self, count: int, identities: Sequence[world.Identity] | None) -> torch.Tensor:
        """The world's own pictures (count, SIZE, SIZE, 3) of what is asked for, with these or random identities."""
        scenes = [
            world.scene_from(list(self.mentions), self.background, case_rng(self.seed, i), identities)
            for i in range(count)
        ]
        return torch.from_numpy(np.stack([world.render(scene).image for scene in scenes]))


def case_rng(*numbers: int) -> np.random.Generator:
    """The random numbers of a case, apart from all seeds of training."""
    return np.random.default_rng((_LOT, *numbers))


def make_case(subjects: int, index: int) -> Case:
    """Case `index` with this many subjects (1 to 3)."""
    rng = case_rng(subjects, index)
    nouns = [int(noun) for noun in rng.choice(len(world.NOUNS), subjects, replace=False)]
    left, asked = (int(b) for b in rng.choice(len(world.BACKGROUNDS), 2, replace=False))
    mentions = tuple(world.Mention(noun) for noun in nouns)
    return Case(
        seed=subjects * 1000 + index,
        prompt=world.caption_of(list(mentions), asked)[0],
        mentions=mentions,
        references=tuple(_reference(rng, mention, left) for mention in mentions),
        background=asked,
        asked=_color_of(asked),
        left=_color_of(left),
    )


def _color_of(background: int) -> torch.Tensor:
    return torch.tensor(world.BACKGROUND_RGB[world.BACKGROUNDS[background]])


def _reference(rng: np.random.Generator, mention: world.Mention, background: int) -> Reference:
    identity = world.random_identity(rng)
    picture = world.render(world.scene_from([mention], background, rng, [identity]))
    return Reference(
        noun=world.NOUNS[mention.noun],
        prompt=picture.scene.caption,
        image=torch.from_numpy(picture.image),
        mask=torch.from_numpy(picture.masks[0]),
        identity=identity,
    )


def held_out(count: int) -> list[world.Picture]:
    """Pictures of one to three things that no training has seen, for measuring the judge."""
    return [world.render(world.random_scene(case_rng(0, i))) for i in range(count)]
