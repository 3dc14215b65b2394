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

from ..options import add_base, add_run, add_unet, export_file


def main(argv: list[str]) -> None:
    """Runs the training that the command line describes.

    Raises ValueError or FileNotFoundError; the message names the option at fault.
    """
    options = _parser().parse_args(argv)
    file = export_file(options, "promptnet.safetensors")
    from .script import train

    train(options, file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.promptnet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_base(parser, "pictures, a subfolder for each thing")
    add = parser.add_argument
    add("--caption", default="a photo of {}", help="of pictures without a text file (default: %(default)s)")
    add("--start", type=Path, metavar="FILE", help="a PromptNet to start from (default: the UNet's own weights)")
    add("--channels", type=int, nargs="+", help="of the levels, for a narrower network (default: the UNet's)")
    add("--region-channels", type=int, default=128, help="of each level's projection (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-5, help="constant after --warmup (default: %(default)s)")
    add("--average", type=float, default=0.9999, help="of the weights, per step; 0 for none (default: %(default)s)")
    add("--l2", type=float, default=0.0, help="weight of the word's mean square in the loss (default: %(default)s)")
    add_run(parser, "promptnet.safetensors", 80_000, 8)
    add_unet(parser)
    return parser
