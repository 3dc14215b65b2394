"""FastComposer's training items, from a folder in the published format (arXiv 2305.10431).

Everything random about an item comes from one generator seeded by (seed, epoch, row), so that an interrupted training
run sees the same items as an uninterrupted one, with any number of worker processes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ...encoders.clip_pixels import square
from .folder import IMAGE, MAP, MATCHED, Folder, MatchedSubject, Segment

MAX_SUBJECTS = 4
SMALLEST_OBJECT = 32  # elastic distortion blurs over 41 pixels, and the reflection padding for that must fit
# Value of the instance map where a target picture shows nothing of the original.
NOWHERE = -1


class SubjectPictures(torch.utils.data.Dataset):
    """Pictures with up to four subjects each, as FastComposer is trained on them.

    `dataset[row]` is the item of epoch 0, `dataset[row, epoch]` that of any epoch (see `EpochBatches`): a dict of

    - `id`, `caption`: strings; in a share `uncondition` of items, the caption is empty and there are no subjects
    - `picture` (3, R, R) in [-1, 1] and `instance_map` (R, R), int64, at the resolution R
    - `present` (4,), bool: which of the following rows are subjects; these come first, in the order of the caption
    - `ends` (4,), int64: the character offset of the end of the phrase that names the subject, -1 without a subject
    - `masks` (4, R, R), float, 1 on the subject
    - `objects` (4, 3, r, r) in [0, 1]: the subject cut out on noise, augmented, at the object resolution r

    A subject is kept with probability `object_appear`; of more than four, four are drawn. `object_types` are the
    classes (`coco_label`) that count as subjects; None means all. Without `augment` nothing is mirrored or altered.

    Raises FileNotFoundError or ValueError if the folder lacks the list or files, or an option is out of range.
    """

    def __init__(
        self,
        root: Path,
        names: str = "train",
        resolution: int = 512,
        object_resolution: int = 224,
        object_types: Collection[str] | None = None,
        uncondition: float = 0.1,
        object_appear: float = 0.9,
        augment: bool = True,
        seed: int = 0,
    ):
        for name, value in (("uncondition", uncondition), ("object_appear", object_appear)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")
        for name, value, least in (
            ("resolution", resolution, 1),
            ("object_resolution", object_resolution, SMALLEST_OBJECT),
        ):
            if value < least:
                raise ValueError(f"{name}: expected at least {least} pixels, got {value}")
        if isinstance(object_types, str):
            raise ValueError(f"object_types: expected a list of class names, got the text '{object_types}'")
        self.folder = Folder(root)
        self.ids = self.folder.read_ids(names)
        for suffix in (IMAGE, MATCHED, MAP):
            without = [i for i in self.ids if not self.folder.path(i, suffix).exists()]
            if without:
                raise FileNotFoundError(
                    f"data: expected <id>{suffix} for each picture that {self.folder.root} lists, got none for "
                    f"{len(without)} of {len(self.ids)} (the first is {without[0]})"
                )
        self.resolution, self.object_resolution = resolution, object_resolution
        self.object_types = None if object_types is None else frozenset(object_types)
        self.uncondition, self.object_appear, self.augment, self.seed = uncondition, object_appear, augment, seed

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, str | torch.Tensor]:
        row, epoch = key if isinstance(key, tuple) else (key, 0)
        image_id, generator = self.ids[row], item_generator(self.seed, epoch, row)
        caption, subjects = self.folder.matched(image_id)
        if self.object_types is not None:
            subjects = [s for s in subjects if s.segment.label in self.object_types]
        if _chance(self.uncondition, generator):
            caption, subjects = "", []
        subjects = choose_subjects(subjects, self.object_appear, generator)

        original = F.pil_to_tensor(self.folder.image(image_id))
        ids = torch.from_numpy(self.folder.instance_map(image_id).astype(np.int64))
        size = self.object_resolution
        objects = torch.zeros(MAX_SUBJECTS, 3, size, size)
        for i, subject in enumerate(subjects):
            crop = subject_crop(original, ids, subject.segment, generator)
            objects[i] = augment_object(crop, size, generator) if self.augment else plain_object(crop, size)
        mirrored = self.augment and _chance(0.5, generator)
        picture, ids = target_view(original, ids, self.resolution, mirrored)

        ends = torch.full((MAX_SUBJECTS,), -1)
        masks = torch.zeros(MAX_SUBJECTS, self.resolution, self.resolution)
        for i, subject in enumerate(subjects):
            ends[i], masks[i] = subject.end, ids == subject.segment.id
        return {
            "id": image_id,
            "caption": caption,
            "picture": picture,
            "instance_map": ids,
            "present": torch.arange(MAX_SUBJECTS) < len(subjects),
            "ends": ends,
            "masks": masks,
            "objects": objects,
        }


class EpochBatches(torch.utils.data.Sampler):
    """The keys (row, epoch) of the batches of steps `start` to `steps` - 1, as a DataLoader's `batch_sampler`.

    Each epoch goes through all rows once, in its own order, and batches continue from one epoch into the next, so that
    a step's batch depends on the step alone.
    """

    def __init__(self, count: int, batch: int, steps: int, start: int = 0, seed: int = 0):
        self.count, self.batch, self.steps, self.start, self.seed = count, batch, steps, start, seed

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        known, order = None, None
        for step in range(self.start, self.steps):
            keys = []
            for at in range(step * self.batch, (step + 1) * self.batch):
                epoch, offset = divmod(at, self.count)
                if epoch != known:
                    known, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count)
                keys.append((int(order[offset]), epoch))
            yield keys


def item_generator(seed: int, epoch: int, row: int) -> torch.Generator:
    """The random generator of an item."""
    state = np.random.SeedSequence((seed, epoch, row)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def choose_subjects(subjects: list[MatchedSubject], appear: float, generator: torch.Generator) -> list[MatchedSubject]:
    """Keeps each subject with probability `appear`, at most four drawn at random, in the order of the caption."""
    kept = [s for s in subjects if _chance(appear, generator)]
    if len(kept) > MAX_SUBJECTS:
        kept = [kept[i] for i in torch.randperm(len(kept), generator=generator)[:MAX_SUBJECTS].tolist()]
    return sorted(kept, key=lambda s: s.end)


def subject_crop(
    picture: torch.Tensor, ids: torch.Tensor, segment: Segment, generator: torch.Generator
) -> torch.Tensor:
    """The box of a segment in `picture` (3, H, W), uint8, with uniform noise where the map `ids` (H, W) does not have
    its id, so that nothing around the subject is learned with it."""
    x1, y1, x2, y2 = segment.bbox
    crop = picture[:, y1:y2, x1:x2]
    noise = torch.randint(0, 256, crop.shape, generator=generator, dtype=torch.uint8)
    return torch.where(ids[y1:y2, x1:x2] == segment.id, crop, noise)


def plain_object(crop: torch.Tensor, size: int) -> torch.Tensor:
    """A crop (3, h, w), uint8, padded with black to a square and resized: (3, size, size) in [0, 1]."""
    return F.to_dtype(_square(crop, size), torch.float32, scale=True)


def augment_object(crop: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """FastComposer's augmentations of a subject's crop (3, h, w), uint8: (3, size, size) in [0, 1].

    In this order: half of the tall crops keep their top square only; black padding to a square, resized to `size`;
    then, each with its own probability, rotation by up to 30 degrees (0.75), color jitter (0.5), blur (0.5), grayscale
    (0.1), mirroring (0.5) and elastic distortion (0.5).
    """
    if _chance(0.5, generator):
        crop = crop[:, : crop.shape[2]]
    image = _square(crop, size)
    if _chance(0.75, generator):
        image = F.rotate(image, _uniform(-30, 30, generator), InterpolationMode.BILINEAR, fill=0)
    if _chance(0.5, generator):
        image = _jitter_colors(image, generator)
    if _chance(0.5, generator):
        image = F.gaussian_blur(image, [5, 5], [_uniform(0.1, 2.0, generator)] * 2)
    if _chance(0.1, generator):
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if _chance(0.5, generator):
        image = F.horizontal_flip(image)
    if _chance(0.5, generator):
        image = _bend(image, generator)
    return F.to_dtype(image, torch.float32, scale=True)


def target_view(
    picture: torch.Tensor, ids: torch.Tensor, resolution: int, mirrored: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The target picture (3, H, W), uint8, as (3, R, R) in [-1, 1], and its instance map as (R, R), int64.

    A wide picture loses its sides; a tall one gets black bars, where its map is `NOWHERE`. Pixels are averaged, but ids
    are not, because a mean of two ids is the id of a third segment or of none.
    """
    height, width = picture.shape[-2:]
    # Resizing needs floating point; 64 bits hold the ids exactly.
    ids = ids[None].double()
    if height > width:
        bars = [(height - width) // 2, 0, (height - width + 1) // 2, 0]
        picture, ids = F.pad(picture, bars, fill=0), F.pad(ids, bars, fill=NOWHERE)
        size = [resolution, resolution]
    else:
        # Rounded down, as torchvision does when it is given the shorter side alone, as in the published code.
        size = [resolution, int(resolution * width / height)]
    picture = F.center_crop(F.resize(picture, size, InterpolationMode.BILINEAR, antialias=True), [resolution])
    ids = F.center_crop(F.resize(ids, size, InterpolationMode.NEAREST_EXACT), [resolution])
    if mirrored:
        picture, ids = F.horizontal_flip(picture), F.horizontal_flip(ids)
    return picture.float() / 127.5 - 1, ids[0].long()


def _square(image: torch.Tensor, size: int) -> torch.Tensor:
    """A picture (3, h, w), uint8, padded with black to a square and resized as at inference: (3, size, size)."""
    return F.to_dtype(square(image.movedim(0, -1) / 255, size).movedim(-1, 0), torch.uint8, scale=True)


def _jitter_colors(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue, each by up to a half, in random order."""
    changes = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation)
    order = torch.randperm(4, generator=generator).tolist()
    factors = [_uniform(0.5, 1.5, generator) for _ in changes]
    turn = _uniform(-0.5, 0.5, generator)
    for i in order:
        image = changes[i](image, factors[i]) if i < len(changes) else F.adjust_hue(image, turn)
    return image


def _bend(image: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Displaces pixels by smooth noise (elastic distortion, Simard et al. 2003)."""
    strength, smoothness = 50.0, 5.0
    height, width = image.shape[-2:]
    noise = torch.rand((2, height, width), generator=generator) * 2 - 1
    kernel = int(8 * smoothness) // 2 * 2 + 1
    shift = F.gaussian_blur(noise, [kernel, kernel], [smoothness, smoothness])
    # Displacements are in units in which the picture runs from -1 to 1, x before y.
    shift = shift * strength / torch.tensor([width, height])[:, None, None]
    return F.elastic(image, shift.permute(1, 2, 0)[None], fill=0)


def _chance(probability: float, generator: torch.Generator) -> bool:
    return bool(torch.rand((), generator=generator) < probability)


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))
