"""Does a picture obey each representation that it is composed of, alone and with others, and leave the rest alone?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ...compositions.composition import (
    CAPTION,
    DEPTH,
    INSTANCES,
    INTENSITY,
    MASK,
    PALETTE,
    SEMANTICS,
    SKETCH,
    Caption,
    Composition,
    Part,
)
from ...compositions.decompose import decompose
from ...compositions.inputs import check_fits
from ...compositions.instance_map import instance_map
from ...compositions.palette import palette_of_picture
from ...compositions.semantics import Semantics
from ...compositions.sketch import WHITE_ON_BLACK, contours
from ...host.composer import adapter as host
from ...host.composer import prior as prior_host
from ...host.shapeland import load_clip_vision
from ...shapeland import models, world
from .. import metrics, obedience
from ..scenes import case_rng
from ..sheet import SheetRow, contact_sheet
from ..studio import CFG, Studio
from . import Report

SYSTEM = "composer"
FILE = models.WEIGHTS / "composer_adapters" / "shapeland.safetensors"
PRIOR = models.WEIGHTS / "caption_priors" / "shapeland.safetensors"
PRIOR_STEPS, PRIOR_GUIDANCE = 25, 2.0
SUBJECTS = (1, 2)
PER_CASE, SHOWN_CASES = 2, 5
_NEXT_NOISE = 1_000_000
FOUR = (SKETCH, DEPTH, PALETTE, SEMANTICS)
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    **{name: (name,) for name in (PALETTE, SEMANTICS, SKETCH, INSTANCES, DEPTH, INTENSITY, MASK)},
    "sketch_palette": (SKETCH, PALETTE),
    "depth_semantics": (DEPTH, SEMANTICS),
    "intensity_palette": (INTENSITY, PALETTE),
    "default": FOUR,
    "cfg_2": FOUR,
    "cfg_7": FOUR,
    "prior": (),
}
"""Representations of each variant, beside the caption; *prior* has semantics that the prior draws for the caption."""
SCALES = {"cfg_2": 2.0, "cfg_7": 7.0}
"""Guidance scales, where they are not the others'."""
SHOWN = ("plain", PALETTE, SEMANTICS, SKETCH, INSTANCES, DEPTH, INTENSITY, MASK, "default")

ABOUT = """\
The caption names nouns alone. The maps are those of a drawn scene of these nouns, the palette is another scene's, and
the semantics those of a third with the same nouns; *default* has the sketch, the depth, the palette and the semantics
together, from three pictures, at a guidance scale of {scale:g}, and *cfg_2* and *cfg_7* at 2 and 7. *plain* is the
caption on the untouched model, and *prior* has semantics that the prior draws for the caption, anew for each picture.
Every variant draws the same seeds, but that only the first picture of a case by the prior has the noise of the
others.

Each column says how well pictures obey one representation, whether they were given it or not: a row is how one that was
given changes all others. 1 is full obedience.

- **caption**: share of pictures with exactly the nouns asked for.
- **semantics**: cosine of the vision tower's embeddings, which say more than whose thing it is.
- **palette**: 1 minus half the sum of differences of the two histograms.
- **sketch**: F1 of the contours, within {tolerance} pixels.
- **instances**, **depth**: overlap with the map's things, by noun, and of all that is near; the judge reads no order.
- **intensity**: correlation, which a picture that is lighter or of less contrast does not lose.
- **mask**: 1 minus the mean difference of what was to be kept.
- **variety**: 1 minus the cosine of the embeddings of pictures of one case.

Intervals are 95% t-intervals over scenes; where all scenes are equal they have no width and say nothing about others. A
star marks what differs from the default, by the interval of the paired difference."""


@dataclass(frozen=True, eq=False)
class Target:
    """What a case asks for: a composition with all representations, from three pictures.

    Attributes:
        composition: all of them.
        mentions: the nouns of the caption.
        shown: the pictures that it was taken from.
        seed: of the noise.
    """

    composition: Composition
    mentions: tuple[world.Mention, ...]
    shown: tuple[torch.Tensor, ...]
    seed: int


