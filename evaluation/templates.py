"""The fixed cases of Concept Weaver's report: scenes drawn by the world as templates, and concepts to put into them.

`python tools/run.py evaluation.templates` (with COMFYUI_PATH set) trains the concepts with the recipe of the node Train
Concept, prints how long each took, and writes them, compressed, to `shapeland/weights/concepts/`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from ..encoders import concept_files
from ..encoders.concepts import Concept
from ..shapeland import world
from ..shapeland.judge import Reading
from ..shapeland.models import WEIGHTS
from ..shapeland.score import assign
from .scenes import Case, Reference

FOLDER = WEIGHTS / "concepts"
IDENTITIES = {"star": 41, "fish": 42, "heart": 43, "mug": 44, "house": 45, "ball": 46}
"""The nouns that have a concept, each with the seed by which Draw Scene draws the concept's identity."""
NOUNS = tuple(IDENTITIES)
BACKGROUND = "background"
"""The concept of a background whose color the world has no word for."""
PICTURES, RANK = 8, 8
_GROUND = (0.95, 0.62, 0.30)
_LOT = 5_190_733


def _lot(*numbers: int) -> np.random.Generator:
    return np.random.default_rng((_LOT, *numbers))


def identity_of(noun: str) -> world.Identity:
    """The identity of a noun's concept."""
    return world.random_identity(np.random.default_rng((IDENTITIES[noun], 0)))


def drawings(name: str) -> list[tuple[world.Picture, str]]:
    """The pictures that a concept is trained on, with captions in which {} stands for it."""
    found = []
    for i in range(PICTURES):
        if name == BACKGROUND:
            scene = world.random_scene(_lot(1, i), 1)
            picture = world.render(replace(scene, background_rgb=_GROUND))
            found.append((picture, f"a {world.NOUNS[scene.things[0].noun]} on a {{}}"))
        else:
            mention = world.Mention(world.NOUNS.index(name))
            ground = i % len(world.BACKGROUNDS)
            picture = world.render(
                world.scene_from([mention], ground, _lot(2, NOUNS.index(name), i), [identity_of(name)])
            )
            found.append((picture, picture.scene.caption.replace(name, "{}")))
    return found


def load_bank() -> dict[str, Concept]:
    """The shipped concepts by name.

    Raises:
        FileNotFoundError: one is missing; the message says how to make it.
    """
    bank = {}
    for name in (*NOUNS, BACKGROUND):
        file = FOLDER / f"{name}.safetensors"
        if not file.exists():
            raise FileNotFoundError(
                f"The concept {name} is not at {file}: train it with `python tools/run.py evaluation.templates`."
            )
        bank[name] = concept_files.load(file)
    return bank


@dataclass(frozen=True, eq=False)
class TemplateCase(Case):
    """A case whose pictures keep the layout of a template.

    Attributes:
        names: names of the concepts, in the order of the mentions.
        scene: the template's scene.
    """

    names: tuple[str, ...]
    scene: world.Scene

    @cached_property
    def template(self) -> world.Picture:
        """The template as drawn."""
        return world.render(self.scene)

    @property
    def masks(self) -> torch.Tensor:
        """(N, SIZE, SIZE), masks of the mentioned things in the template."""
        nouns = [thing.noun for thing in self.scene.things]
        order = [nouns.index(mention.noun) for mention in self.mentions]
        return torch.from_numpy(self.template.masks[order])

    def draw(self, count: int, identities: Sequence[world.Identity] | None) -> torch.Tensor:
        """The template's scene with these identities, or with random ones, `count` times."""
        chosen = [world.random_identity(_lot(3, self.seed, i)) for i in range(len(self.mentions))]
        by_noun = {m.noun: identity for m, identity in zip(self.mentions, identities or chosen, strict=True)}
        things = tuple(replace(thing, identity=by_noun[thing.noun]) for thing in self.scene.things)
        picture = world.render(replace(self.scene, things=things)).image
        return torch.from_numpy(np.stack([picture] * count))


def template_case(subjects: int, index: int) -> TemplateCase:
    """Case `index` with this many concepts (1 to 5)."""
    rng = _lot(4, subjects, index)
    names = tuple(NOUNS[i] for i in rng.choice(len(NOUNS), subjects, replace=False))
    left, asked = (int(b) for b in rng.choice(len(world.BACKGROUNDS), 2, replace=False))
    mentions = [world.Mention(world.NOUNS.index(name)) for name in names]
    references = []
    for mention, name in zip(mentions, names, strict=True):
        identity = identity_of(name)
        picture = world.render(world.scene_from([mention], left, rng, [identity]))
        image, mask = torch.from_numpy(picture.image), torch.from_numpy(picture.masks[0])
        references.append(Reference(name, picture.scene.caption, image, mask, identity))
    colors = [torch.tensor(world.BACKGROUND_RGB[world.BACKGROUNDS[b]]) for b in (asked, left)]
    scene = world.scene_from(mentions, asked, rng)
    seed = subjects * 1000 + index
    return TemplateCase(
        seed, scene.caption, tuple(mentions), tuple(references), asked, *colors, names=names, scene=scene
    )


def structure(case: TemplateCase, readings: list[Reading]) -> float:
    """How well things keep their places in the template: the mean over mentions of the intersection over union of the
    thing's mask in the template and that of the largest thing with its noun; a missing one counts as 0."""
    values = []
    for mask, found in zip(case.masks > 0.5, assign(list(case.mentions), readings), strict=True):
        seen = found[0].mask.to(mask.device) if found else torch.zeros_like(mask)
        values.append(float((mask & seen).sum() / (mask | seen).sum()))
    return sum(values) / len(values)


def main(argv: list[str]) -> None:
    """Trains the named concepts, all by default."""
    parser = argparse.ArgumentParser(prog="evaluation.templates", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join((*NOUNS, BACKGROUND))}")
    known = (*NOUNS, BACKGROUND)
    names = parser.parse_args(argv).names or known
    for name in names:
        if name not in known:
            parser.error(f"there is no concept {name!r}: choose from {', '.join(known)}")
    from ..host.weaver.studio import train_with_progress
    from ..training.concepts.learner import Recipe
    from ..training.concepts.pictures import Pictures
    from .studio import Studio

    studio = Studio.open()
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        drawn = drawings(name)
        pictures = Pictures(
            [torch.from_numpy(picture.image) for picture, _ in drawn],
            [None] * len(drawn),
            [caption for _, caption in drawn],
        )
        with torch.inference_mode():
            concept, _, said = train_with_progress(
                studio.model,
                studio.clip,
                studio.vae,
                pictures,
                name,
                f"<{name}>",
                Recipe(),
                world.SIZE,
                class_pictures=16,
            )
        concept_files.save(concept.compressed(RANK), FOLDER / f"{name}.safetensors")
        print(said, flush=True)
