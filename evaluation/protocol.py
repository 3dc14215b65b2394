"""The identity and prompt scores of FastComposer's evaluation, for a folder of pictures.

    python tools/run.py evaluation.protocol RUNS.json --clip FOLDER [--faces WEIGHTS] [--json FILE]

RUNS.json lists what was drawn: [{"picture": "a.png", "prompt": "a man ...", "references": ["ann.jpg", ...]}, ...], with
paths relative to it. Faces are read by facenet-pytorch with your own weights; without --faces, only prompts are scored.

Xiao et al. (arXiv 2305.10431), section 5.1. A picture with several subjects scores what its worst one scores, so that a
model that draws one person twice gains nothing. On Shapeland the same score is the report's *worst* metric, with the
judge in place of the face recognizer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev

import torch
from PIL import Image, ImageOps

from ..encoders.files import check_folder, read_state
from .metrics import greedy_minimum
from .tables import markdown, write_json

FACE_SIDE = 160


@dataclass(frozen=True)
class Drawn:
    """One drawn picture, its prompt, and the references that it was drawn with."""

    picture: Path
    prompt: str
    references: tuple[Path, ...]


def read_runs(file: Path) -> list[Drawn]:
    """The entries of a RUNS.json.

    Raises:
        ValueError: it is not such a list, or a file it names is missing.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        runs = [
            Drawn(file.parent / e["picture"], str(e["prompt"]), tuple(file.parent / r for r in e["references"]))
            for e in entries
        ]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{file}: expected a list of {{"picture", "prompt", "references"}}, got {error!r} while reading it'
        ) from error
    absent = [path for run in runs for path in (run.picture, *run.references) if not path.is_file()]
    alone = next((run.picture.name for run in runs if not run.references), None)
    if alone is not None:
        raise ValueError(f"{file}: expected at least one reference for each picture, got none for {alone}")
    if absent or not runs:
        raise ValueError(f"{file}: expected pictures, got {f'none at {absent[0]}' if absent else 'an empty list'}")
    return runs


def _upright(file: Path) -> Image.Image:
    """A picture as ComfyUI loads it: turned as its camera was."""
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


def score(
    runs: Sequence[Drawn],
    faces: Callable[[Image.Image], torch.Tensor] | None,
    prompts: Callable[[Image.Image, str], float],
) -> list[dict]:
    """Rows {metric, subjects, mean, std, n} over all pictures of one and of several subjects.

    Args:
        runs: what was drawn.
        faces: picture -> unit embeddings (n, d) of its faces, the largest first; None leaves identity out.
        prompts: (picture, text) -> their similarity.

    Raises:
        ValueError: a reference shows no face.
    """
    known: dict[Path, torch.Tensor] = {}
    values: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        group = "single" if len(run.references) == 1 else "multi"
        picture = _upright(run.picture)
        values.setdefault(("prompt", group), []).append(prompts(picture, run.prompt))
        if faces is None:
            continue
        for path in run.references:
            if path not in known:
                found = faces(_upright(path))
                if not len(found):
                    raise ValueError(f"references: expected a picture that shows a face, got {path.name}")
                known[path] = found[0]
        references = torch.stack([known[path] for path in run.references])
        found = faces(picture)[: len(run.references)]
        values.setdefault(("identity", group), []).append(greedy_minimum(found @ references.mT))
    return [
        {"metric": metric, "subjects": group, "mean": mean(column), "std": pstdev(column), "n": len(column)}
        for (metric, group), column in values.items()
    ]


def face_reader(weights: Path) -> Callable[[Image.Image], torch.Tensor]:
    """Detector and recognizer of facenet-pytorch with the settings of the published evaluation.

    Args:
        weights: state dict of InceptionResnetV1 as trained on VGGFace2.

    Raises:
        ModuleNotFoundError: facenet-pytorch is not installed; the message says how to install it.
    """
    try:
        from facenet_pytorch import MTCNN, InceptionResnetV1
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Identity scores need facenet-pytorch: python -m pip install facenet-pytorch"
        ) from error
    state = read_state(weights, "--faces")
    recognizer = InceptionResnetV1(pretrained=None, classify=False)
    # The classifier of its training identities is not needed here.
    recognizer.load_state_dict({k: v for k, v in state.items() if not k.startswith("logits.")})
    recognizer.eval()
    detector = MTCNN(image_size=FACE_SIDE, margin=0, min_face_size=20, keep_all=True)

    @torch.inference_mode()
    def read(picture: Image.Image) -> torch.Tensor:
        crops = detector(picture)
        return torch.zeros(0, 512) if crops is None else recognizer(crops)

    return read


def prompt_reader(folder: Path) -> Callable[[Image.Image, str], float]:
    """Cosine similarity of a CLIP model's picture and text embeddings, with the model from a local folder; the paper
    uses ViT-L/14."""
    from transformers import CLIPModel, CLIPProcessor

    check_folder(folder, "--clip")
    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    @torch.inference_mode()
    def read(picture: Image.Image, prompt: str) -> float:
        inputs = processor(text=[prompt], images=picture, return_tensors="pt", padding=True, truncation=True)
        out = model(**inputs)
        return float(torch.cosine_similarity(out.image_embeds, out.text_embeds))

    return read


def main(argv: list[str]) -> int:
    """Scores the pictures and returns the exit code."""
    parser = argparse.ArgumentParser(prog="evaluation.protocol", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("runs", metavar="RUNS.json", type=Path)
    add("--clip", metavar="FOLDER", type=Path, required=True, help="a CLIP model as transformers saves it")
    add("--faces", metavar="WEIGHTS", type=Path, help="InceptionResnetV1's weights of VGGFace2")
    add("--json", metavar="FILE", type=Path, help="write the rows to this file")
    options = parser.parse_args(argv)
    try:
        runs = read_runs(options.runs)
        faces = None if options.faces is None else face_reader(options.faces)
        rows = score(runs, faces, prompt_reader(options.clip))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        parser.error(str(error))
    lines = [[r["subjects"], r["metric"], f"{r['mean']:.4f}", f"{r['std']:.4f}", str(r["n"])] for r in rows]
    print(markdown(["subjects", "metric", "mean", "std", "pictures"], lines))
    if options.json:
        write_json(options.json, rows)
    return 0