def make_target(subjects: int, index: int, look: Callable[[torch.Tensor], Semantics]) -> Target:
    """Case `index` with this many things; `look` gives the semantics of a picture (H, W, 3)."""
    rng = case_rng(subjects, index)
    nouns = [int(noun) for noun in rng.choice(len(world.NOUNS), subjects, replace=False)]
    mentions = tuple(world.Mention(noun) for noun in nouns)
    backgrounds = [int(b) for b in rng.choice(len(world.BACKGROUNDS), 2, replace=False)]
    one, other = (world.render(world.scene_from(list(mentions), background, rng)) for background in backgrounds)
    colored = world.render(world.random_scene(rng))
    picture, again, colors = (torch.from_numpy(p.image) for p in (one, other, colored))
    masks = torch.from_numpy(one.masks)
    hidden = torch.zeros(picture.shape[:2])
    half = int(rng.integers(2)) * picture.shape[1] // 2
    hidden[:, half : half + picture.shape[1] // 2] = 1
    composition = decompose(
        picture,
        world.caption_of(list(mentions), None)[0],
        sketch=contours(picture)[..., None].expand(-1, -1, 3),
        polarity=WHITE_ON_BLACK,
        instances=instance_map(masks, [world.NOUNS[thing.noun] for thing in one.scene.things]),
        depth=torch.from_numpy(one.depth)[..., None].expand(-1, -1, 3),
        intensity="Rec. 601",
        mask=hidden,
    )
    composition = composition.with_part(PALETTE, palette_of_picture(colors)).with_part(SEMANTICS, look(again))
    return Target(composition, mentions, (picture, colors, again), subjects * 1000 + index)


def report(
    studio: Studio,
    pictures: int,
    _chance: float,
    tell: Callable[[str], None],
    file: Path = FILE,
    prior_file: Path = PRIOR,
) -> Report:
    """Measures every variant; arguments as for `comparison.compare`, and the files of the adapter and the prior.

    Raises:
        FileNotFoundError: one of them is missing.
    """
    for kind, needed in (("adapter", file), ("prior", prior_file)):
        if not needed.exists():
            raise FileNotFoundError(f"the {kind} is missing: {needed.name} in {needed.parent.name}")
    adapter, vision = host.load(str(file), studio.model), load_clip_vision()
    prior = prior_host.load(str(prior_file))

    def look(picture: torch.Tensor) -> Semantics:
        return Semantics(vision.encode_image(picture[None])["image_embeds"][0])

    rows, sheet = [], []
    for subjects in SUBJECTS:
        values: dict[str, dict[str, list[float]]] = {}
        cases: list[int] = []
        for index in range(-(-pictures // PER_CASE)):
            count = min(PER_CASE, pictures - index * PER_CASE)
            target = make_target(subjects, index, look)
            check_fits(target.composition, adapter.module.config)
            draw = partial(draw_variants, studio, adapter, prior, target, count)
            drawn = studio.kept.drawn(f"{SYSTEM}_{subjects}_{index}_{count}", draw)
            for variant, made in drawn.items():
                for scores in measure(studio, target, made, look):
                    for metric, value in scores.items():
                        values.setdefault(variant, {}).setdefault(metric, []).append(value)
            cases += [target.seed] * count
            if index < SHOWN_CASES:
                text = str(target.composition[CAPTION])
                sheet.append(SheetRow(text, target.shown, {name: drawn[name][0] for name in SHOWN}))
            tell(f"{SYSTEM}, {subjects} things: {len(cases)} of {pictures} pictures in {len(VARIANTS)} variants")
        compared = [name for name in VARIANTS if name != "default"]
        rows += metrics.report_rows(SYSTEM, subjects, values, cases, compared, obedience.RANGES)
    return Report(rows, ABOUT.format(tolerance=obedience.TOLERANCE, scale=CFG), contact_sheet(sheet))


def draw_variants(
    studio: Studio, adapter: host.LoadedAdapter, prior: prior_host.LoadedPrior, target: Target, count: int
) -> dict[str, torch.Tensor]:
    """Pictures (count, H, W, 3) of every variant with the same noise; those of the prior each with noise of its own."""
    given, text = target.composition, str(target.composition[CAPTION])
    prepared, drawn = host.prepared(studio.model), {}
    for variant, names in VARIANTS.items():
        if variant == "prior":
            drawn[variant] = _draw_by_prior(studio, adapter, prior, target, count)
            continue
        if not names:
            drawn[variant] = studio.draw(studio.model, text, target.seed, count)
            continue
        parts = {name: given.parts[name] for name in names} | {CAPTION: Part(Caption(((text, 1.0),)))}
        positive = host.encode(adapter, studio.clip, Composition(given.size, parts))
        drawn[variant] = studio.draw(prepared, text, target.seed, count, positive, SCALES.get(variant, CFG))
    return drawn


def _draw_by_prior(
    studio: Studio, adapter: host.LoadedAdapter, prior: prior_host.LoadedPrior, target: Target, count: int
) -> torch.Tensor:
    caption, model = target.composition[CAPTION], host.prepared(studio.model)
    text, pictures = str(caption), []
    found = prior_host.draw(prior, studio.clip, text, count, target.seed, PRIOR_STEPS, PRIOR_GUIDANCE)
    for i, semantics in enumerate(found):
        parts = {CAPTION: Part(Caption(((text, 1.0),))), SEMANTICS: Part(semantics)}
        positive = host.encode(adapter, studio.clip, Composition(target.composition.size, parts))
        pictures.append(studio.draw(model, text, target.seed + i * _NEXT_NOISE, 1, positive))
    return torch.cat(pictures)


def measure(
    studio: Studio, target: Target, pictures: torch.Tensor, look: Callable[[torch.Tensor], Semantics]
) -> list[dict[str, float]]:
    """How well each of some pictures (n, H, W, 3) of one case obeys each representation of a target, and their
    variety."""
    given, found = target.composition, []
    looks = [look(picture) for picture in pictures]
    variety = obedience.variety(looks)
    for picture, seen, readings in zip(pictures, looks, studio.read(pictures), strict=True):
        found.append(
            {
                CAPTION: obedience.caption(readings, target.mentions),
                SEMANTICS: obedience.semantics(seen, given[SEMANTICS]),
                PALETTE: obedience.palette(picture, given[PALETTE]),
                SKETCH: obedience.sketch(picture, given[SKETCH]),
                INSTANCES: obedience.instances(readings, given[INSTANCES]),
                DEPTH: obedience.depth(readings, given[DEPTH]),
                INTENSITY: obedience.intensity(picture, given[INTENSITY]),
                MASK: obedience.mask(picture, given[MASK]),
                obedience.VARIETY: variety,
            }
        )
    return found
