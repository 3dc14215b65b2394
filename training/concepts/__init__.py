"""Train a concept: `python tools/run.py training.concepts --base NAME --images FOLDER --class-word WORD --out FOLDER`.

Custom Diffusion (Kumari et al., arXiv 2212.04488) as Concept Weaver uses it: trains the matrices that compute keys and
values from the text, and a new word. This is the recipe of the node Train Concept on diffusers' models, for machines
without ComfyUI.

--base is `shapeland`, or a folder with Stable Diffusion (1.x, 2.x, SDXL) in diffusers' format; nothing is ever
downloaded. --images holds the pictures; a text file next to a picture, with the same name, is its caption, and
--caption is that of all others, with {} in place of the concept. --masks holds a mask under each picture's name, white
where the loss counts. The model draws --class-pictures pictures of the class itself; their caption is --caption with
the class word. --out receives checkpoint.pt, log.csv and, at the end, concept.safetensors, which the node Load Concept
reads and Save Concept turns into a LoRA. The same command resumes a run. To use several GPUs or machines, or to force a
CPU: `accelerate launch [--cpu] tools/run.py training.concepts ...`; each process takes its own --batch-size pictures.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path


def main(argv: list[str]) -> None:
    """Runs the training that the command line describes.

    Raises ValueError or FileNotFoundError; the message names the option at fault.
    """
    from .learner import Recipe

    options = _parser().parse_args(argv)
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    from .script import train

    train(options, recipe)


def _parser() -> argparse.ArgumentParser:
    from .augment import AUGMENTATIONS
    from .learner import Recipe

    parser = argparse.ArgumentParser(
        prog="training.concepts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Recipe()
    add("--base", required=True, metavar="shapeland|FOLDER", help="the model to learn for")
    add("--images", type=Path, required=True, metavar="FOLDER", help="pictures of the concept")
    add("--masks", type=Path, metavar="FOLDER", help="a mask for each picture, under its name")
    add("--caption", default="photo of a {}", help="of pictures without their own (default: %(default)s)")
    add("--class-word", required=True, help="what kind of thing the concept is, such as dog")
    add("--placeholder", default="<new1>", help="its new word (default: %(default)s)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="the run's own folder")
    add("--steps", type=int, default=default.steps, help="to train (default: %(default)s)")
    share = "as a share of a weight's typical size (default: %(default)s)"
    add("--learning-rate", type=float, default=default.learning_rate, help=share)
    pictures = "pictures of a process in a step (default: %(default)s)"
    add("--batch-size", type=int, default=default.batch_size, help=pictures)
    add("--rank", type=int, default=default.rank, help="of factors; 0 trains whole matrices (default: %(default)s)")
    add("--no-new-word", dest="new_word", action="store_false", help="the class word alone stands for the concept")
    add("--class-pictures", type=int, default=16, help="that the model draws of the class (default: %(default)s)")
    add("--prior-weight", type=float, default=default.prior_weight, help="of their loss (default: %(default)s)")
    add("--augmentation", choices=AUGMENTATIONS, default=default.augmentation, help="(default: %(default)s)")
    add("--resolution", type=int, help="of training pictures, in pixels (default: the base's own)")
    add("--precision", choices=("no", "bf16"), help="mixed precision (default: the launcher's, or no)")
    add("--checkpointing", action="store_true", help="compute the UNet twice to save most of its memory")
    add("--seed", type=int, default=default.seed, help="of all that is drawn (default: %(default)s)")
    add("--log-every", type=int, default=50, help="steps (default: %(default)s)")
    add("--save-minutes", type=float, default=3.0, help="between checkpoints (default: %(default)s)")
    return parser
