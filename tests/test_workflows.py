"""Every shipped workflow is valid on the real server, and those that can run here are run."""

import copy
import io
import json
import re
import urllib.error
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import INFORMATION
from environment import ROOT, absent_weights
from hostserver import PACK, PromptError
from PIL import Image
from schema import all_fields
from templates import BLUEPRINTS, FOR_SCRIPTS, WORKFLOWS
from workflow_builder import Workflow
from workflow_checks import MODEL_FILE, api_problems, layout_problems, link_problems, ui_problems
from workflow_format import BYPASSED, MUTED, subgraphs_of, to_api

FOLDER = ROOT / "workflows"
UI_FILES = sorted(FOLDER.glob("*.json"))
API_FILES = sorted((FOLDER / "api").glob("*.json"))
NO_DOWNLOAD = "_no_download"
"""Ends the names of templates on Shapeland, whose weights come with the pack."""


SHORT = {
    "ConceptLoomTrainConcept": {"steps": 4, "class_pictures": 0, "preview_every": 3},
    "ConceptLoomFineTunePromptNet": {"steps": 2, "preview_every": 0},
    "ConceptLoomDDIMInversion": {"steps": 8},
    "KSampler": {"steps": 8},
    "BasicScheduler": {"steps": 8},
}
"""Inputs by node type with which templates run here; `dev.py demo` runs them as they are."""


def short_inputs(api: dict) -> dict[str, dict]:
    """SHORT for a workflow: a schedule that is split keeps its steps."""
    split = any(node["class_type"] == "SplitSigmas" for node in api.values())
    return {kind: inputs for kind, inputs in SHORT.items() if not (split and kind == "BasicScheduler")}


def shorter(api: dict) -> dict:
    """A workflow as it runs here."""
    short = short_inputs(api)
    return {
        number: {**node, "inputs": node["inputs"] | short.get(node["class_type"], {})} for number, node in api.items()
    }


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


@pytest.mark.parametrize("name", [*WORKFLOWS, *FOR_SCRIPTS, *BLUEPRINTS])
def test_file_is_what_its_description_makes(name, object_info):
    flow = Workflow(object_info, name)
    if name in BLUEPRINTS:
        made, file = BLUEPRINTS[name](flow), ROOT / "subgraphs" / f"{name}.json"
    else:
        {**WORKFLOWS, **FOR_SCRIPTS}[name](flow)
        made, file = flow.ui(), FOLDER / f"{name}.json"
        if name in FOR_SCRIPTS:
            made, file = to_api(made, object_info), FOLDER / "api" / "operations" / f"{name}.json"
    assert json.loads(json.dumps(made)) == read(file), "run tools/make_workflows.py --keep-cards"


def test_every_file_has_a_description():
    assert {file.stem for file in UI_FILES} == set(WORKFLOWS)
    assert {file.stem for file in (FOLDER / "api" / "operations").glob("*.json")} == set(FOR_SCRIPTS)
    assert {file.stem for file in (ROOT / "subgraphs").glob("*.json")} == set(BLUEPRINTS)


@pytest.mark.parametrize("file", (ROOT / "subgraphs").glob("*.json"), ids=lambda file: file.stem)
def test_blueprint_is_offered_and_valid(file, server, object_info):
    ui = read(file)
    (holder,), (definition,) = ui["nodes"], ui["definitions"]["subgraphs"]
    assert holder["type"] == definition["id"] and definition["name"] == file.stem
    assert link_problems(definition) == layout_problems(definition, object_info) == []
    assert {node["type"] for node in definition["nodes"]} <= set(object_info)
    offered = server.get("/global_subgraphs").values()
    assert file.stem in {one["name"] for one in offered if one["info"]["node_pack"].endswith(PACK)}


@each(API_FILES, "workflows/api/")
def test_api_workflow_is_valid(file, object_info):
    assert (FOLDER / file.name).is_file(), "no UI workflow of the same name"
    assert api_problems(read(file), object_info) == []


@each(API_FILES, "workflows/api/")
def test_api_workflow_runs(file, server, object_info):
    api = read(file)
    if file.stem.endswith(NO_DOWNLOAD) and absent_weights():
        pytest.skip(f"Shapeland's weights are incomplete: no {absent_weights()}")
    absent = absent_models(api, object_info)
    if absent:
        pytest.skip(f"the server has no {', '.join(absent)}")
    api = shorter(api)
    decoded = [number for number, node in api.items() if node["class_type"] == "VAEDecode"]
    run = server.run(with_previews(api, **{f"picture of {number}": [number, 0] for number in decoded}))
    told = [data["text"] for data in run.named("progress_text")]
    assert [text for text in told if INFORMATION not in text] == [], "a template gives no warning"
    assert run.pictures
    if file.stem.endswith(NO_DOWNLOAD):
        # Some picture shows what the prompt asks for, as the world's judge reads it: none is black or noise alone.
        seen = [picture.data for picture in run.pictures if picture.node.startswith("picture of")]
        assert nouns_of(api) & {noun for data in seen for noun in judged(data)}


