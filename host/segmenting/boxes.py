"""Boxes from text and masks from boxes: Grounding DINO, and Segment Anything from transformers or its own package.

All models are loaded from local files: nothing is downloaded, and no code in a file is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import comfy.model_management
import comfy.model_patcher
import torch
from safetensors import SafetensorError

from ...encoders.files import check, check_folder, read_state
from ..model.networks import in_patcher
from .segmenters import Cutter

SAM_KINDS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
"""The names of the models in the segment-anything package, by the width of the image encoder."""

_PATCH_WEIGHT = "image_encoder.patch_embed.proj.weight"


class GroundingDino:
    """A detector: Grounding DINO, as saved by transformers."""

    def __init__(self, weights: Path, threshold: float):
        """Loads the model from the folder of `weights`, which also has the config, tokenizer and preprocessor.

        Boxes with a score above `threshold` are returned.

        Raises:
            ValueError: the folder does not contain such a model.
        """
        from transformers import AutoModelForZeroShotObjectDetection

        wanted = "detector: Grounding DINO"
        self.processor, self.model = _from_folder(AutoModelForZeroShotObjectDetection, weights, wanted)
        self.patcher, self.threshold = _patcher(self.model), threshold

    def detect(self, image: torch.Tensor, nouns: Sequence[str]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Boxes (n, 4) and scores (n,) for each noun. Each noun is a separate prompt, so that its boxes are known."""
        _load(self.patcher)
        found = {}
        for noun in dict.fromkeys(nouns):
            comfy.model_management.throw_exception_if_processing_interrupted()
            # The model expects lowercase phrases that end with a period.
            inputs = self.processor(images=_bytes(image), text=f"{noun.lower()}.", return_tensors="pt")
            inputs = inputs.to(self.patcher.load_device)
            with torch.no_grad():
                out = self.model(**inputs)
            (result,) = self.processor.post_process_grounded_object_detection(
                out, inputs["input_ids"], threshold=self.threshold, target_sizes=[tuple(image.shape[:2])]
            )
            found[noun] = result["boxes"].cpu(), result["scores"].cpu()
        return [found[noun] for noun in nouns]


class TransformersSam:
    """A cutter: SAM or SAM 2, as saved by transformers."""

    def __init__(self, weights: Path):
        """Loads the model from the folder of `weights`, which also has the config and preprocessor.

        Raises:
            ValueError: the folder does not contain such a model.
        """
        from transformers import AutoModelForMaskGeneration

        self.processor, self.model = _from_folder(AutoModelForMaskGeneration, weights, "sam: SAM or SAM 2")
        self.patcher = _patcher(self.model)

    def cut(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Masks (n, H, W), boolean, of n boxes (n, 4)."""
        _load(self.patcher)
        inputs = self.processor(images=_bytes(image), input_boxes=[boxes.tolist()], return_tensors="pt")
        sizes = [inputs.pop(key) for key in ("original_sizes", "reshaped_input_sizes") if key in inputs]
        with torch.no_grad():
            out = self.model(**inputs.to(self.patcher.load_device), multimask_output=False)
        (masks,) = self.processor.post_process_masks(out.pred_masks.cpu(), *sizes)
        return masks[:, 0]


class SegmentAnything:
    """A cutter: SAM in its own package."""

    def __init__(self, path: Path):
        """Loads a checkpoint such as sam_vit_b_01ec64.pth.

        Raises:
            ValueError: the package is not installed, or the file is not a checkpoint of it.
        """
        try:
            from segment_anything import SamPredictor, sam_model_registry
        except ImportError as error:
            raise ValueError(
                f"sam: expected the package segment-anything for {path.name}, got none; pip install segment-anything "
                "gives it"
            ) from error
        state = read_state(path, "sam")
        kind = SAM_KINDS.get(len(state.get(_PATCH_WEIGHT, ())))
        if kind is None:
            raise ValueError(f"sam: expected a checkpoint of Segment Anything, got {path.name} with other weights")
        model = sam_model_registry[kind]()
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"sam: expected all weights of SAM {kind}, got {path.name} with others") from error
        self.patcher = _patcher(model)
        self.predictor = SamPredictor(model)

    def cut(self, image: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """Masks (n, H, W), boolean, of n boxes (n, 4)."""
        _load(self.patcher)
        self.predictor.set_image(_bytes(image))
        scaled = self.predictor.transform.apply_boxes_torch(boxes, tuple(image.shape[:2]))
        masks, _, _ = self.predictor.predict_torch(None, None, scaled.to(self.patcher.load_device), None, False)
        self.predictor.reset_image()
        return masks[:, 0].cpu()


def load_cutter(path: Path) -> Cutter:
    """Loads a cutter: with transformers if the folder of the weights has a config.json, else with segment-anything."""
    return TransformersSam(path) if (path.parent / "config.json").exists() else SegmentAnything(path)


def _from_folder(auto_class, weights: Path, wanted: str):
    """Loads the processor and the model from the folder of `weights`, as saved by transformers."""
    from transformers import AutoProcessor

    folder, (name, _, what) = weights.parent, wanted.partition(": ")
    check(weights, name)
    check_folder(folder, name)
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        model = auto_class.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{name}: expected {what}, as transformers saves it, got what is in {folder.name}") from error
    return processor, model


def _load(patcher: comfy.model_patcher.ModelPatcher) -> None:
    """Loads a model as a whole: its layers are not ComfyUI's, which could be loaded one by one."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)


def _patcher(model: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A patcher for the model, so that ComfyUI manages its memory. It contains a ModuleList, because ComfyUI sets the
    attribute `device` of the patched module, which is read-only in these models."""
    return in_patcher(torch.nn.ModuleList([model.eval().requires_grad_(False)]))


def _bytes(image: torch.Tensor):
    """(H, W, 3) in [0, 1] as an array of bytes, which all preprocessors handle alike."""
    return (image[..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
