"""Every shipped workflow is valid on the real server, and those that can run here are run."""

import json
import re
from pathlib import Path

import pytest
from environment import ROOT, absent_weights
from PIL import Image
from workflow_format import MODEL_FILE, api_problems, to_api, ui_problems

FOLDER = ROOT / "workflows"
UI_FILES = sorted(FOLDER.glob("*.json"))
API_FILES = sorted((FOLDER / "api").glob("*.json"))


def each(files: list[Path], folder: str):
    """One test per file; while there are none, one skipped test that says so."""
    cases = [pytest.param(file, id=file.stem) for file in files]
    nothing = pytest.param(None, id="none", marks=pytest.mark.skip(reason=f"{folder} has no workflow yet"))
    return pytest.mark.parametrize("file", cases or [nothing])


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


@each(UI_FILES, "workflows/")
def test_ui_workflow_is_valid(file, object_info):
    assert ui_problems(read(file), object_info) == []


@each(UI_FILES, "workflows/")
def test_ui_workflow_has_a_card(file):
    # The frontend shows a placeholder for a missing picture, without a word.
    with Image.open(file.with_suffix(".jpg")) as card:
        assert card.format == "JPEG" and card.width == card.height


@each(UI_FILES, "workflows/")
def test_name_can_stand_in_a_link(file):
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", file.stem)


@each(UI_FILES, "workflows/")
def test_api_twin_says_the_same(file, object_info):
    assert to_api(read(file), object_info) == read(FOLDER / "api" / file.name)


@each(API_FILES, "workflows/api/")
def test_api_workflow_is_valid(file, object_info):
    assert (FOLDER / file.name).is_file(), "no UI workflow of the same name"
    assert api_problems(read(file), object_info) == []


@each(API_FILES, "workflows/api/")
def test_api_workflow_runs(file, server, object_info):
    api = read(file)
    if "shapeland" in file.stem.lower() and absent_weights():
        pytest.skip(f"Shapeland's weights are incomplete: no {absent_weights()}")
    absent = absent_models(api, object_info)
    if absent:
        pytest.skip(f"the server has no {', '.join(absent)}")
    run = server.run(api)
    assert run.named("progress_text") == [], "a template gives no warning"
    assert run.pictures
    for picture in run.pictures:
        assert picture.data, picture.name


def test_training_in_the_graph_shows_its_progress(server):
    """The template's training, shortened: every step is told, and a file more can be loaded."""

    def files() -> set[str]:
        return set(re.findall(r"my star[^\"]*", json.dumps(server.get("/object_info/ConceptLoomLoadConcept"))))

    before = files()
    api = read(FOLDER / "api" / "train_concept_shapeland.json")
    number, node = next((n, node) for n, node in api.items() if node["class_type"] == "ConceptLoomTrainConcept")
    node["inputs"] |= {"steps": 6, "class_pictures": 2, "preview_every": 2, "seed": 5}
    run = server.run(api)
    told = [data for data in run.named("progress") if data["node"] == number]
    # The model's own drawing of the class and of previews counts in the same node, with bars of its own lengths.
    assert [data["value"] for data in told if data["max"] == 6] == [1, 2, 3, 4, 5, 6]
    assert run.pictures
    assert len(files()) == len(before) + 1


def absent_models(api: dict, info: dict) -> list[str]:
    """Model files a workflow names that the server does not offer."""
    absent = set()
    for node in api.values():
        kinds = info[node["class_type"]]["input"]
        for name, value in node["inputs"].items():
            if isinstance(value, str) and MODEL_FILE.search(value):
                declared = {**kinds.get("required", {}), **kinds.get("optional", {})}.get(name)
                if declared is None or value not in json.dumps(declared):
                    absent.add(value)
    return sorted(absent)


def test_absent_models_are_named(object_info):
    api = {"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}}}
    assert absent_models(api, object_info) == ["sd15.safetensors"]


def test_the_only_template_folder_is_workflows():
    # With two such folders the frontend lists both, and the second's templates cannot be opened.
    others = ("example_workflows", "example", "examples", "workflow")
    assert not [name for name in others if (ROOT / name).exists()]
