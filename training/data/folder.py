"""The folder that all stages share: its files, and how they are read, checked, and written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ...encoders.files import check_folder, whole_file

IMAGE = ".jpg"
CAPTION = ".caption.txt"
PHRASES = ".phrases.json"
SEGMENTS = ".segments.json"
MAP = ".npy"
MATCHED = ".json"
SKIPPED = ".skipped.txt"
ID_LISTS = {"all": "image_ids.txt", "train": "image_ids_train.txt", "test": "image_ids_test.txt"}

# The stage that makes a file, for error messages.
_STAGES = {CAPTION: "captions", PHRASES: "phrases", SEGMENTS: "segments", MAP: "segments", MATCHED: "match"}


@dataclass(frozen=True)
class Phrase:
    """A noun phrase, and the character offset of its end in the caption."""

    text: str
    end: int


@dataclass(frozen=True)
class Segment:
    """A part of a picture: its value in the instance map, its box (x1, y1, x2, y2), ends exclusive, and its class."""

    id: int
    bbox: tuple[int, int, int, int]
    label: str

    def record(self) -> dict:
        """The segment as stored in a file."""
        return {"id": self.id, "bbox": list(self.bbox), "coco_label": self.label}


@dataclass(frozen=True)
class MatchedSubject:
    """A segment that a caption names: `end` is the character offset of the end of the phrase that names it."""

    segment: Segment
    end: int


class Folder:
    """`root` with pictures at `<id[:5]>/<id>.jpg` and, next to each, the files that stages have made from it.

    Raises FileNotFoundError if `root` is not a folder.
    """

    def __init__(self, root: Path):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"data: expected a folder with <id[:5]>/<id>.jpg files, got {self.root}")

    def path(self, image_id: str, suffix: str) -> Path:
        """The path of an image's file of this kind."""
        return self.root / image_id[:5] / f"{image_id}{suffix}"

    def ids(self) -> list[str]:
        """The ids of all pictures in the folder, sorted.

        Raises ValueError if there are none, or if one is not in the folder that its id gives.
        """
        found = sorted(self.root.glob(f"*/*{IMAGE}"), key=lambda path: path.stem)
        if not found:
            raise ValueError(
                f"data: expected pictures at <id[:5]>/<id>.jpg, got none in {self.root}; put some there with the stage "
                "'images'"
            )
        for path in found:
            if path.parent.name != path.stem[:5]:
                raise ValueError(
                    f"data: expected the picture {path.name} in the folder '{path.stem[:5]}', got it in "
                    f"'{path.parent.name}'"
                )
        return [path.stem for path in found]

    def left_to_do(self, needs: Iterable[str], makes: Iterable[str], again: bool = False) -> list[str]:
        """The ids of pictures that have none of the files `makes` yet (of all pictures if `again`).

        Raises FileNotFoundError if one of them lacks a file of `needs`.
        """
        makes = tuple(makes)
        ids = [i for i in self.ids() if again or not any(self.path(i, suffix).exists() for suffix in makes)]
        for suffix in needs:
            without = [i for i in ids if not self.path(i, suffix).exists()]
            if without:
                raise FileNotFoundError(
                    f"data: expected <id>{suffix} for each picture in {self.root}, got none for {len(without)} of "
                    f"{len(ids)} (the first is {without[0]}); run the stage '{_STAGES[suffix]}' first or put such "
                    "files there yourself"
                )
        return ids

    # --- reading ----------------------------------------------------------------------------------------------------

    def image(self, image_id: str) -> Image.Image:
        """The picture in RGB."""
        with Image.open(self.path(image_id, IMAGE)) as picture:
            return picture.convert("RGB")

    def size(self, image_id: str) -> tuple[int, int]:
        """Width and height of the picture, without decoding it."""
        with Image.open(self.path(image_id, IMAGE)) as picture:
            return picture.size

    def caption(self, image_id: str) -> str:
        """The text of `<id>.caption.txt`."""
        return self.path(image_id, CAPTION).read_text(encoding="utf-8").strip()

    def phrases(self, image_id: str) -> tuple[str, list[Phrase]]:
        """The caption and the noun phrases in `<id>.phrases.json`.

        Raises ValueError if the file does not have its form, or a phrase is not where the file says.
        """
        path = self.path(image_id, PHRASES)
        with _form(path, '{"caption": text, "phrases": [{"text": text, "end": offset}]}'):
            content = json.loads(path.read_text(encoding="utf-8"))
            caption = str(content["caption"])
            phrases = [Phrase(str(p["text"]), int(p["end"])) for p in content["phrases"]]
        for phrase in phrases:
            if not phrase.text or not caption[: max(0, phrase.end)].endswith(phrase.text) or phrase.end > len(caption):
                raise ValueError(
                    f"{path}: expected '{phrase.text}' to end at character {phrase.end} of '{caption}', got "
                    f"'{caption[: max(0, phrase.end)][-len(phrase.text) :]}' there"
                )
        return caption, phrases

    def segments(self, image_id: str) -> list[Segment]:
        """The segments in `<id>.segments.json`.

        Raises ValueError if the file does not have its form.
        """
        path = self.path(image_id, SEGMENTS)
        with _form(path, '[{"id": number, "bbox": [x1, y1, x2, y2], "coco_label": text}]'):
            segments = [_segment(s) for s in json.loads(path.read_text(encoding="utf-8"))]
        self._check(path, image_id, segments)
        return segments

    def matched(self, image_id: str) -> tuple[str, list[MatchedSubject]]:
        """The caption and the subjects in the published `<id>.json`.

        Raises ValueError if the file does not have its form.
        """
        path = self.path(image_id, MATCHED)
        segment = '{"id": number, "end": offset, "bbox": [x1, y1, x2, y2], "coco_label": text}'
        with _form(path, f'{{"caption": text, "segments": [{segment}]}}'):
            content = json.loads(path.read_text(encoding="utf-8"))
            caption = str(content["caption"])
            subjects = [MatchedSubject(_segment(s), int(s["end"])) for s in content["segments"]]
        for subject in subjects:
            if not 0 < subject.end <= len(caption):
                raise ValueError(
                    f"{path}: expected phrases that end within the caption's {len(caption)} characters, got one that "
                    f"ends at {subject.end}"
                )
        self._check(path, image_id, [s.segment for s in subjects])
        return caption, subjects

    def instance_map(self, image_id: str) -> np.ndarray:
        """The integers (H, W) of `<id>.npy`: the id of the segment at each pixel.

        Raises ValueError if they are not integers, or differ from the picture in size.
        """
        path = self.path(image_id, MAP)
        ids = np.load(path, allow_pickle=False)
        width, height = self.size(image_id)
        if ids.shape != (height, width) or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{path}: expected one whole number for each pixel of the picture, {(height, width)}, got shape "
                f"{ids.shape} and type {ids.dtype}"
            )
        return ids

    def _check(self, path: Path, image_id: str, segments: list[Segment]) -> None:
        width, height = self.size(image_id)
        for segment in segments:
            x1, y1, x2, y2 = segment.bbox
            if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
                raise ValueError(
                    f"{path}: expected boxes [x1, y1, x2, y2] within the picture's {width}x{height} pixels, got "
                    f"{list(segment.bbox)} for segment {segment.id}"
                )
        if len({s.id for s in segments}) < len(segments):
            raise ValueError(f"{path}: expected segments with different ids, got {[s.id for s in segments]}")

    # --- writing ----------------------------------------------------------------------------------------------------

    def write_text(self, image_id: str, suffix: str, text: str) -> None:
        """Writes a text file of an image."""
        with whole_file(self.path(image_id, suffix)) as part:
            part.write_text(text, encoding="utf-8", newline="\n")

    def write_json(self, image_id: str, suffix: str, content: object) -> None:
        """Writes a JSON file of an image."""
        self.write_text(image_id, suffix, json.dumps(content, ensure_ascii=False) + "\n")

    def write_map(self, image_id: str, ids: np.ndarray) -> None:
        """Writes the instance map (H, W) of an image, in the smallest type that holds its ids (none negative)."""
        with whole_file(self.path(image_id, MAP)) as part, part.open("wb") as file:
            np.save(file, ids.astype(np.min_scalar_type(int(ids.max()))), allow_pickle=False)

    def write_matched(self, image_id: str, caption: str, subjects: Iterable[MatchedSubject]) -> None:
        """Writes the published `<id>.json`, with the subjects in the order in which the caption names them."""
        ordered = sorted(subjects, key=lambda s: s.end)
        records = [{**s.segment.record(), "end": s.end} for s in ordered]
        self.write_json(image_id, MATCHED, {"caption": caption, "segments": records})

    def write_ids(self, name: str, ids: Iterable[str]) -> None:
        """Writes a list of ids ("all", "train" or "test"), one per line."""
        with whole_file(self.root / ID_LISTS[name]) as part:
            part.write_text("".join(f"{i}\n" for i in ids), encoding="utf-8", newline="\n")

    def read_ids(self, name: str) -> list[str]:
        """A list of ids ("all", "train" or "test").

        Raises FileNotFoundError if it is missing and ValueError if it is empty.
        """
        path = self.root / ID_LISTS[name]
        if not path.exists():
            raise FileNotFoundError(
                f"data: expected a list {path.name}, got none in {self.root}; run the stage 'match' first or write it, "
                "an id a line"
            )
        ids = path.read_text(encoding="utf-8").split()
        if not ids:
            raise ValueError(f"{path}: expected at least one picture's id, got an empty list")
        return ids


