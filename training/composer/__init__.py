"""Train a Composer adapter: `python tools/run.py training.composer --base shapeland --data FOLDER --out FOLDER`.

Composer (Huang et al., arXiv 2302.09778) learns to draw pictures from any of eight representations of them. Here an
adapter learns it for a UNet that stays as it is. Pictures are taken apart while training: palette, sketch, intensity
and a region that is drawn anew from the picture itself, semantics by the vision tower, the caption from its text file.

--base is `shapeland`, or a folder with Stable Diffusion 1.x, 2.x or SDXL in diffusers' format; --vision is then a
folder with CLIP's vision tower (published: CLIP ViT-L/14). Nothing is ever downloaded. --data is a folder with
pictures at any depth. Beside NAME.png, .jpg or .webp may lie

  NAME.txt             the caption
  NAME.sketch.png      strokes, in place of the picture's contours; the rarer of black and white is taken for them
  NAME.depth.png       near is white
  NAME.instances.png   the number of the thing at each pixel, 0 for none
  NAME.instances.txt   the noun of each thing, a line each

(the maps in any of these formats, also with 16 bits)

What does not lie there is absent. `python tools/run.py training.data compositions` draws such a folder of Shapeland.
--out receives checkpoint.pt, log.csv, sample sheets and, at the end, composer.safetensors for the node Load Composer
Adapter. The same command resumes a run. To use several GPUs or machines, or to force a CPU:
`accelerate launch [--cpu] tools/run.py training.composer ...`.

Of the representations of a picture all are kept in a tenth of the cases, none in another tenth; else each is kept
with probability 0.5, the intensity, which says most of a picture, with 0.3, as published. The paper's loss is that of
noise prediction, and here that of whatever the base predicts.

A picture with the most noise that Stable Diffusion's schedule has still shows its mean color, and the noise from
which sampling begins shows none (Lin et al., arXiv 2305.08891). So an adapter learns to leave light and dark to the
noise. With --from-noise 0.1 a tenth of the pictures are trained from noise alone, for bases that predict v.

With --only intensity the adapter that --start names learns more of that representation: its other weights do not
change, and all pictures that have an intensity keep it, half of them beside nothing but the caption.
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
    file = export_file(options, "composer.safetensors")
    from .script import train

    train(options, file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.composer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_base(parser, "pictures, with their representations beside them")
    add = parser.add_argument
    add("--mode", choices=("levels", "input"), default="levels", help="where maps are added (default: %(default)s)")
    add("--local-width", type=int, default=64, help="channels of the summed maps (default: %(default)s)")
    add("--body-share", type=int, default=4, help="a level's channels by those of the adapter (default: %(default)s)")
    add("--start", type=Path, metavar="FILE", help="an adapter to start from (default: random weights)")
    add(
        "--timesteps", choices=("uniform", "cubic"), default="uniform", help="cubic: mostly high (default: %(default)s)"
    )
    add(
        "--from-noise",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the pictures, trained from noise alone (default: %(default)s)",
    )
    add("--only", default="", metavar="NAME", help="train only the weights of this representation, of --start's file")
    add("--learning-rate", type=float, default=1e-4, help="constant after --warmup (default: %(default)s)")
    add("--average", type=float, default=0.9999, help="of the weights, per step; 0 for none (default: %(default)s)")
    add_run(parser, "composer.safetensors", 100_000, 8)
    add_unet(parser)
    return parser
