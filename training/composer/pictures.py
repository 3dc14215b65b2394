"""Pictures taken apart for training, and which of their representations a step keeps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ...compositions.depth import normalized_depth
from ...compositions.inputs import local_map, scaled_palette
from ...compositions.instance_map import InstanceMap
from ...compositions.intensity import WEIGHTS, intensity
from ...compositions.palette import palette_of_picture
from ...compositions.region import Region, grown
from ...compositions.sketch import as_sketch, contours
from ...encoders.composer_adapter import INTENSITY, LOCAL_CHANNELS, PALETTE, SEMANTICS, SENTENCE
from ...subjects.pictures import middle_square, resized_strokes
from ..base import Base, Vocabulary
from ..data.dataset import item_generator
from ..data.pictures import ENDINGS, MAPS, find_pictures
from ..draws import Shares, drawn_batches, toward_noise

NAMES = (SENTENCE, SEMANTICS, PALETTE, *LOCAL_CHANNELS)
KEEP_ALL, DROP_ALL, DROP, DROP_INTENSITY, ALONE = 0.1, 0.1, 0.5, 0.7, 0.5
_ONE_CHANNEL = ("L", "I", "I;16", "F")


def draw_kept(generator: torch.Generator, only: str = "") -> dict[str, bool]:
    """Which representations of a picture are kept: all with probability 0.1, none with 0.1, else each by itself. `only`
    names one that all pictures keep, half of them with the caption alone."""
    if only and float(torch.rand((), generator=generator)) < ALONE:
        return {name: name in (only, SENTENCE) for name in NAMES}
    case, *each = torch.rand(1 + len(NAMES), generator=generator).tolist()
    if case < KEEP_ALL + DROP_ALL:
        kept = dict.fromkeys(NAMES, case < KEEP_ALL)
    else:
        dropped = {name: DROP_INTENSITY if name == INTENSITY else DROP for name in NAMES}
        kept = {name: chance >= dropped[name] for name, chance in zip(NAMES, each, strict=True)}
    return {name: keep or name == only for name, keep in kept.items()}


def draw_mask(side: int, generator: torch.Generator) -> torch.Tensor:
    """A mask (side, side), 1 where a picture is drawn anew: irregular strokes in 70 of 100, else a rectangle in 20 and
    a half in 10."""
    kind, *numbers = torch.rand(9, generator=generator).tolist()
    mask = torch.zeros(side, side)
    if kind < 0.1:
        half = mask.view(2, side // 2, side)[int(numbers[0] * 2)]
        half.fill_(1)
        return mask if numbers[1] < 0.5 else mask.mT.contiguous()
    if kind < 0.3:
        top, left = (int(n * side * 0.7) for n in numbers[:2])
        height, width = (max(1, int((0.2 + 0.5 * n) * side)) for n in numbers[2:4])
        mask[top : top + height, left : left + width] = 1
        return mask
    # A stroke is a walk; its width is that of the brush.
    points = torch.rand(2 + int(numbers[0] * 6), 2, generator=generator) * (side - 1)
    for start, end in zip(points, points[1:], strict=False):
        along = torch.linspace(0, 1, 2 * side)[:, None]
        y, x = (start + along * (end - start)).round().long().unbind(-1)
        mask[y, x] = 1
    return grown(mask, int((0.03 + 0.07 * numbers[1]) * side))


def caption_of(file: Path) -> str:
    """The caption beside a picture; empty if there is none."""
    text = file.with_suffix(".txt")
    return text.read_text(encoding="utf-8").strip() if text.exists() else ""


class Composed(torch.utils.data.Dataset):
    """Pictures taken apart. `dataset[row, epoch]` is a dict of

    - `target`: (3, R, R) in [-1, 1], the middle square
    - `caption`: empty if there is none, or if it is dropped
    - `palette`: (K,), of unit variance
    - the maps by the names of LOCAL_CHANNELS, (c, R, R)
    - `kept`: (8,), float, 1 for what is there and kept, in the order of NAMES

    Args:
        root: the folder.
        resolution: R, in pixels.
        seed: of all that is drawn.
        only: see `draw_kept`.

    Raises:
        FileNotFoundError: there is no picture.
    """

    def __init__(self, root: Path, resolution: int, seed: int = 0, only: str = ""):
        self.files = find_pictures(root)
        self.resolution, self.seed, self.only = resolution, seed, only

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, str | torch.Tensor]:
        row, epoch = key
        generator = item_generator(self.seed, epoch, row)
        file, kept = self.files[row], draw_kept(generator, self.only)
        image = self._square(file, "RGB") / 255
        caption = caption_of(file)
        weights = list(WEIGHTS.values())[int(torch.randint(len(WEIGHTS), (), generator=generator))]
        mask = draw_mask(self.resolution, generator)
        drawn, depth, instances = (self._beside(file, kind) for kind in MAPS)
        sketch = contours(image) if drawn is None else drawn
        things = None if instances is None or not instances.any() else _instance_map(file, instances)
        covers = 0 < float(mask.mean()) < 1
        values = {
            "sketch": sketch,
            "instances": things,
            "depth": None if depth is None else normalized_depth(depth),
            "intensity": intensity(image, weights),
            "mask": Region(image, mask) if covers else None,
        }
        there = {SENTENCE: bool(caption), SEMANTICS: True, PALETTE: True}
        # As in Decompose Image, a map that is the same everywhere is none.
        values = {name: None if torch.is_tensor(value) and not value.any() else value for name, value in values.items()}
        there |= {name: value is not None for name, value in values.items()}
        side = self.resolution
        maps = {
            name: torch.zeros(channels, side, side) if values[name] is None else local_map(name, values[name])[0]
            for name, channels in LOCAL_CHANNELS.items()
        }
        return {
            "target": image.movedim(-1, 0) * 2 - 1,
            "caption": caption if kept[SENTENCE] else "",
            PALETTE: scaled_palette(palette_of_picture(image)),
            **maps,
            "kept": torch.tensor([float(kept[name] and there[name]) for name in NAMES]),
        }

    def _square(self, file: Path, mode: str) -> torch.Tensor:
        """The middle square of a picture, (R, R, 3), 0..255."""
        with Image.open(file) as opened:
            planes = torch.from_numpy(np.array(ImageOps.exif_transpose(opened).convert(mode))).float()
        return self._fitted(planes, "bicubic").clamp(0, 255)

    def _beside(self, file: Path, kind: str) -> torch.Tensor | None:
        """The map (R, R) that lies beside a picture, or None: a sketch with white strokes, 0..1, others with the values
        of their files."""
        found = (file.with_name(f"{file.stem}.{kind}{ending}") for ending in ENDINGS)
        beside = next((one for one in found if one.exists()), None)
        if beside is None:
            return None
        with Image.open(beside) as opened:
            # 16 bits and floats are kept as they are; converted, they would be cut. Only of instances the numbers of a
            # color table mean something.
            kept = opened.mode in _ONE_CHANNEL or (opened.mode == "P" and kind == "instances")
            values = torch.from_numpy(np.array(opened if kept else opened.convert("L")).astype(np.float32))
        if kind == "sketch":
            # As Decompose Image and the adapter read them.
            sketch = middle_square(as_sketch(values[..., None] / values.max().clamp(min=1e-6)))
            return resized_strokes(sketch[None, None], (self.resolution,) * 2)[0, 0]
        return self._fitted(values[..., None], "nearest-exact" if kind == "instances" else "bilinear")[..., 0]

    def _fitted(self, planes: torch.Tensor, mode: str) -> torch.Tensor:
        """The middle square of planes (H, W, C), (R, R, C)."""
        square = middle_square(planes).movedim(-1, 0)[None]
        if square.shape[-1] != self.resolution:
            smooth = {} if mode == "nearest-exact" else {"antialias": True}
            square = F.interpolate(square, (self.resolution,) * 2, mode=mode, **smooth)
        return square[0].movedim(0, -1)


def _instance_map(file: Path, labels: torch.Tensor) -> InstanceMap:
    names = file.with_name(f"{file.stem}.instances.txt")
    nouns = names.read_text(encoding="utf-8").splitlines() if names.exists() else []
    nouns += [""] * (int(labels.max()) - len(nouns))
    return InstanceMap(labels.int(), tuple(noun.strip() for noun in nouns))


def collate(items: Sequence[dict], vocabularies: Sequence[Vocabulary]) -> dict[str, torch.Tensor]:
    """Items of `Composed` as a batch: all tensors stacked, and `tokens` (n, text towers, 77), int64."""
    tensors = [name for name, value in items[0].items() if torch.is_tensor(value)]
    tokens = [[vocabulary.row(item["caption"]) for vocabulary in vocabularies] for item in items]
    return {**{name: torch.stack([item[name] for item in items]) for name in tensors}, "tokens": torch.tensor(tokens)}


def read_batches(
    data: Composed,
    base: Base,
    shares: Shares,
    workers: int,
    device: torch.device,
    cubic: bool = False,
    from_noise: float = 0.0,
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of `collate` with their draws; see `training.draws.drawn_batches`.

    `cubic`: timesteps are mostly high. `from_noise`: the share of pictures of which only the noise is seen, at the
    timestep at which sampling begins; `alone` (n,) says of which.
    """
    later = toward_noise(torch.arange(base.times), base.times).to(device)
    for batch in drawn_batches(data, base, shares, workers, partial(collate, vocabularies=base.vocabularies), device):
        t, alone = batch["t"], batch["coin"] < from_noise
        t = later[t] if cubic else t
        yield {**batch, "t": torch.where(alone, base.times - 1, t), "alone": alone}