def nouns_of(api: dict) -> set[str]:
    """The world's things in the prompts of a workflow."""
    from conceptloom.shapeland.world import NOUNS

    texts = (node["inputs"].get(name) for node in api.values() for name in ("text", "prompt", "caption"))
    return {word for text in texts if isinstance(text, str) for word in re.findall(r"[a-z]+", text)} & set(NOUNS)


@cache
def judge():
    from conceptloom.shapeland import models
    from conceptloom.shapeland.judge import Judge

    network = Judge().eval()
    network.load_state_dict(models.load("judge"))
    return network


def judged(data: bytes) -> list[str]:
    """The nouns of all things that the judge finds in a picture."""
    from conceptloom.shapeland.world import NOUNS

    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0)[None] / 255
    with torch.no_grad():
        return [NOUNS[reading.noun] for reading in judge().read(pixels)[0]]


@each([file for file in UI_FILES if file.stem.endswith(NO_DOWNLOAD)], "workflows/")
def test_with_any_node_bypassed_or_muted(file, server, object_info):
    """A picture, or sentences that say what is wrong and where, whichever of our nodes is switched off."""
    if absent_weights():
        pytest.skip(f"Shapeland's weights are incomplete: no {absent_weights()}")
    # Nodes that hand nothing on are the same bypassed and muted: what the host gets is tried once.
    tried = {json.dumps(api, sort_keys=True): (what, api) for what, api in switched_off(read(file), object_info)}
    faults = []
    for what, api in tried.values():
        refused, sentence, pictures = outcome(server, api)
        faults += [f"{what}: {fault}" for fault in unclear(refused, sentence, api, object_info)]
        if not (refused or sentence or pictures):
            faults.append(f"{what}: neither a picture nor a sentence")
    assert not faults, "\n".join(faults)


def every_node(ui: dict) -> list[dict]:
    """The nodes of a workflow and of its subgraphs."""
    return [node for part in (ui, *subgraphs_of(ui).values()) for node in part["nodes"]]


def switched_off(ui: dict, info: dict) -> Iterator[tuple[str, dict]]:
    """The workflow, shortened, with each of our nodes bypassed and muted in turn."""
    for place, node in enumerate(every_node(ui)):
        if node["type"].startswith("ConceptLoom"):
            for mode, name in ((BYPASSED, "bypassed"), (MUTED, "muted")):
                changed = copy.deepcopy(ui)
                every_node(changed)[place]["mode"] = mode
                yield f"{info[node['type']]['display_name']} ({node['id']}) {name}", shortened(to_api(changed, info))


def shortened(api: dict) -> dict:
    """The workflow with few steps where it samples, inverts or trains; a schedule that is split keeps all."""
    split = any(node["class_type"] == "SplitSigmas" for node in api.values())
    for node in api.values():
        inputs = node["inputs"]
        if isinstance(inputs.get("steps"), int) and not (split and node["class_type"] == "BasicScheduler"):
            inverts = node["class_type"] == "ConceptLoomDDIMInversion"
            inputs["steps"] = 2 if inverts or node["class_type"] == "BasicScheduler" else 1
        if node["class_type"] == "ConceptLoomTrainConcept":
            inputs |= {"class_pictures": 0, "preview_every": 0}
        if node["class_type"] == "ConceptLoomFineTunePromptNet":
            inputs |= {"batch_size": 1}
        if node["class_type"] == "ConceptLoomAugmentSubject":
            inputs |= {"count": 2}
    return api


def outcome(server, api: dict) -> tuple[dict, str, int]:
    """What a client is told: the errors of refused nodes by their ids, the error of a run that failed, and the number
    of pictures. The host runs what does not depend on a refused node."""
    try:
        answer = json.loads(server.request("/prompt", json.dumps({"prompt": api, "client_id": "off"}).encode()))
    except urllib.error.HTTPError as error:
        answer = json.loads(error.read())
    refused = answer["node_errors"] or {}
    if "prompt_id" not in answer:
        return refused, "", 0
    try:
        entry = server.finish(answer["prompt_id"])
    except PromptError as error:
        return refused, str(error), 0
    return refused, "", sum(len(output.get("images", ())) for output in entry["outputs"].values())


def unclear(refused: dict, sentence: str, api: dict, info: dict) -> Iterator[str]:
    """What a person would not understand of an outcome.

    The host may miss an input that the node shows, in its own words; a node of ours that fails has to say its own name,
    and no other may fail.
    """
    for number, errors in refused.items():
        shown = {field.name for field in all_fields(info[api[number]["class_type"]])}
        for error in errors["errors"]:
            named = error["extra_info"].get("input_name")
            if error["type"] != "required_input_missing" or named not in shown:
                yield f"{errors['class_type']}: {error['message']}: {error['details']}"
    if sentence:
        kind, _, told = sentence.partition(": ")
        if not kind.startswith("ConceptLoom") or not told.startswith(f"{info[kind]['display_name']}: "):
            yield sentence


