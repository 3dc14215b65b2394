"""Stage 'match': pairs noun phrases with the segments that they name, and writes the published format.

FastComposer (arXiv 2305.10431, section 5.1) pairs noun phrases and segments greedily by the product of two scores:
CLIP's similarity of the phrase and the segment's pixels, and a sentence encoder's similarity of the phrase and the name
of the segment's class. The authors did not release this step; how a segment is shown to CLIP and where matching stops
are choices made here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...encoders.clip_pixels import MEAN_COLOR
from .folder import (
    MAP,
    MATCHED,
    PHRASES,
    SEGMENTS,
    SKIPPED,
    Folder,
    MatchedSubject,
    Phrase,
    Segment,
    in_batches,
    model_folder,
    work_through,
)
from .greedy import greedy_match

THRESHOLD = 0.1
HELD_OUT = 0.01

# For each picture of a batch: its phrases (P strings) and its segments' crops (S arrays (h, w, 3), uint8, square) ->
# similarities (P, S).
ClipSimilarity = Callable[[list[list[str]], list[list[np.ndarray]]], list[np.ndarray]]
# The same for its phrases and the names of its segments' classes.
LabelSimilarity = Callable[[list[list[str]], list[list[str]]], list[np.ndarray]]


@dataclass(frozen=True)
class Annotated:
    """A picture (H, W, 3), uint8, with its instance map (H, W), and the phrases and segments that were found for it."""

    pixels: np.ndarray
    ids: np.ndarray
    phrases: list[Phrase]
    segments: list[Segment]

    def crops(self) -> list[np.ndarray]:
        """The crops of the segments, as CLIP sees them."""
        return [segment_crop(self.pixels, self.ids, s) for s in self.segments]


def segment_crop(pixels: np.ndarray, ids: np.ndarray, segment: Segment) -> np.ndarray:
    """The box of a segment, padded to a square (side, side, 3). Everything that is not the segment has CLIP's mean
    color. CLIP's own preprocessing would cut off the ends of a long box."""
    x1, y1, x2, y2 = segment.bbox
    side = max(x2 - x1, y2 - y1)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = MEAN_COLOR
    top, left = (side - (y2 - y1)) // 2, (side - (x2 - x1)) // 2
    inside = ids[y1:y2, x1:x2] == segment.id
    square[top : top + y2 - y1, left : left + x2 - x1][inside] = pixels[y1:y2, x1:x2][inside]
    return square


def match_pictures(
    pictures: list[Annotated],
    clip_similarity: ClipSimilarity,
    label_similarity: LabelSimilarity,
    threshold: float = THRESHOLD,
) -> list[list[MatchedSubject]]:
    """The subjects of each picture: phrase p and segment s are paired greedily by
    clip(p, crop of s) * max(0, similarity(p, label of s)), down to `threshold`."""
    phrases = [[p.text for p in picture.phrases] for picture in pictures]
    seen = clip_similarity(phrases, [picture.crops() for picture in pictures])
    named = label_similarity(phrases, [[s.label for s in picture.segments] for picture in pictures])
    return [
        [
            MatchedSubject(picture.segments[s], picture.phrases[p].end)
            for p, s in greedy_match(a * b.clip(min=0), threshold)
        ]
        for picture, a, b in zip(pictures, seen, named, strict=True)
    ]


def write_matches(
    folder: Folder,
    clip_similarity: Callable[[], ClipSimilarity],
    label_similarity: Callable[[], LabelSimilarity],
    threshold: float = THRESHOLD,
    held_out: float = HELD_OUT,
    batch: int = 16,
    again: bool = False,
) -> None:
    """Writes the published `<id>.json` of every picture that has none, from its phrases and segments, and then the
    lists of ids. The two similarities are made by calling the arguments, once, and only if there is a picture to match.

    A picture in which nothing is matched, or in which two matched phrases end at the same character, gets an
    `<id>.skipped.txt` with the reason instead, and is in no list.

    Raises FileNotFoundError or ValueError if phrases or segments are missing or do not have their form.
    """
    ids = folder.left_to_do((PHRASES, SEGMENTS, MAP), (MATCHED, SKIPPED), again)
    clip_of, label_of = (clip_similarity(), label_similarity()) if ids else (None, None)

    def work(some: list[str]) -> None:
        captions, pictures = [], []
        for image_id in some:
            caption, phrases = folder.phrases(image_id)
            captions.append(caption)
            pixels = np.asarray(folder.image(image_id))
            pictures.append(Annotated(pixels, folder.instance_map(image_id), phrases, folder.segments(image_id)))
        # Only for pictures that have both phrases and segments.
        full = [i for i, p in enumerate(pictures) if p.phrases and p.segments]
        found: list[list[MatchedSubject]] = [[] for _ in pictures]
        if full:
            matched = match_pictures([pictures[i] for i in full], clip_of, label_of, threshold)
            for i, subjects in zip(full, matched, strict=True):
                found[i] = subjects
        for image_id, caption, picture, subjects in zip(some, captions, pictures, found, strict=True):
            reason = _unfit(picture, subjects)
            stale = MATCHED if reason else SKIPPED
            if reason:
                folder.write_text(image_id, SKIPPED, reason + "\n")
            else:
                folder.write_matched(image_id, caption, subjects)
            folder.path(image_id, stale).unlink(missing_ok=True)

    work_through("match", in_batches(ids, batch), len(ids), work)
    write_lists(folder, held_out)


