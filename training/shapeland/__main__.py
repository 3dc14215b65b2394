"""Command line of Shapeland's training."""

import argparse

import torch

from . import __doc__ as description


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(prog="python -m training.shapeland", description=description)
    parser.add_argument("stage", choices=("scenes", "autoencoder", "clip", "judge", "unet"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="train to this step instead of the stage's own last one")
    options = parser.parse_args()
    if options.stage == "scenes":
        from .common import open_scenes

        open_scenes()
    elif options.stage == "autoencoder":
        from .autoencoder import train_autoencoder

        train_autoencoder(options.device, options.steps or 3000)
    elif options.stage == "clip":
        from .clip import train_clip

        train_clip(options.device, options.steps or 2500)
    elif options.stage == "judge":
        from .judge import train_judge

        train_judge(options.device, options.steps or 2500)
    else:
        from .unet import train_unet

        train_unet(options.device, options.steps or 60000)


main()
