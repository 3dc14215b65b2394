"""Train PromptNet: `python tools/run.py training.promptnet --base shapeland --data FOLDER --out FOLDER`.

PromptNet (ProFusion, Zhou et al., arXiv 2305.13579) learns to make the embedding of a word for what a picture shows.
The UNet and both towers stay as they are; the loss is that of the UNet's own training, with the word in the caption.

--base is `shapeland`, or a folder with Stable Diffusion 1.x or 2.x in diffusers' format; --vision is then a folder with
CLIP's vision tower (published: CLIP ViT-H/14). Nothing is ever downloaded. --data is a folder with pictures; captions
are not needed. A subfolder holds pictures of the same thing: one of them is then the reference for another, so that the
word leaves out what differs between them. A text file of a picture's name may say what else it shows, with {} for the
thing. --out receives checkpoint.pt, log.csv, sample sheets and, at the end, promptnet.safetensors for the node Load
PromptNet. The same command resumes a run. To use several GPUs or machines, or to force a CPU:
`accelerate launch [--cpu] tools/run.py training.promptnet ...`.

The defaults are the published recipe: a constant learning rate of 2e-5, AdamW, gradients clipped at 1; published are
80 000 steps of 64 pictures on faces. The network starts with the UNet's own weights where it has the same layers.

Errors of the published program that this one does not repeat:
- Heads for residuals were computed, whose output nothing reads: here they do not exist.
- Settings for v-prediction ended the fine-tuning: here the loss is what the base predicts.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> None:
    """Runs the training that the command line describes.

    Raises ValueError or FileNotFoundError; the message names the option at fault.
    """
    options = _parser().parse_args(argv)
    file = options.export or options.out / "promptnet.safetensors"
    if file.suffix != ".safetensors":
        raise ValueError(f"--export: expected a name that ends in .safetensors, got {file.name}")
    from .script import train

    train(options, file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.promptnet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", required=True, metavar="shapeland|FOLDER", help="the model to train for")
    add("--vision", type=Path, metavar="FOLDER", help="the vision tower, with a folder as --base")
    add("--data", type=Path, required=True, metavar="FOLDER", help="pictures, a subfolder for each thing")
    add("--caption", default="a photo of {}", help="of pictures without a text file (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the run's own folder")
    add("--start", type=Path, metavar="FILE", help="a PromptNet to start from (default: the UNet's own weights)")
    add("--channels", type=int, nargs="+", help="of the levels, for a narrower network (default: the UNet's)")
    add("--region-channels", type=int, default=128, help="of each level's projection (default: %(default)s)")
    add("--steps", type=int, default=80_000, help="train to this step (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="pictures of a process at a time (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="batches of a process in a step (default: %(default)s)")
    add("--precision", choices=("no", "fp16", "bf16"), default="no", help="mixed precision (default: %(default)s)")
    add("--checkpointing", action="store_true", help="compute the UNet twice to save most of its memory")
    add("--learning-rate", type=float, default=2e-5, help="constant after --warmup (default: %(default)s)")
    add("--warmup", type=int, default=0, help="steps in which the learning rate rises (default: %(default)s)")
    add("--average", type=float, default=0.9999, help="of the weights, per step; 0 for none (default: %(default)s)")
    add("--l2", type=float, default=0.0, help="weight of the word's mean square in the loss (default: %(default)s)")
    add("--resolution", type=int, help="of pictures, in pixels (default: the base's own)")
    add("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add("--workers", type=int, default=0, help="processes that prepare pictures (default: %(default)s)")
    add("--save-minutes", type=float, default=10.0, help="between checkpoints (default: %(default)s)")
    add("--log-every", type=int, default=100, help="steps (default: %(default)s)")
    add("--sheet-every", type=int, default=1000, help="steps between sample sheets; 0 for none (default: %(default)s)")
    add("--export", type=Path, metavar="FILE", help="what to write at the end (default: OUT/promptnet.safetensors)")
    return parser
