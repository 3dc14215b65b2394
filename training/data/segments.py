"""Stage 'segments': the objects in pictures, by Mask2Former's panoptic segmentation (arXiv 2112.01527)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from .folder import SEGMENTS, Folder, Segment, box_of, in_batches, model_folder, work_through


def keep_labels(
    ids: np.ndarray, labels: dict[int, str], wanted: list[str] | None = None
) -> tuple[np.ndarray, list[Segment]]:
    """The instance map (H, W) of the segments of `ids` that `labels` names (id: class name), only those of the classes
    `wanted` if given, and these segments; all other pixels are 0."""
    kept, segments = np.zeros(ids.shape, np.int64), []
    for segment_id, label in labels.items():
        mask = ids == segment_id
        if mask.any() and (wanted is None or label in wanted):
            kept[mask] = segment_id
            segments.append(Segment(segment_id, box_of(mask), label))
    return kept, segments


def write_segments(
    folder: Folder,
    model: Path,
    labels: list[str] | None = None,
    device: str = "cpu",
    batch: int = 4,
    again: bool = False,
    confidence: float = 0.5,
) -> None:
    """Writes `<id>.npy` and `<id>.segments.json` of every picture that has none, with the Mask2Former model in the
    folder `model`; only for the classes `labels` if given. Queries with a score below `confidence` are dropped.

    Raises FileNotFoundError or ValueError if there is no such model or it does not know such a class.
    """
    ids = folder.left_to_do((), (SEGMENTS,), again)
    model = model_folder(model, "Mask2Former model", "--model")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    names = Mask2FormerConfig.from_pretrained(model, local_files_only=True).id2label
    unknown = sorted(set(labels or ()) - set(names.values()))
    if unknown:
        raise ValueError(
            f"--labels: expected classes that the model knows ({', '.join(sorted(set(names.values())))}), got "
            f"{', '.join(unknown)}"
        )
    if not ids:
        return
    processor = Mask2FormerImageProcessor.from_pretrained(model, local_files_only=True)
    segmenter = Mask2FormerForUniversalSegmentation.from_pretrained(model, local_files_only=True, dtype=torch.float32)
    segmenter = segmenter.eval().to(device)

    @torch.inference_mode()
    def work(some: list[str]) -> None:
        pictures = [folder.image(i) for i in some]
        inputs = processor(images=pictures, return_tensors="pt").to(device)
        found = processor.post_process_panoptic_segmentation(
            segmenter(**inputs),
            threshold=confidence,
            # No class is fused: the library gives the segment after a fused one an id that is already taken.
            label_ids_to_fuse=set(),
            target_sizes=[(p.height, p.width) for p in pictures],
        )
        for image_id, one in zip(some, found, strict=True):
            classes = {s["id"]: names[s["label_id"]] for s in one["segments_info"]}
            kept, segments = keep_labels(one["segmentation"].cpu().numpy(), classes, labels)
            folder.write_map(image_id, kept)
            # Last, because this file marks the image as done.
            folder.write_json(image_id, SEGMENTS, [s.record() for s in segments])

    work_through("segments", _of_one_size(folder, ids, batch), len(ids), work)


def _of_one_size(folder: Folder, ids: list[str], batch: int) -> Iterator[list[str]]:
    """Batches of pictures of one size. Smaller ones would be padded to the largest, and the library treats the padding
    as part of the picture when it enlarges the masks, which shifts them."""
    for _, same in groupby(sorted(ids, key=folder.size), key=folder.size):
        yield from in_batches(list(same), batch)
