"""Stage 'shapeland': drawn pictures in the published format, with the ground truth in place of what models find.

All files of the other stages are written too, so that any stage can be measured: `match`, for example, by deleting the
`<id>.json` files and comparing what it finds with the truth.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...encoders.clip_pixels import MEAN_COLOR, normalize
from ...encoders.files import whole_file
from ...shapeland import models, world
from ..shapeland.common import frozen_text, tokens
from ..shapeland.common import pixels as to_pixels
from ..shapeland.scenes import MAX_WORDS, WORDS
from .folder import (
    CAPTION,
    IMAGE,
    MATCHED,
    PHRASES,
    SEGMENTS,
    Folder,
    MatchedSubject,
    Phrase,
    Segment,
    box_of,
    in_batches,
    work_through,
)
from .match import ClipSimilarity, tables, write_lists


def one_by_one(scene: world.Scene, looks: bool = True) -> tuple[str, list[Phrase], list[Phrase]]:
    """The caption of `scene` with one phrase per thing: "two red stars" becomes "a red star and a red star", or "a star
    and a star" without `looks`. Returns the caption; the phrase of each thing, in the order of `scene.things`; and all
    noun phrases including the background's, in the order of the caption."""
    mentions, background = world.parse_caption(scene.caption)
    bare = {} if looks else {"color": None, "second": None, "pattern": None}
    singles = [replace(m, count=1, **bare) for m in mentions for _ in range(m.count)]
    caption, noun_at, attributes_at = world.caption_of(singles, background)
    words = caption.split()
    phrases = []
    for at, attributes in zip(noun_at, attributes_at, strict=True):
        article = min((*attributes, at)) - 1
        phrases.append(Phrase(" ".join(words[article : at + 1]), len(" ".join(words[: at + 1]))))
    # A word with a count names several things, and any of its phrases is true of each of them.
    left = list(range(len(singles)))
    of_things = []
    for thing in scene.things:
        single = next(i for i in left if singles[i].noun == thing.noun)
        left.remove(single)
        of_things.append(phrases[single])
    if background is not None:
        phrases.append(Phrase(" ".join(words[-3:]), len(caption)))
    return caption, of_things, phrases


def shapeland_folder(root: Path, count: int, seed: int, looks: bool = True, batch: int = 64) -> None:
    """Writes scenes 0 to `count` - 1 of `seed` into `root`, which is created if needed; existing scenes stay.

    Captions name each thing by a phrase of its own, and by its noun alone without `looks`; classes are the world's
    nouns; where things cover more than half of a pixel, it belongs to the one that covers most of it.
    """
    Path(root).mkdir(parents=True, exist_ok=True)
    folder = Folder(root)
    ids = [f"{i:08d}" for i in range(count)]
    missing = [i for i in ids if not folder.path(i, MATCHED).exists()]

    def work(some: list[str]) -> None:
        for image_id in some:
            _write_scene(folder, image_id, world.random_scene(np.random.default_rng((seed, int(image_id)))), looks)

    work_through("shapeland", in_batches(missing, batch), len(missing), work)
    write_lists(folder)


def _write_scene(folder: Folder, image_id: str, scene: world.Scene, looks: bool) -> None:
    picture = world.render(scene)
    caption, of_things, phrases = one_by_one(scene, looks)
    ids = np.where(picture.masks.sum(0) > 0.5, picture.masks.argmax(0) + 1, 0)
    subjects = [
        MatchedSubject(Segment(i + 1, box_of(ids == i + 1), world.NOUNS[thing.noun]), phrase.end)
        for i, (thing, phrase) in enumerate(zip(scene.things, of_things, strict=True))
        if (ids == i + 1).any()
    ]
    with whole_file(folder.path(image_id, IMAGE)) as part:
        image = Image.fromarray(np.round(picture.image * 255).astype(np.uint8))
        image.save(part, "JPEG", quality=100, subsampling=0)
    folder.write_text(image_id, CAPTION, caption + "\n")
    records = [{"text": p.text, "end": p.end} for p in phrases]
    folder.write_json(image_id, PHRASES, {"caption": caption, "phrases": records})
    folder.write_map(image_id, ids)
    folder.write_json(image_id, SEGMENTS, [s.segment.record() for s in subjects])
    # Last, because this file marks the picture as done.
    folder.write_matched(image_id, caption, subjects)


# --- similarities for `match` ---------------------------------------------------------------------------------------


def open_towers(device: str = "cpu") -> ClipSimilarity:
    """Cosine similarities by Shapeland's CLIP towers, for phrases of the world's words and crops up to its size.

    A thing is embedded once on each of the world's backgrounds, and the mean is taken: CLIP's mean color is not one of
    them, and on it the towers hardly tell things apart.

    Raises FileNotFoundError if the towers' weights are missing, ValueError if a phrase or a crop is not the world's.
    """
    text = frozen_text(device)
    vision = models.build_vision()
    vision.load_state_dict(models.load("vision"))
    vision = vision.eval().requires_grad_(False).to(device)

    @torch.inference_mode()
    def similarity(phrases: list[list[str]], crops: list[list[np.ndarray]]) -> list[np.ndarray]:
        seen = 0
        for background in world.BACKGROUND_RGB.values():
            pictures = np.stack([_on_background(c, background) for some in crops for c in some])
            embedded = vision(normalize((to_pixels(pictures, device) + 1) / 2)).image_embeds
            seen = seen + torch.nn.functional.normalize(embedded, dim=-1)
        said = text(tokens(np.stack([_words(p) for some in phrases for p in some]), device)).text_embeds
        return tables(said, seen, [(len(p), len(c)) for p, c in zip(phrases, crops, strict=True)])

    return similarity


def word_overlap(phrases: list[list[str]], labels: list[list[str]]) -> list[np.ndarray]:
    """1 where a phrase holds the label as a word, else 0: the world's nouns have no synonyms."""
    return [
        np.array([[float(label in phrase.split()) for label in names] for phrase in texts])
        for texts, names in zip(phrases, labels, strict=True)
    ]


def _on_background(crop: np.ndarray, background: tuple[float, float, float]) -> np.ndarray:
    """The thing of a crop in the middle of a picture of the world, at its own size, as the tower was trained."""
    side = len(crop)
    if side > world.SIZE:
        raise ValueError(f"crops: expected at most Shapeland's {world.SIZE} pixels, got {side}")
    color = np.round(np.array(background) * 255).astype(np.uint8)
    picture, start = np.tile(color, (world.SIZE, world.SIZE, 1)), (world.SIZE - side) // 2
    thing = (crop != MEAN_COLOR).any(-1)
    picture[start : start + side, start : start + side][thing] = crop[thing]
    return picture


def _words(phrase: str) -> np.ndarray:
    words = phrase.lower().split()
    unknown = [w for w in words if w not in WORDS]
    if unknown or len(words) > MAX_WORDS:
        raise ValueError(f"phrases: expected up to {MAX_WORDS} of Shapeland's words, got {phrase!r}")
    row = np.zeros(MAX_WORDS, np.int64)
    row[: len(words)] = [WORDS.index(w) for w in words]
    return row
