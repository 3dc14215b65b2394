"""Train Shapeland's models: `python tools/run.py training.shapeland STAGE`, the same on a CPU and a GPU.

Stages, in the order in which each needs the ones before: scenes, autoencoder, decoder, clip, judge, unet. Every stage
is deterministic by seed, stores its checkpoint, loss log and samples in `runs/shapeland/`, continues where it stopped,
and writes its weights to `runs/shapeland/weights/` at its end. The stages `fuser` and `promptnet` work on the shipped
weights; their own weights stay in their folders, for FastComposer's and PromptNet's training to start from. The stage
`check` trains nothing: the trained UNet draws 512 held-out captions in 50 steps, and the judge reads them.
"""

from __future__ import annotations

import argparse
import os

STAGES = ("scenes", "autoencoder", "decoder", "clip", "judge", "unet", "fuser", "promptnet", "check")


def main(argv: list[str]) -> None:
    """Runs the stage that the command line names."""
    import torch

    parser = argparse.ArgumentParser(prog="training.shapeland", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, help="train to this step instead of the stage's own last one")
    parser.add_argument(
        "--batch-size", type=int, default=32, help="pictures per step of the unet; a GPU wants 256 or more"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the unet; with a batch of 512, 2e-3")
    parser.add_argument("--shards", type=int, default=8, help="of 8192 pictures each that the unet is trained on")
    parser.add_argument("--lanes", type=int, help="threads that share a step of the unet; default: a CPU's cores, or 1")
    parser.add_argument("--compile", action="store_true", help="compile the unet: minutes at the start")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="interrupt the unet's run after so many")
    parser.add_argument("--from-shipped", action="store_true", help="a new run starts from the shipped weights")
    options = parser.parse_args(argv)
    if options.stage == "scenes":
        from .common import open_scenes

        open_scenes()
    elif options.stage == "autoencoder":
        from .autoencoder import train_autoencoder

        train_autoencoder(options.device, options.steps or 3000, options.from_shipped)
    elif options.stage == "decoder":
        from .autoencoder import train_decoder

        train_decoder(options.device, options.steps or 600)
    elif options.stage == "clip":
        from .clip import train_clip

        train_clip(options.device, options.steps or 1400, options.from_shipped)
    elif options.stage == "judge":
        from .judge import train_judge

        train_judge(options.device, options.steps or 2800, options.from_shipped)
    elif options.stage == "fuser":
        from .fuser import train_fuser

        train_fuser(options.device, options.steps or 1800)
    elif options.stage == "promptnet":
        from .promptnet import train_promptnet

        train_promptnet(options.device, options.steps or 1500)
    elif options.stage == "check":
        from .unet import check_unet

        check_unet(options.device)
    else:
        from .unet import train_unet

        train_unet(
            options.device,
            options.steps or 60000,
            options.batch_size,
            options.lanes
            or (min(os.cpu_count() or 1, max(1, options.batch_size // 8)) if options.device == "cpu" else 1),
            options.compile,
            options.from_shipped,
            60 * options.minutes,
            options.learning_rate,
            options.shards,
        )
