"""The drawn world: pictures of one to three things on a background, with ground truth for everything in them.

A **thing** has a noun (its silhouette) and an **identity**: two colors and a pattern with continuous parameters.
Captions name the noun, and mostly colors and pattern, never the parameters: an identity is more than words tell. Equal
nouns in one picture share one identity: a model that draws two of them has to carry appearance from one to the other,
which is what self-attention does and what multi-reference methods build on.

Everything here is numpy and deterministic by seed. Pictures are float32 in [0, 1], shape (SIZE, SIZE, 3), RGB.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

import numpy as np

SIZE = 64
NOUNS = ("ball", "star", "heart", "tree", "fish", "mug", "house", "moon")
PLURALS = ("balls", "stars", "hearts", "trees", "fish", "mugs", "houses", "moons")
PATTERNS = ("striped", "dotted", "checked", "ringed")
COUNTS = ("a", "two", "three")
SIZES = ("small", "big")
ACROSS = ("left", "right")
DOWN = ("top", "bottom")
MAX_THINGS = 5
"""Most things in one picture; the pictures that Shapeland's models are trained on have up to three."""

# Hue in degrees at the center of each named thing color; identities vary around it (see `random_identity`).
THING_HUES = {
    "red": 0.0, "orange": 28.0, "yellow": 55.0, "green": 120.0,
    "teal": 180.0, "blue": 224.0, "purple": 276.0, "pink": 322.0,
}  # fmt: skip
COLORS = tuple(THING_HUES)
# Muted colors that no thing has, so that a thing never blends into its background.
BACKGROUND_RGB = {
    "white": (0.94, 0.94, 0.93), "gray": (0.55, 0.56, 0.58), "black": (0.10, 0.10, 0.12),
    "beige": (0.84, 0.76, 0.62), "navy": (0.13, 0.19, 0.34), "mint": (0.72, 0.87, 0.79),
}  # fmt: skip
BACKGROUNDS = tuple(BACKGROUND_RGB)

_DETAIL_RGB = np.array((0.16, 0.15, 0.18), np.float32)
_SUPERSAMPLING = 3
_SECOND_SHARE = (0.33, 0.45)
# Captions place a thing at an edge of the picture if its center is nearer to it than this, in pixels.
_EDGE = 24.0


RADIUS = {1: (14.0, 20.0), 2: (11.0, 15.5), 3: (10.5, 13.0), 4: (8.5, 10.5), 5: (8.0, 9.5)}
"""The range of a thing's radius in pixels, by the number of things."""
PERIOD = 9.0, 13.0
"""The range of a pattern's period in pixels."""
DETAILED, BARE, PLACED = 0.7, 0.15, 0.5
"""A share of captions gives the full appearance of every thing, and a share only nouns; the others say of each thing
what `describe` draws. A share of all captions says where things are and whether they are big or small."""


@dataclass(frozen=True)
class Identity:
    """The appearance of a thing: what a reference picture shows and words do not.

    `color` and `second` index COLORS, `rgb` and `second_rgb` are their exact values in [0, 1]; `pattern` indexes
    PATTERNS, `period` is in pixels, `angle` in radians, `share` is the share of the area in the second color.
    """

    color: int
    rgb: tuple[float, float, float]
    second: int
    second_rgb: tuple[float, float, float]
    pattern: int
    period: float
    angle: float
    share: float

    def vector(self) -> np.ndarray:
        """The identity as 14 numbers of comparable scale: both colors, pattern one-hot, period, share, angle."""
        low, high = PERIOD
        first, last = _SECOND_SHARE
        # A pattern looks the same after half a turn (stripes), a quarter turn (dots, checks) or any turn (rings).
        symmetry = (2.0, 4.0, 4.0, 0.0)[self.pattern]
        turn = (np.cos(symmetry * self.angle), np.sin(symmetry * self.angle)) if symmetry else (0.0, 0.0)
        return np.array(
            (
                *self.rgb,
                *self.second_rgb,
                *np.eye(len(PATTERNS))[self.pattern],
                (self.period - low) / (high - low),
                (self.share - first) / (last - first),
                *turn,
            ),
            np.float32,
        )


@dataclass(frozen=True)
class Thing:
    """A noun with an identity at a place: center `x`, `y`, `radius` in pixels, `tilt` in radians, mirrored or not."""

    noun: int
    identity: Identity
    x: float
    y: float
    radius: float
    tilt: float = 0.0
    mirrored: bool = False


