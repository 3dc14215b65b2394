"""Train FastComposer: `python tools/run.py training.fastcomposer --base shapeland --data FOLDER --out FOLDER`.

FastComposer (Xiao et al., arXiv 2305.10431) learns to draw subjects that pictures show: a fuser puts what the vision
tower sees of a subject into the text state of the word that names it, and the UNet learns to draw from such states.

--base is `shapeland`, or a folder with Stable Diffusion (1.x, 2.x, or with two text towers SDXL) in diffusers' form;
--vision is then a folder with CLIP's vision tower and projection (the paper: clip-vit-large-patch14). Nothing is ever
downloaded. --data is in the published format, which `training.data` makes. --out receives checkpoint.pt, log.csv,
sample sheets and, at the end, the file that the node Load FastComposer reads. The same command continues a run. To use
several GPUs or machines, or to force a CPU: `accelerate launch [--cpu] tools/run.py training.fastcomposer ...`; each
process holds a whole model (no sharded optimizers).

--train full is the paper's recipe: the whole UNet, the fuser and the last two layers of the vision tower, AdamW at a
constant 1e-5, and 128 pictures a step for 150 000 steps. --train lora is our variant for small machines: low-rank
factors on the UNet's attention in place of the UNet, and the vision tower left as it is.

Faults of the published program that this one does not repeat:
- One coin for all pictures of a batch decided on masking the noise loss: here each picture has its own.
- The constant rate ignored its warm-up, averaged weights ended the program, and checkpointing reached the frozen text
  tower alone: here all three work.
- With fused attention no probabilities came, and the localization loss divided by zero: here the middle blocks are
  opened one by one and all else stays fused.
- Tall pictures had their instance map interpolated, so that edges got the ids of other segments: ids are only chosen.
- A long caption lost its end token, and if a subject was cut off with it, all subjects moved to other words: the end
  token stays, and a subject whose word cannot be marked becomes text.
- A subject's place at the very beginning marked the start token, and two places behind one word shifted all pictures
  that follow: both become text.
- Fusing overwrote the text's own states, and pictures were prepared by the training process itself, which waited for
  it: here states are new tensors, and --workers prepare pictures.
- Options that ended the program or did nothing (fewest subjects, balancing, threshold) do not exist.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

# What each way of training takes where the command does not say: rate, averaging, trained vision layers.
_DEFAULTS = {"full": (1e-5, 0.0, 2), "lora": (3e-4, 0.999, 0)}
_HALF = {"fp16": "float16", "bf16": "bfloat16"}


def main(argv: list[str]) -> None:
    """Run the training that the command line describes.

    Raises ValueError or FileNotFoundError with one sentence that names the option at fault.
    """
    options = _parser().parse_args(argv)
    rate, average, layers = _DEFAULTS[options.train]
    options.rate = rate if options.rate is None else options.rate
    options.average = average if options.average is None else options.average
    options.vision_layers = layers if options.vision_layers is None else options.vision_layers
    file = options.export or options.out / "fastcomposer.safetensors"
    if file.suffix != ".safetensors":
        raise ValueError(f"--export: expected a name that ends in .safetensors, got {file.name}")
    if options.accumulate < 1:
        raise ValueError(f"--accumulate: expected at least 1, got {options.accumulate}")
    import torch
    from accelerate import Accelerator

    from ..base import open_base
    from ..data.dataset import SubjectPictures
    from .batches import check_subjects
    from .export import export, start_from
    from .model import Composer
    from .run import Run, Settings
    from .sheet import open_sheet

    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    base = open_base(options.base, options.vision, options.resolution)
    data = SubjectPictures(
        options.data,
        resolution=base.resolution,
        object_resolution=base.vision.config.image_size,
        object_types=options.object_types,
        uncondition=options.uncondition,
        object_appear=options.object_appear,
        augment=not options.no_augmentation,
        seed=options.seed,
    )
    check_subjects(data)
    composer = Composer(
        base,
        options.train,
        options.rank,
        options.vision_layers,
        options.localization,
        options.mask_loss_probability,
        options.seed,
    )
    if options.fuser:
        start_from(composer.fuser, options.fuser)
    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=options.accumulate)
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(f"--precision: expected no or bf16 on a {accelerator.device.type}, got fp16")
    if accelerator.mixed_precision in _HALF:
        composer.keep_frozen_in(getattr(torch, _HALF[accelerator.mixed_precision]))
    if options.checkpointing:
        composer.unet.enable_gradient_checkpointing()
    kind = {"base": options.base, "train": options.train, "vision layers": options.vision_layers, "pictures": len(data)}
    if options.train == "lora":
        kind["rank"] = options.rank
    sheet = open_sheet(options.data, composer, options.object_types) if options.sheet_every else None
    run = Run(options.out, accelerator, composer, data, settings, kind, sheet)
    if not run.train():
        accelerator.print(f"stopped after step {run.step} of {options.steps}; the same command continues")
    elif accelerator.is_main_process:
        export(run.weights, file, torch.float32 if options.export_precision == "fp32" else torch.float16)
        print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.fastcomposer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, metavar="shapeland|FOLDER", help="the model to train on")
    add("--vision", type=Path, metavar="FOLDER", help="the vision tower, with a folder as --base")
    add("--data", type=Path, required=True, metavar="FOLDER", help="pictures in the published format")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the run's own folder")
    add("--train", choices=tuple(_DEFAULTS), default="full", help="what is trained (default: %(default)s)")
    add("--rank", type=int, default=16, help="of the LoRA (default: %(default)s)")
    add("--vision-layers", type=int, help="the vision tower's last layers to train (default: full 2, lora 0)")
    add("--fuser", type=Path, metavar="FILE", help="a file with the fuser to start from (default: a random one)")
    add("--steps", type=int, default=150_000, help="train to this step (default: %(default)s)")
    add("--batch", type=int, default=16, help="pictures of a process at a time (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="batches of a process in a step (default: %(default)s)")
    add("--precision", choices=("no", *_HALF), default="no", help="mixed precision (default: %(default)s)")
    add("--checkpointing", action="store_true", help="compute the UNet twice to save most of its memory")
    add("--rate", type=float, help="of learning (default: full 1e-5, lora 3e-4)")
    add("--fuser-rate", type=float, help="of fuser and vision tower, which may have learnt before (default: --rate)")
    add("--warmup", type=int, default=0, help="steps in which the rate rises (default: %(default)s)")
    add("--average", type=float, help="of the weights, per step; 0 for none (default: full 0, lora 0.999)")
    add("--localization", type=float, default=1e-3, help="weight of its loss; 0 for none (default: %(default)s)")
    add("--mask-loss-probability", type=float, default=0.5, help="of minding the subjects alone (default: %(default)s)")
    add("--uncondition", type=float, default=0.1, help="share of pictures without caption (default: %(default)s)")
    add("--object-appear", type=float, default=0.9, help="share of subjects that are seen (default: %(default)s)")
    add("--object-types", nargs="+", metavar="CLASS", help="classes that count as subjects, such as person")
    add("--no-augmentation", action="store_true", help="show pictures and subjects as they are")
    add("--resolution", type=int, help="of pictures, in pixels (default: the base's own)")
    add("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare pictures (default: %(default)s)")
    add("--save-minutes", type=float, default=10.0, help="between checkpoints (default: %(default)s)")
    add("--log-every", type=int, default=100, help="steps (default: %(default)s)")
    add("--sheet-every", type=int, default=1000, help="steps between sample sheets; 0 for none (default: %(default)s)")
    add("--export", type=Path, metavar="FILE", help="what to write at the end (default: OUT/fastcomposer.safetensors)")
    add("--export-precision", choices=("fp16", "fp32"), default="fp16", help="of that file (default: %(default)s)")
    return parser