def off(file: str, info: dict, *types: str) -> dict:
    """A template, shortened, with a node of each of these types bypassed."""
    ui = read(FOLDER / f"{file}.json")
    for kind in types:
        found = (node for node in every_node(ui) if node["type"] == f"ConceptLoom{kind}" and not node["mode"])
        next(found)["mode"] = BYPASSED
    return shortened(to_api(ui, info))


def with_previews(api: dict, **links: list) -> dict:
    """The workflow with more previews, by the ids that they get."""
    return api | {
        name: {"class_type": "PreviewImage", "inputs": {"images": link}, "_meta": {"title": name}}
        for name, link in links.items()
    }


def pixels(run, node: str) -> bytes:
    """The picture that a node shows, without what its file says of the workflow."""
    (data,) = (picture.data for picture in run.pictures if picture.node == node)
    with Image.open(io.BytesIO(data)) as image:
        return image.tobytes()


@pytest.mark.parametrize("kind", ["MultiReferenceSelfAttention", "RecordAttentionShare"])
def test_attention_share_without_its_system_shows_the_picture_and_says_so(server, object_info, kind):
    api = off("08_Two_systems_together_FastComposer_FreeCustom_no_download", object_info, kind)
    number, viewer = next((n, node) for n, node in api.items() if node["class_type"] == "ConceptLoomAttentionShare")
    viewer["inputs"]["opacity"] = 0.5  # what was told before is not told again while the host remembers the node
    run = server.run(with_previews(api, heat=[number, 0], picture=viewer["inputs"]["image"]))
    assert pixels(run, "heat") == pixels(run, "picture")
    told = [told["text"] for told in run.named("progress_text") if told["node"] == number]
    assert told[-1].startswith("Nothing recorded")


def test_a_bypassed_system_leaves_the_plain_picture(server, object_info):
    api = off("01_Two_subjects_FreeCustom_no_download", object_info, "MultiReferenceSelfAttention")
    one, other = ([number, 0] for number, node in api.items() if node["class_type"] == "VAEDecode")
    run = server.run(with_previews(api, one=one, other=other))
    assert pixels(run, "one") == pixels(run, "other")
    run = server.run(with_previews(off("01_Two_subjects_FreeCustom_no_download", object_info), one=one, other=other))
    assert pixels(run, "one") != pixels(run, "other")


@pytest.mark.parametrize(
    ("file", "kinds", "sentence"),
    [
        (
            "01_Two_subjects_FreeCustom_no_download",
            ["ReferenceSubject"],
            "Multi-Reference Self-Attention (FreeCustom): subjects: expected at least one, got none; connect Reference "
            "Subject",
        ),
        (
            "02_Two_subjects_FastComposer_no_download",
            ["ReferenceSubject"],
            "Subject Encoder (FastComposer): subjects: expected at least one, got none; connect Reference Subject",
        ),
        (
            "03_Three_concepts_in_place_Concept_Weaver_no_download",
            ["TextToMasks"],
            "Concept Masks: masks: expected at least one, got none; connect Text to Masks or a mask of each concept",
        ),
        (
            "10_No_template_picture_Concept_Weaver_no_download",
            ["LoadConcept", "LoadConcept"],
            "Concept Bank: concepts: expected at least one, got none; connect Load Concept",
        ),
    ],
)
def test_nothing_on_a_growing_input_is_said(server, object_info, file, kinds, sentence):
    refused, told, _ = outcome(server, off(file, object_info, *kinds))
    assert not refused
    assert told.partition(": ")[2] == sentence


def test_training_in_the_graph_shows_its_progress(server):
    """The template's training, shortened: every step is told, and a file more can be loaded."""

    def files() -> set[str]:
        return set(re.findall(r"my star[^\"]*", json.dumps(server.get("/object_info/ConceptLoomLoadConcept"))))

    before = files()
    api = read(FOLDER / "api" / "06_Train_a_concept_no_download.json")
    number, node = next((n, node) for n, node in api.items() if node["class_type"] == "ConceptLoomTrainConcept")
    node["inputs"] |= {**SHORT[node["class_type"]], "class_pictures": 0, "seed": 5}
    for sampler in (one for one in api.values() if one["class_type"] == "KSampler"):
        sampler["inputs"]["steps"] = 1
    run = server.run(api)
    told = [data for data in run.named("progress") if data["node"] == number]
    # The model's own drawing of previews counts in the same node, with bars of its own lengths.
    assert [data["value"] for data in told if data["max"] == 4] == [1, 2, 3, 4]
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