@dataclass(frozen=True)
class Scene:
    """Things from the farthest to the nearest, a background, the caption, and the words of the caption for each thing.

    `noun_words[i]` is the index of thing i's noun among the caption's words; `attribute_words[i]` are the indices of
    the words that describe it. Every word of a caption is one token of CLIP's vocabulary.
    """

    things: tuple[Thing, ...]
    background: int
    background_rgb: tuple[float, float, float]
    caption: str
    noun_words: tuple[int, ...]
    attribute_words: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Picture:
    """A drawn scene: `image` (SIZE, SIZE, 3), `masks` (things, SIZE, SIZE) of the visible parts with soft edges, and
    `depth` (SIZE, SIZE), 0 for the background and (i + 1) / max(3, things) for thing i."""

    scene: Scene
    image: np.ndarray
    masks: np.ndarray
    depth: np.ndarray

    def palette(self) -> np.ndarray:
        """Colors of the picture and their shares of its area: rows (r, g, b, share), background first; sum 1."""
        areas = self.masks.reshape(len(self.masks), -1).mean(1)
        rows = [(*self.scene.background_rgb, 1.0 - areas.sum())]
        for thing, area in zip(self.scene.things, areas, strict=True):
            identity = thing.identity
            rows.append((*identity.rgb, area * (1 - identity.share)))
            rows.append((*identity.second_rgb, area * identity.share))
        return np.array(rows, np.float32)


# --- silhouettes: functions of unit coordinates (y down) to (inside, detail) booleans -------------------------------


def _polygon(x, y, corners):
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _circle(x, y, cx, cy, radius):
    return (x - cx) ** 2 + (y - cy) ** 2 < radius**2


def _box(x, y, left, top, right, bottom):
    return (x > left) & (x < right) & (y > top) & (y < bottom)


_STAR = [(r * np.sin(k * np.pi / 5), 0.06 - r * np.cos(k * np.pi / 5)) for k, r in enumerate((1.05, 0.48) * 5)]


def _ball(x, y):
    return _circle(x, y, 0, 0, 0.92), None


def _star(x, y):
    return _polygon(x, y, _STAR), None


def _heart(x, y):
    u, v = x * 1.22, -(y * 1.22) + 0.14
    return (u**2 + v**2 - 1) ** 3 - u**2 * v**3 < 0, None


def _tree(x, y):
    crown = _polygon(x, y, [(0, -1.05), (0.62, -0.15), (-0.62, -0.15)]) | _polygon(
        x, y, [(0, -0.62), (0.85, 0.62), (-0.85, 0.62)]
    )
    trunk = _box(x, y, -0.17, 0.55, 0.17, 1.0)
    return crown | trunk, trunk & ~crown


def _fish(x, y):
    body = (x + 0.18) ** 2 / 0.82**2 + y**2 / 0.58**2 < 1
    tail = _polygon(x, y, [(0.38, 0.0), (1.05, -0.62), (1.05, 0.62)])
    return body | tail, _circle(x, y, -0.58, -0.14, 0.12)


def _mug(x, y):
    cup = _box(x, y, -0.85, -0.78, 0.45, 0.85)
    handle = _circle(x, y, 0.45, 0.02, 0.52) & ~_circle(x, y, 0.45, 0.02, 0.27) & (x > 0.4)
    return cup | handle, None


def _house(x, y):
    wall = _box(x, y, -0.68, -0.15, 0.68, 0.9)
    roof = _polygon(x, y, [(0, -1.0), (1.0, -0.1), (-1.0, -0.1)])
    return wall | roof, _box(x, y, -0.18, 0.38, 0.18, 0.9)


def _moon(x, y):
    return _circle(x, y, -0.05, 0, 0.98) & ~_circle(x, y, 0.42, -0.1, 0.72), None


_SILHOUETTES = (_ball, _star, _heart, _tree, _fish, _mug, _house, _moon)


