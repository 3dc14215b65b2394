"""Text to masks: segmenters find objects in a picture by nouns, all with the same method.

A segmenter has `segment(image, nouns)`, with image (H, W, 3) in [0, 1], which returns candidates for each noun. SAM3
and Shapeland's judge do this in one model. `Boxes` combines a detector, which finds boxes, with a cutter, which finds
the object in a box (see `boxes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import comfy.model_base
import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F

from ...shapeland.world import NOUNS
from ...subjects.collage import flat_boxes
from ...subjects.instances import Candidate, Detections, choose, read_nouns
from ...subjects.partition import divide, picture
from ..shapeland import load_judge, read_with


class Segmenter(Protocol):
    """Finds objects by nouns."""

    def segment(self, image: torch.Tensor, nouns: Sequence[str]) -> list[list[Candidate]]:
        """Returns for each noun the candidates in the picture (H, W, 3), in any order."""


class Detector(Protocol):
    """Finds boxes by nouns."""

    def detect(self, image: torch.Tensor, nouns: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns for each noun boxes (n, 4), as left, top, right and bottom in pixels, and scores (n,)."""


class Cutter(Protocol):
    """Finds the object in a box."""

    def cut(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Returns masks (n, H, W), boolean, of the main object in each of n >= 1 boxes (n, 4)."""


def text_to_masks(
    segmenter: Segmenter, image: torch.Tensor, nouns: str, absent: str
) -> tuple[torch.Tensor, Detections, torch.Tensor]:
    """Finds one mask per entry of a list of nouns.

    Args:
        segmenter: finds the candidates.
        image: (H, W, 3), values 0..1.
        nouns: list of nouns in the syntax of `instances.read_nouns`.
        absent: one of `instances.ABSENT`.

    Returns:
        Masks (N, H, W) of zeros and ones, their detections, and a preview (H, W, 3).

    Raises:
        ValueError: raised by `instances.read_nouns`, `instances.choose` or the segmenter.
    """
    wanted = read_nouns(nouns)
    found = segmenter.segment(image, [want.noun for want in wanted])
    masks, detections = choose(found, wanted, absent, tuple(image.shape[:2]))
    return masks.float(), detections, picture(divide(masks, 0), image)


class Boxes:
    """A segmenter made of a detector and a cutter. A candidate has the score of its box."""

    def __init__(self, detector: Detector, cutter: Cutter):
        self.detector, self.cutter = detector, cutter

    def segment(self, image: torch.Tensor, nouns: Sequence[str]) -> list[list[Candidate]]:
        """Returns the candidates for each noun; the cutter gets all boxes of the picture at once."""
        detected = self.detector.detect(image, nouns)
        boxes = torch.cat([boxes.cpu().float() for boxes, _ in detected])
        masks = self.cutter.cut(image, boxes) if len(boxes) else torch.zeros(0, *image.shape[:2], dtype=torch.bool)
        parts = masks.cpu().split([len(boxes) for boxes, _ in detected])
        return [
            [Candidate(mask, float(score)) for mask, score in zip(part, scores, strict=True)]
            for part, (_, scores) in zip(parts, detected, strict=True)
        ]


class GivenBoxes:
    """A detector for boxes drawn by the user: the first box is for the first noun, and so on."""

    def __init__(self, boxes):
        """`boxes`: one or more in ComfyUI's format, with x, y, width and height in pixels."""
        self.boxes = [
            [box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]] for box in flat_boxes(boxes)
        ]

    def detect(self, _image: torch.Tensor, nouns: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns one box with score 1 per noun.

        Raises:
            ValueError: there are more or fewer boxes than nouns.
        """
        if len(self.boxes) != len(nouns):
            raise ValueError(f"boxes: expected one per noun, got {len(self.boxes)} for {len(nouns)} nouns")
        return [(torch.tensor([box], dtype=torch.float32), torch.ones(1)) for box in self.boxes]


class ShapelandJudge:
    """A segmenter for pictures of Shapeland, whose judge recognizes every object in them."""

    def __init__(self):
        self.judge = load_judge()

    def segment(self, image: torch.Tensor, nouns: Sequence[str]) -> list[list[Candidate]]:
        """Returns the objects that the judge calls by each noun's last word.

        Raises:
            ValueError: a noun is not one of Shapeland's.
        """
        words = [noun.lower().split()[-1] for noun in nouns]
        for noun, word in zip(nouns, words, strict=True):
            if word not in NOUNS:
                raise ValueError(f"nouns: expected things of Shapeland ({', '.join(NOUNS)}), got {noun!r}")
        (things,) = read_with(self.judge, image[None])
        return [[Candidate(one.mask, one.confidence) for one in things if NOUNS[one.noun] == word] for word in words]


class Sam3:
    """ComfyUI's SAM3 as a segmenter. Nouns are queried one by one, because a list's results are not separated.

    The masks are the detector's own, at a quarter of its input size. ComfyUI's node refines them, but such details are
    lost when masks are averaged over the tokens of a diffusion model.
    """

    def __init__(self, model, clip, threshold: float):
        """`model` and `clip` are from Load Checkpoint. Candidates with a score above `threshold` are used.

        Raises:
            ValueError: the model is not SAM3.
        """
        if not isinstance(model.model, comfy.model_base.SAM3):
            raise ValueError(f"model: expected SAM3 from Load Checkpoint, got {type(model.model).__name__}")
        self.model, self.clip, self.threshold = model, clip, threshold

    def segment(self, image: torch.Tensor, nouns: Sequence[str]) -> list[list[Candidate]]:
        """Returns the candidates for each noun. The score is the presence of the noun times the candidate's own.

        Raises:
            ValueError: the text encoder is not SAM3's.
        """
        prompts = {noun: self._encode(noun) for noun in nouns}
        comfy.model_management.load_model_gpu(self.model)
        net, device = self.model.model.diffusion_model, self.model.load_device
        dtype = self.model.model.get_dtype()
        side = net.detector.backbone["vision_backbone"].trunk.img_size
        pixels = comfy.utils.common_upscale(image[None, ..., :3].movedim(-1, 1), side, side, "bilinear", "disabled")
        pixels = pixels.to(device, dtype)
        found = {}
        with torch.no_grad():
            for noun, (text, mask) in prompts.items():
                comfy.model_management.throw_exception_if_processing_interrupted()
                out = net(pixels, text_embeddings=text.to(device, dtype), text_mask=mask.to(device))
                found[noun] = self._candidates(out, tuple(image.shape[:2]))
        return [found[noun] for noun in nouns]

    def _encode(self, noun: str) -> tuple[torch.Tensor, torch.Tensor]:
        text, extra = self.clip.encode_from_tokens_scheduled(self.clip.tokenize(noun))[0]
        wanted = self.model.model.diffusion_model.detector.backbone["language_backbone"]["resizer"].in_features
        if text.shape[-1] != wanted or extra.get("attention_mask") is None:
            raise ValueError(f"clip: expected the text encoder of SAM3 (width {wanted}), got one of {text.shape[-1]}")
        return text, extra["attention_mask"]

    def _candidates(self, out: dict[str, torch.Tensor], size: tuple[int, int]) -> list[Candidate]:
        scores = (out["scores"][0].float().sigmoid() * out["presence"][0].float().sigmoid()).cpu()
        kept = torch.nonzero(scores > self.threshold).flatten().tolist()
        if not kept:
            return []
        logits = out["masks"][0, kept].float()[:, None]
        masks = F.interpolate(logits, size, mode="bilinear", align_corners=False)[:, 0].cpu() > 0
        return [Candidate(mask, float(scores[i])) for i, mask in zip(kept, masks, strict=True)]