def box_of(mask: np.ndarray) -> tuple[int, int, int, int]:
    """The box (x1, y1, x2, y2), ends exclusive, around the true pixels of `mask` (H, W), which has at least one."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def in_batches(ids: list[str], size: int) -> Iterator[list[str]]:
    """`ids` in order, `size` at a time."""
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


def work_through(title: str, batches: Iterable[list[str]], count: int, work: Callable[[list[str]], None]) -> None:
    """Calls `work` with each batch of ids, and shows how many of `count` are done."""
    from tqdm import tqdm

    with tqdm(total=count, desc=title, unit="image") as bar:
        for batch in batches:
            work(batch)
            bar.update(len(batch))


def model_folder(path: Path, what: str, option: str) -> Path:
    """Returns `path`, given by an option, if it is a folder that holds a saved model.

    Raises FileNotFoundError, which names both, otherwise, and ValueError if the model's weights are damaged.
    """
    if not (Path(path) / "config.json").exists():
        raise FileNotFoundError(
            f"{option}: expected a folder with a saved {what} (a config.json and weights), got {path}; nothing is "
            "downloaded here, so download the model yourself"
        )
    check_folder(path, option)
    return Path(path)


def _segment(record: dict) -> Segment:
    x1, y1, x2, y2 = (round(v) for v in record["bbox"])
    return Segment(int(record["id"]), (x1, y1, x2, y2), str(record["coco_label"]))


@contextmanager
def _form(path: Path, form: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a file of the form {form}, got {error!r}") from error
