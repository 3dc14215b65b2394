"""The one tool of this repository: shows, tests, serves and measures ConceptLoom.

    python tools/dev.py demo [NAME...]             draw every Shapeland workflow, save the pictures in output/
    python tools/dev.py test [pytest arguments]    the whole test suite
    python tools/dev.py serve [--port PORT]        the host with the pack loaded, for a browser
    python tools/dev.py eval [...]                 the Shapeland report (see its --help)
    python tools/dev.py bench [...]                what every system costs (see its --help)

The first call makes the environment and fetches the host (environment.py); later calls reuse them.
Standard library only, because it runs before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

from environment import ROOT, WORK, Problem, absent_weights, prepare, say
from hostserver import HostServer, PromptError, check_port

SYSTEMS = ("freecustom", "fastcomposer", "concept_weaver", "profusion", "composer")
SERVER_MODULES = ["torch", "torchvision", "aiohttp", "einops", "safetensors"]
MODULE_OF = {"eval": "report", "bench": "bench"}


def holds(stem: str, name: str) -> bool:
    """Whether a file's name contains these words, whole and in order: "composer" is not in "FastComposer"."""
    words, sought = (re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") for text in (stem, name))
    return f"_{sought}_" in f"_{words}_"


def demo_workflows(names: list[str], folder: Path) -> list[Path]:
    """The Shapeland workflows in API format, or those of the named systems."""
    found = sorted(file for file in folder.glob("*.json") if holds(file.stem, "no_download"))
    return [file for file in found if not names or any(holds(file.stem, name) for name in names)]


def demo(names: list[str]) -> int:
    """Draws the workflows, saves their pictures, and prints path and seconds of each."""
    if absent_weights():
        raise Problem(f"Shapeland's weights are incomplete: shapeland/weights/ lacks {absent_weights()}.")
    workflows = demo_workflows(names, ROOT / "workflows" / "api")
    if not workflows:
        raise Problem(f"No Shapeland workflow in workflows/api/ is for: {' '.join(names) or 'any system'}.")
    python, host = prepare(SERVER_MODULES)
    output = ROOT / "output"
    output.mkdir(exist_ok=True)
    failures = 0
    base = WORK / "demo"
    base.mkdir(exist_ok=True, parents=True)
    say("Starting ComfyUI ...")
    with HostServer(python, host.path, base, log=base / "server.log") as server:
        for file in workflows:
            begin = time.monotonic()
            try:
                workflow = json.loads(file.read_text(encoding="utf-8"))
                pictures = server.pictures(server.finish(server.submit(workflow)))
            except PromptError as error:
                say(f"{file.stem}: FAILED: {error}")
                failures += 1
                continue
            seconds = time.monotonic() - begin
            for number, picture in enumerate((picture for picture in pictures if picture.saved), 1):
                place = output / f"{file.stem}_{number:02}{Path(picture.name).suffix}"
                place.write_bytes(picture.data)
                say(f"{place.relative_to(ROOT)}  {seconds:.1f} s")
    return 1 if failures else 0


def serve(port: int) -> int:
    """Runs the host until Ctrl-C."""
    check_port(port)  # before a set-up that may take minutes
    python, host = prepare(SERVER_MODULES)
    say("Starting ComfyUI ...")
    with HostServer(python, host.path, WORK / "serve", port=port) as server:
        say(f"\nConceptLoom is ready at {server.url}  (Templates > ConceptLoom; Ctrl-C ends it)\n")
        return server.process.wait()


def run_tests(arguments: list[str]) -> int:
    """Runs pytest, which lists skipped tests with their reason, and the slowest tests. The whole suite runs in two
    processes, because its models are so small that a second thread helps little."""
    python, host = prepare([*SERVER_MODULES, "pytest", "xdist"])
    environ = {**os.environ, "COMFYUI_PATH": str(host.path)}
    if not arguments:
        arguments = ["-n", "2", "--dist", "loadscope", "--no-loadscope-reorder"]
    return subprocess.run(
        [python, "-m", "pytest", "-rs", "--durations=30", *arguments], cwd=ROOT, env=environ
    ).returncode


def evaluate(command: str, arguments: list[str]) -> int:
    """Runs the report or the benchmark in evaluation/."""
    name = MODULE_OF[command]
    if not (ROOT / "evaluation" / f"{name}.py").is_file():
        raise Problem(f"evaluation/{name}.py is not in this checkout, so `{command}` has nothing to run.")
    python, host = prepare(SERVER_MODULES)
    environ = {**os.environ, "COMFYUI_PATH": str(host.path)}
    runner = [python, ROOT / "tools" / "run.py", f"evaluation.{name}"]
    return subprocess.run([*runner, *arguments], cwd=ROOT, env=environ).returncode


def cache_bytecode(environ: MutableMapping[str, str]) -> None:
    """Lets child processes cache compiled modules in .host/ if Python is told not to write bytecode next to its files.
    Without a cache, importing torch and ComfyUI takes ten seconds longer in every process."""
    if environ.get("PYTHONDONTWRITEBYTECODE") and not environ.get("PYTHONPYCACHEPREFIX"):
        environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(WORK / "pycache")}


def parser() -> argparse.ArgumentParser:
    """The parser of the command line; the arguments after test, eval and bench are passed on."""
    description, _, rest = __doc__.partition("\n")
    result = argparse.ArgumentParser(
        prog="dev.py", description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = result.add_subparsers(dest="command", required=True)
    names = commands.add_parser("demo", help="draw the Shapeland workflows").add_argument
    names("names", metavar="NAME", nargs="*", help=f"systems: {', '.join(SYSTEMS)}")
    port = commands.add_parser("serve", help="the host with the pack loaded").add_argument
    port("--port", type=int, default=8188, help="default: %(default)s")
    for name, about in (("test", "pytest"), ("eval", "the report"), ("bench", "the benchmark")):
        commands.add_parser(name, help=f"arguments go to {about}", add_help=False)
    return result


def main(argv: list[str]) -> int:
    """Runs one command and returns its exit code."""
    cache_bytecode(os.environ)
    options, rest = parser().parse_known_args(argv)
    if options.command in ("demo", "serve") and rest:
        parser().error(f"unknown arguments: {' '.join(rest)}")
    if options.command == "demo":
        for name in set(options.names) - set(SYSTEMS):
            parser().error(f"there is no system {name!r}: choose from {', '.join(SYSTEMS)}")
        return demo(options.names)
    if options.command == "serve":
        return serve(options.port)
    if options.command == "test":
        return run_tests(rest)
    return evaluate(options.command, rest)


if __name__ == "__main__":
    # SIGTERM ends the server too: the exception unwinds through its context manager.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(main(sys.argv[1:]))
    except Problem as problem:
        sys.exit(f"dev.py: {problem}")
    except KeyboardInterrupt:
        sys.exit(130)
