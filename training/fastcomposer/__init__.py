"""Train FastComposer: `python tools/run.py training.fastcomposer --base shapeland --data FOLDER --out FOLDER`.

FastComposer (Xiao et al., arXiv 2305.10431) learns to draw the subjects of reference pictures: a fuser adds what the
vision tower sees of a subject to the text state of its word, and the UNet learns to draw from such states.

--base is `shapeland`, or a folder with Stable Diffusion (1.x, 2.x, or with two text towers SDXL) in diffusers' format;
--vision is then a folder with CLIP's vision tower and projection (the paper: clip-vit-large-patch14). Nothing is ever
downloaded. --data is in the published format, which `training.data` makes. --out receives checkpoint.pt, log.csv,
sample sheets and, at the end, the file that the node Load FastComposer reads. The same command resumes a run. To use
several GPUs or machines, or to force a CPU: `accelerate launch [--cpu] tools/run.py training.fastcomposer ...`; each
process holds a whole model (no sharded optimizers).

--train full is the paper's recipe: the whole UNet, the fuser and the last two layers of the vision tower, AdamW at a
constant 1e-5, and 128 pictures a step for 150 000 steps. --train lora is our variant for small machines: low-rank
factors on the UNet's attention in place of the UNet, and the vision tower left as it is.

Errors of the published program that this one does not repeat:
- One random draw for a whole batch decided whether its noise loss is masked: here each picture has its own.
- The constant rate ignored its warm-up, weight averaging ended the program, and checkpointing reached the frozen text
  tower alone: here all three work.
- Fused attention gave no probabilities, and the localization loss divided by zero: here each of the middle blocks
  computes them and all others stay fused.
- Tall pictures had their instance map interpolated, so that edges got the ids of other segments: here it is not.
- A long caption lost its end token, and if a subject was cut off with it, all subjects moved to other words: here the
  end token stays, and a subject whose word cannot be marked becomes text.
- A subject at the very beginning of a caption marked the start token, and two subjects after one word shifted all
  following pictures: here both become text.
- Fusing overwrote the text's own states, and the training process prepared the pictures itself and waited for them:
  here states are new tensors, and --workers prepare pictures.
- Options that ended the program or did nothing (fewest subjects, balancing, threshold) do not exist.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..options import add_base, add_run, add_unet, export_file

# Defaults that depend on --train.
_DEFAULTS = {
    "full": {"learning_rate": 1e-5, "average": 0.0, "vision_layers": 2},
    "lora": {"learning_rate": 3e-4, "average": 0.999, "vision_layers": 0},
}


def main(argv: list[str]) -> None:
    """Runs the training that the command line describes.

    Raises ValueError or FileNotFoundError; the message names the option at fault.
    """
    options = _parser().parse_args(argv)
    for name, value in _DEFAULTS[options.train].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    file = export_file(options, "fastcomposer.safetensors")
    from .script import train

    train(options, file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.fastcomposer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_base(parser, "pictures in the published format")
    add = parser.add_argument
    add("--train", choices=tuple(_DEFAULTS), default="full", help="what is trained (default: %(default)s)")
    add("--rank", type=int, default=16, help="of the LoRA (default: %(default)s)")
    add("--vision-layers", type=int, help="the vision tower's last layers to train (default: full 2, lora 0)")
    add("--fuser", type=Path, metavar="FILE", help="a file with the fuser to start from (default: a random one)")
    add("--learning-rate", type=float, help="constant after --warmup (default: full 1e-5, lora 3e-4)")
    add("--fuser-learning-rate", type=float, help="of fuser and vision tower (default: --learning-rate)")
    add("--average", type=float, help="of the weights, per step; 0 for none (default: full 0, lora 0.999)")
    add("--localization", type=float, default=1e-3, help="weight of its loss; 0 for none (default: %(default)s)")
    add("--mask-loss-probability", type=float, default=0.5, help="of minding the subjects alone (default: %(default)s)")
    add("--uncondition", type=float, default=0.1, help="share of pictures without caption (default: %(default)s)")
    add("--object-appear", type=float, default=0.9, help="share of subjects that are seen (default: %(default)s)")
    add("--object-types", nargs="+", metavar="CLASS", help="classes that count as subjects, such as person")
    add("--no-augmentation", action="store_true", help="show pictures and subjects as they are")
    add_run(parser, "fastcomposer.safetensors", 150_000, 16)
    add_unet(parser)
    add("--export-precision", choices=("fp16", "fp32"), default="fp16", help="of that file (default: %(default)s)")
    return parser