def _second_color(identity: Identity, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Where the second color is, at pixel offsets (u, v) from the thing's center."""
    c, s = np.cos(identity.angle), np.sin(identity.angle)
    a, b = (u * c + v * s) / identity.period, (v * c - u * s) / identity.period
    share = identity.share
    pattern = PATTERNS[identity.pattern]
    if pattern == "striped":
        return np.abs(a - np.round(a)) < share / 2
    if pattern == "ringed":
        radius = np.hypot(a, b)
        return np.abs(radius - np.round(radius)) < share / 2
    if pattern == "dotted":
        return np.hypot(a - np.round(a), b - np.round(b)) < np.sqrt(share / np.pi)
    # Checks are a grid of lines: squares, which one would expect, cannot be told from dots at this size.
    width = 1 - np.sqrt(1 - share)
    return (np.abs(a - np.round(a)) < width / 2) | (np.abs(b - np.round(b)) < width / 2)


def render(scene: Scene, enlarge: int = 1) -> Picture:
    """Draws `scene` with antialiased edges at `enlarge` times the world's size; returns it with its ground truth."""
    n, k = SIZE * enlarge, _SUPERSAMPLING
    # A faint light from above makes the background a surface instead of a constant.
    light = np.linspace(0.03, -0.03, n, dtype=np.float32)[:, None, None]
    image = np.clip(np.broadcast_to(np.array(scene.background_rgb, np.float32), (n, n, 3)) + light, 0, 1)
    masks = np.zeros((len(scene.things), n, n), np.float32)
    depth = np.zeros((n, n), np.float32)
    for i, thing in enumerate(scene.things):
        reach = int(np.ceil(thing.radius * 1.15)) + 1
        x0, x1 = (enlarge * v for v in (max(0, int(thing.x) - reach), min(SIZE, int(thing.x) + reach + 1)))
        y0, y1 = (enlarge * v for v in (max(0, int(thing.y) - reach), min(SIZE, int(thing.y) + reach + 1)))
        xs = (np.arange(x0 * k, x1 * k, dtype=np.float32) + 0.5) / (k * enlarge) - thing.x
        ys = (np.arange(y0 * k, y1 * k, dtype=np.float32) + 0.5) / (k * enlarge) - thing.y
        u, v = np.meshgrid(xs, ys)
        c, s = np.cos(thing.tilt), np.sin(thing.tilt)
        a, b = (u * c + v * s) / thing.radius, (v * c - u * s) / thing.radius
        inside, detail = _SILHOUETTES[thing.noun](-a if thing.mirrored else a, b)
        identity = thing.identity
        color = np.where(
            _second_color(identity, u, v)[..., None],
            np.array(identity.second_rgb, np.float32),
            np.array(identity.rgb, np.float32),
        )
        if detail is not None:
            color = np.where((detail & inside)[..., None], _DETAIL_RGB, color)
        weight = inside.astype(np.float32)[..., None]
        shape = (y1 - y0, k, x1 - x0, k)
        alpha = weight.reshape(*shape, 1).mean((1, 3))
        painted = (color * weight).reshape(*shape, 3).mean((1, 3))
        here = (slice(y0, y1), slice(x0, x1))
        image[here] = image[here] * (1 - alpha) + painted
        masks[:, y0:y1, x0:x1] *= 1 - alpha[..., 0]
        masks[i, y0:y1, x0:x1] = alpha[..., 0]
        depth[here] = depth[here] * (1 - alpha[..., 0]) + alpha[..., 0] * (i + 1) / max(3, len(scene.things))
    return Picture(scene, image.astype(np.float32), masks, depth)


# --- random scenes --------------------------------------------------------------------------------------------------


def _color_near(rng: np.random.Generator, color: int) -> tuple[float, float, float]:
    hue = (list(THING_HUES.values())[color] + rng.uniform(-7, 7)) % 360 / 360
    # Pink and yellow are light, orange must stay away from brown: the ranges keep every name unmistakable.
    return colorsys.hsv_to_rgb(hue, rng.uniform(0.72, 0.95), rng.uniform(0.80, 1.0))


def random_identity(
    rng: np.random.Generator,
    color: int | None = None,
    second: int | None = None,
    pattern: int | None = None,
) -> Identity:
    """An identity with the given parts fixed (indices into COLORS and PATTERNS) and the rest drawn from `rng`."""
    drawn_color, drawn_second, drawn_pattern = rng.integers(len(COLORS)), rng.integers(1, len(COLORS)), rng.integers(4)
    if color is None:
        color = int(drawn_color) if second is None else (second + int(drawn_second)) % len(COLORS)
    if second is None:
        second = (color + int(drawn_second)) % len(COLORS)
    return Identity(
        color=color,
        rgb=_color_near(rng, color),
        second=second,
        second_rgb=_color_near(rng, second),
        pattern=int(drawn_pattern) if pattern is None else pattern,
        period=float(rng.uniform(*PERIOD)),
        angle=float(rng.uniform(0, np.pi)),
        share=float(rng.uniform(*_SECOND_SHARE)),
    )


@dataclass(frozen=True)
class Mention:
    """What a caption says about one kind of thing: its noun, its count, the given parts of its identity, and for a
    single thing its size and position (indices into SIZES, ACROSS and DOWN); None where the caption says nothing."""

    noun: int
    count: int = 1
    color: int | None = None
    second: int | None = None
    pattern: int | None = None
    size: int | None = None
    across: int | None = None
    down: int | None = None


def caption_of(mentions: list[Mention], background: int | None) -> tuple[str, list[int], list[tuple[int, ...]]]:
    """The caption of `mentions`, and for each mention the word index of its noun and those of its attributes."""
    words: list[str] = []
    nouns, attributes = [], []
    for i, m in enumerate(mentions):
        if i:
            words.append("and")
        words.append(COUNTS[m.count - 1])
        start = len(words)
        if m.size is not None:
            words.append(SIZES[m.size])
        if m.color is not None:
            if m.count == 1 and m.size is None and COLORS[m.color][0] in "aeiou":
                words[-1] = "an"
            words.append(COLORS[m.color])
            if m.second is not None:
                words += ["and", COLORS[m.second]]
        if m.pattern is not None:
            words.append(PATTERNS[m.pattern])
        described = [j for j in range(start, len(words)) if words[j] != "and"]
        nouns.append(len(words))
        words.append((NOUNS if m.count == 1 else PLURALS)[m.noun])
        place = [names[at] for names, at in ((DOWN, m.down), (ACROSS, m.across)) if at is not None]
        if place:
            words += ["at", "the", *place]
        attributes.append((*described, *range(len(words) - len(place), len(words))))
    if background is not None:
        words += ["on", "a", BACKGROUNDS[background], "background"]
    return " ".join(words), nouns, attributes


def parse_caption(caption: str) -> tuple[list[Mention], int | None]:
    """Parses a caption of this world's grammar into mentions and background (index or None).

    Raises ValueError if the caption cannot be understood or holds too many things.
    """
    words = caption.lower().replace(",", " and ").replace(".", " ").split()
    background = None
    if "background" in words:
        at = words.index("background")
        if at == 0 or words[at - 1] not in BACKGROUNDS:
            named = words[at - 1] if at else ""
            raise ValueError(
                f"The background is '{named}' in '{caption}', but must be one of {', '.join(BACKGROUNDS)}."
            )
        background = BACKGROUNDS.index(words[at - 1])
        words = words[: at - 1]
    mentions: list[Mention] = []
    current: dict = {}
    for word in words:
        if word in ("a", "an", "the", "one", "on", "and", "with", "at"):
            continue
        if word in COUNTS:
            current["count"] = COUNTS.index(word) + 1
        elif word in COLORS:
            current["second" if "color" in current else "color"] = COLORS.index(word)
        elif word in PATTERNS:
            current["pattern"] = PATTERNS.index(word)
        elif word in SIZES:
            current["size"] = SIZES.index(word)
        elif word in (*ACROSS, *DOWN):
            mentions = _placed(mentions, current, word, caption)
        elif word in NOUNS or word in PLURALS:
            noun = NOUNS.index(word) if word in NOUNS else PLURALS.index(word)
            if current.get("color") is not None and current.get("color") == current.get("second"):
                raise ValueError(f"'{caption}' gives a {word} the same color twice, but the two colors must differ.")
            mentions.append(Mention(noun, **current))
            current = {}
        else:
            raise ValueError(
                f"Shapeland does not know the word '{word}' in '{caption}': things are {', '.join(NOUNS)}; colors "
                f"{', '.join(COLORS)}; patterns {', '.join(PATTERNS)}; sizes {', '.join(SIZES)}; places "
                f"{', '.join((*ACROSS, *DOWN))}; backgrounds {', '.join(BACKGROUNDS)}."
            )
    if current or not mentions:
        raise ValueError(f"'{caption}' must name at least one of {', '.join(NOUNS)} and end each description with it.")
    total = sum(m.count for m in mentions)
    if total > MAX_THINGS:
        raise ValueError(f"'{caption}' names {total} things, but a picture holds at most {MAX_THINGS}.")
    return mentions, background


def _placed(mentions: list[Mention], current: dict, word: str, caption: str) -> list[Mention]:
    """`mentions` with the position `word` added to the last of them."""
    if current or not mentions:
        raise ValueError(f"'{word}' in '{caption}' must follow the thing that is there, as in 'a ball at the {word}'.")
    name, names = ("across", ACROSS) if word in ACROSS else ("down", DOWN)
    last = mentions[-1]
    if last.count > 1:
        raise ValueError(f"'{word}' in '{caption}' is said of {last.count} things, but can be said of one only.")
    return [*mentions[:-1], replace(last, **{name: names.index(word)})]


def size_of(radius: float, count: int) -> int | None:
    """The index of the word for a thing's size in a picture of `count` things: small and big are the lower and the
    upper third of the radii, None is between."""
    low, high = RADIUS[count]
    third = (radius - low) / (high - low) * 3
    return 0 if third < 1 else 1 if third > 2 else None


def edge_of(center: float) -> int | None:
    """0 at the left or the top, 1 at the right or the bottom, None in between."""
    return 0 if center < _EDGE else 1 if center > SIZE - _EDGE else None


def _places(rng: np.random.Generator, mentions: list[Mention]) -> list[tuple[int, float, float, float]]:
    """The things of `mentions` as (mention, x, y, radius), overlapping only slightly, from the farthest to the nearest:
    what is lower in the picture is nearer, as on a floor seen from above.

    Raises ValueError if there is no room for them at the positions that the caption gives.
    """
    owners = np.array([i for i, m in enumerate(mentions) for _ in range(m.count)])
    count, tries = len(owners), 256
    low, high = RADIUS[count]
    third = (high - low) / 3
    said = [mentions[i] for i in owners]
    smallest = np.array([low + 2 * third if m.size == 1 else low for m in said])
    largest = np.array([low + third if m.size == 0 else high for m in said])
    bounds = {}
    for name in ("across", "down"):
        at = [getattr(m, name) for m in said]
        first = np.array([SIZE - _EDGE if a == 1 else 0.0 for a in at])
        last = np.array([_EDGE if a == 0 else float(SIZE) for a in at])
        bounds[name] = first, last
    apart = ~np.eye(count, dtype=bool)
    for attempt in range(60):
        radii = rng.uniform(smallest, largest, (tries, count))
        margin = radii * 0.92
        xs, ys = (
            rng.uniform(np.maximum(bounds[n][0], margin), np.minimum(bounds[n][1], SIZE - margin))
            for n in ("across", "down")
        )
        gaps = np.hypot(xs[:, :, None] - xs[:, None], ys[:, :, None] - ys[:, None])
        gaps = gaps / (radii[:, :, None] + radii[:, None])
        fits = np.ones(tries, bool) if count == 1 else gaps[:, apart].min(1) > 0.86
        # Given positions take precedence over the order, which is dropped if no attempt satisfies both.
        if attempt < 40:
            centers = np.stack([xs[:, owners == i].mean(1) for i in range(len(mentions))], 1)
            fits &= (np.diff(centers, axis=1) > 0).all(1)
        if fits.any():
            best = int(fits.argmax())
            things = zip(owners.tolist(), xs[best].tolist(), ys[best].tolist(), radii[best].tolist(), strict=True)
            return sorted(things, key=lambda thing: thing[2])
    raise ValueError(f"'{caption_of(mentions, None)[0]}' leaves no room for all things where it wants them.")


def _lay_out(
    mentions: list[Mention], kinds: dict[int, Identity], rng: np.random.Generator
) -> tuple[list[Thing], list[int]]:
    """The things of `mentions`, whose nouns have the identities `kinds`, and the index of each thing's mention."""
    places, things = _places(rng, mentions), []
    for owner, x, y, radius in places:
        noun = mentions[owner].noun
        things.append(Thing(noun, kinds[noun], x, y, radius, float(rng.uniform(-0.26, 0.26)), bool(rng.integers(2))))
    return things, [owner for owner, *_ in places]


def _told(
    things: list[Thing], owners: list[int], mentions: list[Mention], said: int | None, background: int, rgb: np.ndarray
) -> Scene:
    """A scene of `things` with the caption of `mentions`, which names the background `said`."""
    caption, noun_at, attributes_at = caption_of(mentions, said)
    return Scene(
        tuple(things),
        background,
        tuple(np.clip(rgb, 0, 1).tolist()),
        caption,
        tuple(noun_at[i] for i in owners),
        tuple(attributes_at[i] for i in owners),
    )


def scene_from(
    mentions: list[Mention],
    background: int | None,
    rng: np.random.Generator,
    identities: list[Identity | None] | None = None,
) -> Scene:
    """A scene that shows what `mentions` say, with everything else drawn from `rng`.

    `identities[i]` fixes the identity of mention i. A noun that is mentioned twice has the first one's identity.

    Raises ValueError if there is no room for the things at the positions that `mentions` give.
    """
    kinds: dict[int, Identity] = {}
    for i, m in enumerate(mentions):
        given = identities[i] if identities is not None else None
        if m.noun not in kinds:
            kinds[m.noun] = given or random_identity(rng, m.color, m.second, m.pattern)
    said = background
    if background is None:
        background = int(rng.integers(len(BACKGROUNDS)))
    base = np.array(BACKGROUND_RGB[BACKGROUNDS[background]]) + rng.uniform(-0.03, 0.03, 3)
    things, owners = _lay_out(mentions, kinds, rng)
    return _told(things, owners, mentions, said, background, base)


def describe(rng: np.random.Generator, noun: int, identity: Identity, count: int = 1) -> Mention:
    """A mention that gives a random part of `identity`: often the color, sometimes the second one or the pattern."""
    says_color = rng.random() < 0.75
    return Mention(
        noun,
        count,
        color=identity.color if says_color else None,
        second=identity.second if says_color and rng.random() < 0.35 else None,
        pattern=identity.pattern if rng.random() < 0.5 else None,
    )


def _tell(rng: np.random.Generator, mentions: list[Mention], things: list[Thing], owners: list[int]) -> list[Mention]:
    """What the caption says about `things`: their bare `mentions`, extended."""
    style = rng.random()
    placed = rng.random() < PLACED
    told = []
    for i, m in enumerate(mentions):
        mine = [thing for thing, owner in zip(things, owners, strict=True) if owner == i]
        identity = mine[0].identity
        if style < DETAILED:
            m = replace(m, color=identity.color, second=identity.second, pattern=identity.pattern)
        elif style < 1 - BARE:
            m = describe(rng, m.noun, identity, m.count)
        if placed and m.count == 1:
            where = mine[0]
            size = size_of(where.radius, len(things))
            m = replace(m, size=size, across=edge_of(where.x), down=edge_of(where.y))
        told.append(m)
    return told


def random_scene(rng: np.random.Generator, count: int | None = None) -> Scene:
    """A scene of `count` things (1 to 3, drawn if None); in a third of those with several things, some share a noun."""
    if count is None:
        count = int(rng.choice(3, p=(0.35, 0.40, 0.25))) + 1
    groups = [1] * count
    if count > 1 and rng.random() < 0.35:
        groups = [2] + [1] * (count - 2) if count == 2 or rng.random() < 0.75 else [3]
    nouns = [int(noun) for noun in rng.choice(len(NOUNS), len(groups), replace=False)]
    identities = [random_identity(rng) for _ in groups]
    bare = [Mention(noun, size) for noun, size in zip(nouns, groups, strict=True)]
    order = rng.permutation(len(bare))
    bare, identities = [bare[i] for i in order], [identities[i] for i in order]
    background = int(rng.integers(len(BACKGROUNDS)))
    base = np.array(BACKGROUND_RGB[BACKGROUNDS[background]]) + rng.uniform(-0.03, 0.03, 3)
    kinds = {m.noun: identity for m, identity in zip(bare, identities, strict=True)}
    things, owners = _lay_out(bare, kinds, rng)
    told = _tell(rng, bare, things, owners)
    # Some captions do not mention the background.
    said = background if rng.random() >= 0.15 else None
    return _told(things, owners, told, said, background, base)


def draw_description(
    description: str, seed: int, identity_seed: int | None = None, enlarge: int = 1
) -> tuple[Picture, np.ndarray]:
    """Draws what a caption says, at `enlarge` times the world's size; returns the picture and the masks of the
    mentioned things (things, height, width) in the order of the words.

    `seed` decides positions and everything that the words leave open. With `identity_seed`, identities depend on that
    seed and the words alone, so that one appearance can be drawn again in other pictures, positions and nouns.

    Raises ValueError as `parse_caption` and `scene_from` do.
    """
    mentions, background = parse_caption(description)
    identities = None
    if identity_seed is not None:
        identities = [
            random_identity(np.random.default_rng((identity_seed, i)), m.color, m.second, m.pattern)
            for i, m in enumerate(mentions)
        ]
    picture = render(scene_from(mentions, background, np.random.default_rng(seed), identities), enlarge)
    nouns = [thing.noun for thing in picture.scene.things]
    order = [i for m in mentions for i, noun in enumerate(nouns) if noun == m.noun]
    return picture, picture.masks[list(dict.fromkeys(order))]
