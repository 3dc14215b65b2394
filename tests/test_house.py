"""Where things live: which folder may import what, that the code is as ruff writes it, and that its types fit."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

BELOW = {
    "subjects": {"subjects"},
    "attention": {"attention", "subjects"},
    "samplers": {"samplers"},
    "compositions": {"compositions", "subjects", "encoders"},
    "encoders": {"encoders", "subjects"},
    "shapeland": {"shapeland", "encoders"},
    "training": {"training", "attention", "subjects", "samplers", "encoders", "compositions", "shapeland"},
    "host": {"host", "training", "attention", "subjects", "samplers", "encoders", "compositions", "shapeland"},
    "nodes": {
        "nodes",
        "host",
        "training",
        "attention",
        "subjects",
        "samplers",
        "encoders",
        "compositions",
        "shapeland",
    },
    "evaluation": {
        "evaluation",
        "host",
        "training",
        "attention",
        "subjects",
        "samplers",
        "encoders",
        "compositions",
        "shapeland",
    },
}
"""What the files of a folder may import of ours."""

HOST = {"comfy", "comfy_execution", "comfy_extras", "server", "nodes", "latent_preview", "execution"}
FACE = {"comfy_api", "folder_paths"}
MAY_IMPORT = {"nodes": HOST | FACE, "host": HOST, "evaluation": HOST}
HEAVY = {"diffusers", "transformers", "accelerate", "peft"}
"""Not imported with the module: without them a user's pack must load."""

FILES = {
    path: ast.parse(path.read_text(encoding="utf-8"))
    for folder in BELOW
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imported(path: Path, tree: ast.AST) -> list[tuple[str, str, bool]]:
    """The packages of each import: ours by our folder, others by name; and whether it comes with the module."""
    late = {id(node) for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef) for node in ast.walk(outer)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [("", alias.name.split(".")[0], id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                found.append(("", node.module.split(".")[0], id(node) not in late))
                continue
            base = path.relative_to(ROOT).parts[: -node.level]
            inside = (*base, *(node.module or "").split("."))
            names = [inside[0]] if inside[0] else [alias.name for alias in node.names]
            found += [(name, "", id(node) not in late) for name in names]
    return found


@pytest.mark.parametrize("folder", BELOW)
def test_imports_point_downward(folder):
    for path, tree in FILES.items():
        if path.relative_to(ROOT).parts[0] != folder:
            continue
        for ours, foreign, with_the_module in imported(path, tree):
            where = f"{path.relative_to(ROOT)}: {ours or foreign}"
            assert not ours or ours in BELOW[folder], where
            assert foreign not in (HOST | FACE) - MAY_IMPORT.get(folder, set()), where
            if folder not in ("training", "evaluation"):
                assert foreign not in HEAVY or not with_the_module, where


def test_every_folder_says_what_lives_there():
    for folder in {path.parent for path in FILES}:
        assert ast.get_docstring(FILES[folder / "__init__.py"]), folder


def test_types(tmp_path):
    """Of the floor that knows torch alone, as the oldest Python that we promise sees them."""
    ty = shutil.which("ty", path=Path(sys.executable).parent)
    (tmp_path / "conceptloom").symlink_to(ROOT, target_is_directory=True)
    folders = [f"conceptloom/{folder}" for folder in ("attention", "subjects", "samplers", "encoders", "compositions")]
    options = ("--python", sys.prefix, "--python-version", "3.10", "--output-format", "concise")
    made = subprocess.run([ty, "check", *folders, *options], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff(command):
    made = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout
