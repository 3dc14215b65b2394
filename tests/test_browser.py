"""Templates in a real browser: found, opened, run, and the picture seen, in both renderers."""

import json
from contextlib import ExitStack

import pytest
from browser import Frontend, chromium, open_browser
from environment import ROOT, absent_weights
from hostserver import PACK
from PIL import Image
from test_workflow_tools import weave
from test_workflows import NO_DOWNLOAD, short_inputs, shorter
from workflow_format import BYPASSED, to_api

TEMPLATES = sorted(file.stem for file in (ROOT / "workflows").glob("*.json") if file.stem.endswith(NO_DOWNLOAD))
NO_TEMPLATE = pytest.param("none", "none", marks=pytest.mark.skip(reason="workflows/ has no Shapeland template yet"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if chromium() is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    pytest.importorskip("playwright", reason="the Python package playwright is not installed")
    with open_browser(tmp_path_factory.mktemp("profile")) as context:
        yield context


@pytest.fixture(scope="module")
def toy_templates(toy_folder, object_info) -> dict[str, dict]:
    """Templates of the toy pack by name. They are written before a page opens, for a page lists those that it found."""
    good, off, broken = (weave(object_info).ui() for _ in range(3))
    nodes = {node["type"]: node for node in off["nodes"]}  # of several the last: the second yarn
    nodes["ToyYarn"]["mode"] = BYPASSED
    (square,) = off["definitions"]["subgraphs"]
    {node["type"]: node for node in square["nodes"]}["InvertMask"]["mode"] = BYPASSED
    del broken["nodes"][4]["widgets_values"]
    broken["nodes"][4]["type"] = "ToyGone"
    found = {"good": good, "off": off, "broken": broken}
    for name, ui in found.items():
        (toy_folder / "workflows" / f"{name}.json").write_text(json.dumps(ui), encoding="utf-8")
        if name != "broken":
            Image.new("RGB", (64, 64), "teal").save(toy_folder / "workflows" / f"{name}.jpg")
    return found


@pytest.fixture(scope="module")
def frontends(browser, server, toy_templates):
    """Gives the page of a renderer, in which all templates are opened; the other page, which would draw beside it, is
    closed first. (A parametrized fixture would open a page for each test.)"""
    with ExitStack() as stack:
        opened = {}

        def page_of(renderer: str) -> Frontend:
            if renderer not in opened:
                opened.clear()
                stack.close()
                opened[renderer] = stack.enter_context(Frontend(browser, server, renderer))
            return opened[renderer]

        yield page_of


RICHEST = "03_Three_concepts_in_place_Concept_Weaver_no_download"
"""Opened in the classic renderer too: what loads, runs and converts the others there is the same code."""
RUN = (RICHEST, "06_Train_a_concept_no_download", "05_Three_pictures_in_one_Composer_no_download")
"""Run in the browser: with previews while training, and with lists of pictures. What the others run is the same prompt
that test_workflows.py posts."""
VISITS = [(template, "nodes2") for template in TEMPLATES] + [(RICHEST, "classic")] * (RICHEST in TEMPLATES)


@pytest.mark.parametrize("template", ["good", "off"])
def test_toy_template(frontends, toy_templates, object_info, template):
    """What our tools build loads, runs and converts as the frontend does it; of "off" two nodes are bypassed."""
    seen = frontends("nodes2").visit("toy", template)
    assert seen.problems == []
    assert template == "off" or seen.pictures == 3
    assert seen.api == to_api(toy_templates[template], object_info), "the frontend converts it differently"


@pytest.mark.parametrize(("template", "renderer"), VISITS or [NO_TEMPLATE])
def test_template(frontends, template, renderer):
    if absent_weights():
        pytest.skip(f"Shapeland's weights are incomplete: no {absent_weights()}")
    api = json.loads((ROOT / "workflows" / "api" / f"{template}.json").read_text(encoding="utf-8"))
    run = template in RUN
    seen = frontends(renderer).visit(PACK, template, short_inputs(api), run)
    assert seen.problems == []
    assert bool(seen.pictures) == run
    assert seen.api == api
    # The server has it from the first to run it, in the browser or not.
    assert not run or seen.ran == shorter(api)


def test_toy_template_in_the_classic_renderer(frontends, toy_templates, object_info):
    seen = frontends("classic").visit("toy", "good")
    assert seen.problems == [] and seen.pictures == 3
    assert seen.api == to_api(toy_templates["good"], object_info), "the frontend converts it differently"


def test_trouble_is_seen(frontends):
    problems = " | ".join(frontends("classic").visit("toy", "broken").problems)
    assert "placeholder" in problems
    assert "shown: " in problems and "ToyGone" in problems