def _unfit(picture: Annotated, subjects: list[MatchedSubject]) -> str | None:
    if not subjects:
        return f"None of {len(picture.phrases)} phrases is matched with one of {len(picture.segments)} segments."
    ends = [s.end for s in subjects]
    if len(set(ends)) < len(ends):
        return f"Two matched phrases end at the same character: {sorted(ends)}."
    return None


def write_lists(folder: Folder, held_out: float = HELD_OUT) -> None:
    """Writes the lists of all pictures that have an `<id>.json`, of those to train on and of those held out.

    Whether a picture is held out depends on the hash of its id alone, so pictures added later do not change it; only
    where that would leave either list of two or more pictures empty, one picture changes lists.
    """
    ids = [i for i in folder.ids() if folder.path(i, MATCHED).exists()]
    order = sorted(ids, key=_draw)
    count = sum(_draw(i) < held_out for i in ids)
    test = set(order[: min(max(count, 1), len(ids) - 1)]) if len(ids) > 1 else set()
    folder.write_ids("all", ids)
    folder.write_ids("train", [i for i in ids if i not in test])
    folder.write_ids("test", [i for i in ids if i in test])


def _draw(image_id: str) -> float:
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") / 2**64


# --- the two similarities -------------------------------------------------------------------------------------------


def tables(rows: torch.Tensor, columns: torch.Tensor, counts: list[tuple[int, int]]) -> list[np.ndarray]:
    """Cosines (P, S) per picture, from the concatenated embeddings of all pictures: `rows` (sum of P, d), `columns`
    (sum of S, d), and `counts`, the P and S of each picture."""
    rows, columns = (torch.nn.functional.normalize(x.float(), dim=-1).cpu() for x in (rows, columns))
    parts = zip(rows.split([p for p, _ in counts]), columns.split([s for _, s in counts]), strict=True)
    return [(a @ b.T).numpy() for a, b in parts]


def open_clip(model: Path, device: str = "cpu") -> ClipSimilarity:
    """Cosine similarities by a CLIP model (arXiv 2103.00020) in a local folder, in transformers' format.

    Raises FileNotFoundError if there is no such model.
    """
    model = model_folder(model, "CLIP model", "--clip")
    from transformers import CLIPModel, CLIPProcessor

    processor = CLIPProcessor.from_pretrained(model, local_files_only=True)
    clip = CLIPModel.from_pretrained(model, local_files_only=True, dtype=torch.float32).eval().to(device)
    length = clip.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def similarity(phrases: list[list[str]], crops: list[list[np.ndarray]]) -> list[np.ndarray]:
        texts, pieces = sum(phrases, []), sum(crops, [])
        inputs = processor(
            text=texts, images=pieces, padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(device)
        out = clip(**inputs)
        return tables(
            out.text_embeds, out.image_embeds, [(len(p), len(c)) for p, c in zip(phrases, crops, strict=True)]
        )

    return similarity


def open_sentences(model: Path, device: str = "cpu") -> LabelSimilarity:
    """Cosine similarities by a sentence encoder (arXiv 1908.10084) in a local folder, in sentence-transformers' format.

    Raises ImportError or FileNotFoundError if the package or the model is missing.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "match: expected the package sentence-transformers, got none; `pip install sentence-transformers`"
        ) from error
    if not (Path(model) / "modules.json").exists():
        raise FileNotFoundError(
            f"--sentences: expected a folder with a sentence-transformers model (a modules.json and its parts), got "
            f"{model}; nothing is downloaded here, so download the model yourself"
        )
    encoder = SentenceTransformer(str(model), device=device, local_files_only=True)

    def similarity(phrases: list[list[str]], labels: list[list[str]]) -> list[np.ndarray]:
        texts = sum(phrases, []) + sum(labels, [])
        # Class names recur in every picture, and phrases often, so each text is encoded once.
        unique = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        encoded = encoder.encode(list(unique), convert_to_tensor=True, show_progress_bar=False)
        encoded = encoded[[unique[text] for text in texts]]
        cut = sum(len(p) for p in phrases)
        return tables(encoded[:cut], encoded[cut:], [(len(p), len(n)) for p, n in zip(phrases, labels, strict=True)])

    return similarity
