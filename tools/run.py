"""Runs a module of this pack outside the host: `python tools/run.py evaluation.report --help`.

The pack has no importable name of its own (the host loads it by path), and importing its root needs the host. So the
name `conceptloom` is bound here to a bare package that only knows the pack's directories; tests do the same.
"""

import importlib
import importlib.util
import os
import sys

from environment import ROOT

PACK = "conceptloom"


def alias_pack() -> None:
    """Makes imports such as `import conceptloom.attention.mrsa` work without the host."""
    spec = importlib.util.spec_from_loader(PACK, loader=None, is_package=True)
    spec.submodule_search_locations = [str(ROOT)]
    sys.modules[PACK] = importlib.util.module_from_spec(spec)


def open_host(path: str, cpu: bool) -> None:
    """Makes the host importable (`comfy`, `nodes`, `folder_paths`), on the CPU if `cpu`."""
    # First on the path, because our own nodes/ must not hide the host's nodes.py.
    sys.path.insert(0, path)
    from comfy.cli_args import args

    args.cpu = args.cpu or cpu


def main(argv: list[str]) -> int:
    """Runs `main(argv)` of the named module; COMFYUI_PATH makes the host importable to it."""
    name, *arguments = argv
    alias_pack()
    if "COMFYUI_PATH" in os.environ:
        import torch

        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        open_host(os.environ["COMFYUI_PATH"], cpu=not accelerated)
    return importlib.import_module(f"{PACK}.{name}").main(arguments) or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
