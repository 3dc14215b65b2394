"""Train a prior: `python tools/run.py training.prior --base shapeland --data FOLDER --out FOLDER`.

A prior (unCLIP, arXiv 2204.06125) learns which image embeddings pictures of a caption have. --data is a folder with
pictures at any depth, each with its caption in a text file of its name. --base names the two towers, as in the other
trainings; the text tower must have its projection. Nothing is ever downloaded. --out receives checkpoint.pt, log.csv
and, at the end, prior.safetensors for the node Load Caption Prior. The same command resumes a run. To use several GPUs
or machines, or to force a CPU: `accelerate launch [--cpu] tools/run.py training.prior ...`.

The network predicts the embedding without noise, on a cosine schedule; a tenth of the captions is left out.
"""

from __future__ import annotations

import argparse

from ..options import add_base, add_run, export_file


def main(argv: list[str]) -> None:
    """Runs the training that the command line describes.

    Raises ValueError or FileNotFoundError; the message names the option at fault.
    """
    options = _parser().parse_args(argv)
    file = export_file(options, "prior.safetensors")
    from .script import train

    train(options, file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.prior", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_base(parser, "pictures with captions")
    add = parser.add_argument
    add("--inner", type=int, default=2048, help="width of the transformer (default: %(default)s)")
    add("--heads", type=int, default=32, help="of the transformer (default: %(default)s)")
    add("--layers", type=int, default=20, help="of the transformer (default: %(default)s)")
    add("--learning-rate", type=float, default=1e-4, help="constant after --warmup (default: %(default)s)")
    add("--average", type=float, default=0.9999, help="of the weights, per step; 0 for none (default: %(default)s)")
    add_run(parser, "prior.safetensors", 100_000, 64)
    return parser
