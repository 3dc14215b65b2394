"""Trains a concept on diffusers' models, in one process or many."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...encoders import concept_files
from ...encoders.files import whole_file
from ..base import open_base
from ..loop import Run
from ..options import check_least
from ..signals import Stopped
from .diffusion import Learner
from .learner import Example, Recipe, concept_optimizer, draw_batch
from .pictures import Pictures, name_of

FILE = "concept.safetensors"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_LEAST = {
    **{"steps": 1, "learning_rate": 0, "batch_size": 1, "rank": 0},
    **{"class_pictures": 0, "prior_weight": 0, "log_every": 1},
}


def train(options, recipe: Recipe) -> None:
    """Runs the training of `options` (see the package) and writes the concept.

    Raises:
        ValueError, FileNotFoundError: an option cannot be used; the message says which and why.
    """
    from accelerate import Accelerator

    check_least(options, _LEAST)
    name = name_of(options.class_word, options.placeholder, recipe)
    pictures = read_pictures(options.images, options.masks, options.caption)
    base = open_base(options.base, resolution=options.resolution, with_vision=False)
    views = pictures.views(recipe, base.resolution)
    accelerator = Accelerator(mixed_precision=options.precision)
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"--precision: expected no or bf16, got {accelerator.mixed_precision}")
    learner = Learner(base, name, recipe, accelerator.device, accelerator.mixed_precision == "bf16")
    class_caption = options.caption.replace("{}", name.class_word)
    learner.check([*dict.fromkeys(caption for _, caption in views), class_caption])
    if options.checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    kind = {option: getattr(options, option) for option in _OF_A_RUN}
    kind |= {"pictures": _digest(pictures), "processes": accelerator.num_processes}
    optimizer = concept_optimizer(learner.weights, recipe)
    run = Run(options.out, learner, optimizer, recipe.steps, recipe.seed, accelerator=accelerator, kind=kind)
    prior = []
    if options.class_pictures:
        # The first process draws them; the others and a resumed run read its file.
        digest = hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:12]
        file = options.out / f"class-{digest}.safetensors"
        with accelerator.main_process_first():
            if not file.exists():
                drawn = learner.draw_class(class_caption, options.class_pictures)
                with whole_file(file) as part:
                    save_file({"latents": drawn.cpu().contiguous()}, part)
        latents = load_file(file, str(accelerator.device))["latents"]
        everywhere = torch.ones(latents.shape[-2:], device=latents.device)
        prior = [Example(latent, everywhere, class_caption) for latent in latents]
    examples = learner.examples(views)

    def losses(_step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        processes = accelerator.num_processes, accelerator.process_index
        times, device = base.times, accelerator.device
        return run.module(*draw_batch(examples, prior, recipe.batch_size, times, generator, device, *processes))

    try:
        run.train(losses, options.log_every, save_seconds=60 * options.save_minutes)
    except Stopped as stopped:
        accelerator.print(stopped)
        return
    if accelerator.is_main_process:
        concept = replace(learner.weights.concept(name, "training.concepts"), base=learner.fingerprint)
        concept_files.save(concept, options.out / FILE)
        print(f"{options.out / FILE}: {(options.out / FILE).stat().st_size / 2**20:.1f} MiB")


_OF_A_RUN = (
    *("base", "class_word", "placeholder", "caption", "new_word", "steps", "learning_rate", "batch_size", "rank"),
    *("seed", "class_pictures", "prior_weight", "augmentation", "resolution", "precision"),
)
"""Options that must be the same as in the checkpoint."""


def _digest(pictures: Pictures) -> str:
    """A hash of the pictures with their masks and captions."""
    found = hashlib.sha256("\n".join(pictures.captions).encode())
    for tensor in (*pictures.images, *pictures.masks):
        found.update(b"-" if tensor is None else tensor.numpy().tobytes())
    return found.hexdigest()


def read_pictures(folder: Path, masks: Path | None, caption: str) -> Pictures:
    """The pictures of a folder in the order of their names, with captions and masks.

    Raises:
        FileNotFoundError: the folder holds no picture, or a picture has no mask.
        ValueError: a caption does not have {} exactly once.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise FileNotFoundError(f"--images: expected a folder with pictures ({', '.join(PICTURES)}), got {folder}")
    shown, found = [], []
    for file in files:
        beside = file.with_suffix(".txt")
        found.append(beside.read_text(encoding="utf-8").strip() if beside.exists() else caption)
        mask = None
        if masks is not None:
            its_own = [masks / (file.stem + suffix) for suffix in PICTURES if (masks / (file.stem + suffix)).exists()]
            if not its_own:
                raise FileNotFoundError(
                    f"--masks: expected a mask named {file.stem} for {file.name}, got none in {masks}"
                )
            mask = _open(its_own[0], "L")
        shown.append((_open(file, "RGB"), mask))
    return Pictures([image for image, _ in shown], [mask for _, mask in shown], found)


def _open(file: Path, mode: str) -> torch.Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(Image.open(file)).convert(mode)
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)
