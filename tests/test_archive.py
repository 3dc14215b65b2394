"""The archive that the registry hands out, and what a user has to install beside it.

`comfy node pack` zips what git tracks, without what .comfyignore (in gitignore's syntax) names.
"""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import PurePosixPath

import pytest
from environment import ROOT, SHAPELAND_PARTS
from workflow_checks import MODEL_FILE

tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")

LIMIT = 48 * 2**20
WEIGHTS = "shapeland/weights"
# Where the pack's own weights lie that a node's file input offers.
FOLDERS = {
    "ConceptLoomLoadConcept": "concepts",
    "ConceptLoomLoadFastComposer": "fastcomposer",
    "ConceptLoomLoadComposerAdapter": "composer_adapters",
    "ConceptLoomLoadPromptNet": "promptnet",
    "ConceptLoomLoadCaptionPrior": "caption_priors",
}
# Modules that come with the host, or are this repository's own.
NOT_INSTALLED = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "folder_paths",
    "latent_preview",
    "nodes",
    "server",
    "conceptloom",
}
NAMES = {"PIL": "pillow"}


def git_files(*options: str) -> set[str]:
    """Tracked files that `git ls-files` lists under these options."""
    try:
        answer = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if answer.returncode:
        pytest.skip(f"this is no checkout: {answer.stderr.strip()}")
    return set(filter(None, answer.stdout.split("\0")))


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    return git_files()


@pytest.fixture(scope="module")
def archive(tracked) -> set[str]:
    """The paths of the files in the archive."""
    return tracked - git_files("--cached", "--ignored", "--exclude-from=.comfyignore")


@cache
def imports(path: str) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Level (dots) and names of every module that a file imports, also inside functions; of `from a import b` both a
    and a.b, since b may be a module.

    What only `main` imports is left out: that is a command line's, which no node comes to.
    """

    def walk(node: ast.AST) -> Iterator[tuple[int, tuple[str, ...]]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef) and child.name == "main":
                continue
            if isinstance(child, ast.Import):
                yield from ((0, tuple(name.name.split("."))) for name in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = tuple((child.module or "").split(".")) if child.module else ()
                yield child.level, base
                yield from ((child.level, (*base, name.name)) for name in child.names)
            yield from walk(child)

    return tuple(walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))))


def needed(entry: str, tracked: set[str]) -> set[str]:
    """The tracked Python files that are imported from a file on, packages' own files included."""
    found, left = set(), [entry]
    while left:
        path = left.pop()
        if path in found or path not in tracked:
            continue
        found.add(path)
        here = PurePosixPath(path).parent
        left += [str(folder / "__init__.py") for folder in [here, *here.parents]]
        for level, names in imports(path):
            if level:
                module = (here if level == 1 else here.parents[level - 2]).joinpath(*names)
                left += [f"{module}.py", str(module / "__init__.py")]
    return found


def installed(paths: set[str]) -> set[str]:
    """Names of the packages that files import, neither standard nor the host's."""
    names = {names[0] for path in paths for level, names in imports(path) if not level}
    return {NAMES.get(name, name) for name in names - set(sys.stdlib_module_names) - NOT_INSTALLED}


def test_everything_that_the_nodes_import_is_in_it(tracked, archive):
    files = needed("__init__.py", tracked)
    assert {"nodes/training.py", "training/concepts/learner.py", "host/shapeland.py", "shapeland/world.py"} <= files
    assert files - archive == set()


def test_the_weights_that_nodes_and_templates_use_are_in_it(archive):
    wanted = {f"{WEIGHTS}/{part}.safetensors" for part in SHAPELAND_PARTS}
    api = ROOT / "workflows" / "api"
    for file in (*api.glob("*no_download.json"), *api.glob("operations/*.json")):
        for node in json.loads(file.read_text(encoding="utf-8")).values():
            named = [value for value in node["inputs"].values() if isinstance(value, str) and MODEL_FILE.search(value)]
            wanted |= {f"{WEIGHTS}/{FOLDERS[node['class_type']]}/{name}" for name in named}
    assert (
        f"{WEIGHTS}/concepts/star.safetensors" in wanted and f"{WEIGHTS}/fastcomposer/shapeland.safetensors" in wanted
    )
    assert wanted - archive == set()


def test_what_a_person_sees_is_in_it(tracked, archive):
    shown = {path for path in tracked if path.startswith(("workflows/", "locales/", "nodes/web/"))}
    assert shown and shown <= archive
    assert {"__init__.py", "pyproject.toml", "README.md", "LICENSE"} <= archive


def test_what_developers_need_is_not_in_it(archive):
    outside = ("tests/", "tools/", "evaluation/", ".ci/", "docs/images/", "training/shapeland/", "training/data/")
    assert [path for path in archive if path.startswith(outside)] == []


def test_it_is_small_enough_to_install(archive):
    assert sum((ROOT / path).stat().st_size for path in archive) < LIMIT


@pytest.fixture(scope="module")
def declared() -> dict[str, set[str]]:
    """Packages that pyproject.toml declares: "" for everybody, the rest by extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        name: {re.split(r"[<>=!~;\[ ]", one)[0].replace("-", "_") for one in group} for name, group in groups.items()
    }


def test_what_users_must_install_is_what_the_nodes_import(tracked, declared):
    found = installed(needed("__init__.py", tracked))
    # The host has transformers, scipy and kornia; only our training brings diffusers to shapeland/models.py;
    # segment-anything is asked for by name where a checkpoint needs it.
    assert found - {"transformers", "scipy", "kornia", "diffusers"} - declared["segment-anything"] == declared[""]


def test_what_the_trainings_import_is_what_their_extras_declare(tracked, declared):
    found = installed(
        {path for path in tracked if path.startswith(("training/", "shapeland/")) and path.endswith(".py")}
    )
    assert found - declared[""] == declared["training"] | declared["training-data"]


def test_every_extra_is_imported_somewhere(tracked, declared):
    pack = {path for path in tracked if path.endswith(".py") and not path.startswith(("tests/", "tools/"))}
    assert set().union(*declared.values()) <= installed(pack)


def test_imports_are_seen_at_every_depth_but_in_command_lines(tracked):
    assert (0, ("server",)) in imports("host/advice.py")  # inside a function
    files = needed("training/concepts/__init__.py", tracked)
    assert "training/concepts/augment.py" in files and "training/concepts/script.py" not in files
