"""`python tools/dev.py eval`: what the systems achieve on Shapeland, compared with plain prompting and ablations."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
import time
from pathlib import Path

import torch

from . import reports
from .quiet import without_warnings
from .tables import report_table, write_json, write_section

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "report.md"
PREFACE = """\
# The Shapeland report

Made by the commands below; do not edit. The judge that reads the pictures was trained on the world's ground truth alone
and is itself measured first."""
JUDGE = "The judge itself"
ABOUT_JUDGE = """\
Things of held-out pictures that have a reading on them (found), and what is right of those found; prompt is the share
of pictures with exactly the right nouns."""


def systems() -> list[str]:
    """Names of the systems that have a report."""
    return [module.name for module in pkgutil.iter_modules(reports.__path__)]


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    result = argparse.ArgumentParser(prog="dev.py eval", description=__doc__)
    add = result.add_argument
    add("systems", metavar="SYSTEM", nargs="*", help=f"of {', '.join(systems())}; all if none is named")
    add("--json", metavar="FILE", type=Path, help="write the rows to this file")
    add("--pictures", type=int, default=64, help="per variant and number of subjects (default: %(default)s)")
    add("--keep", metavar="FOLDER", type=Path, help="keep drawn pictures there, and go on from those that are there")
    add("--docs", action="store_true", help="write docs/report.md")
    return result


def save_pictures(name: str, result: reports.Report, docs: bool) -> str:
    """Saves a report's pictures in output/, or next to the document if `docs`, and returns the lines that show them."""
    folder = DOCUMENT.parent / "images" if docs else ROOT / "output"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ""
    for part, picture in {"sheet": result.sheet, **result.plots}.items():
        file = folder / f"eval_{name}_{part}.jpg"
        picture.save(file, quality=88)
        print(file.relative_to(ROOT), flush=True)
        lines += f"\n\n![{name}: {part}](images/{file.name})"
    return lines


def main(argv: list[str]) -> int:
    """Measures the named systems and returns the exit code."""
    options = parser().parse_args(argv)
    names = options.systems or systems()
    for name in names:
        if name not in systems():
            parser().error(f"there is no report of {name!r} yet: choose from {', '.join(systems())}")
    if options.pictures < 1:
        parser().error(f"--pictures: expected at least 1, got {options.pictures}")
    # Only now, because the modules below need ComfyUI, and --help does not.
    from .judging import PICTURES, measure_judge
    from .kept import Kept
    from .studio import CFG, SAMPLER, SCHEDULER, STEPS, Studio

    begin = time.monotonic()

    def tell(sentence: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {sentence}", file=sys.stderr, flush=True)

    with torch.inference_mode(), without_warnings():
        try:
            studio = Studio.open(Kept(options.keep))
        except (FileNotFoundError, ValueError) as error:
            print(f"dev.py eval: {error}", file=sys.stderr)
            return 1
        # Convolutions of a model this small run a quarter faster in this layout on a CPU, and the report is long.
        studio.model.model.diffusion_model.to(memory_format=torch.channels_last)
        trust = measure_judge(studio)
        rows = list(trust.rows)
        failed = False
        sections = {JUDGE: f"{ABOUT_JUDGE}\n\n{report_table(trust.rows)}"}
        print(f"{JUDGE}, on {PICTURES} held-out pictures\n{report_table(trust.rows)}", flush=True)
        for name in names:
            module = importlib.import_module(f".reports.{name}", __package__)
            try:
                result = module.report(studio, options.pictures, trust.chance, tell)
            except FileNotFoundError as error:
                print(f"dev.py eval: {error}", file=sys.stderr)
                failed = True
                continue
            rows += result.rows
            table = report_table(result.rows)
            links = save_pictures(name, result, options.docs)
            command = f"python tools/dev.py eval {name} --pictures {options.pictures} --docs"
            sampling = result.sampling or f"{SAMPLER}, {SCHEDULER}, {STEPS} steps, cfg {CFG:g}"
            how = f"`{command}`: {sampling}."
            sections[name] = f"{how}\n\n{result.about}\n\n{table}{links}"
            print(f"\n{name}\n{table}", flush=True)
    if options.json:
        write_json(options.json, [row.as_json() for row in rows])
    if options.docs:
        for title, body in sections.items():
            write_section(DOCUMENT, PREFACE, title, body)
    return int(failed)
