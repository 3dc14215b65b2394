"""Templates in a real browser: found, opened, run, and the picture seen, in both renderers."""

import json
from contextlib import ExitStack

import pytest
from browser import RENDERERS, Frontend, chromium, open_browser
from environment import ROOT, absent_weights
from hostserver import PACK
from PIL import Image
from test_workflow_tools import weave
from test_workflows import NO_DOWNLOAD, short_inputs
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
def frontends(browser, server):
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


class TestToyTemplate:
    """The same on the toy pack: what our tools build loads, runs and converts, and trouble is seen."""

    @pytest.fixture
    def visit(self, browser, server):
        """Opens and runs a template of the toy pack in a page of its own, for a page lists the templates it found."""

        def run(template: str, renderer: str):
            with Frontend(browser, server, renderer) as opened:
                return opened.visit("toy", template)

        return run

    def publish(self, folder, name: str, ui: dict, card: bool = True) -> None:
        (folder / "workflows" / f"{name}.json").write_text(json.dumps(ui), encoding="utf-8")
        if card:
            Image.new("RGB", (64, 64), "teal").save(folder / "workflows" / f"{name}.jpg")

    @pytest.mark.parametrize("renderer", RENDERERS)
    def test_good_template(self, visit, toy_folder, object_info, renderer):
        ui = weave(object_info).ui()
        self.publish(toy_folder, "good", ui)
        seen = visit("good", renderer)
        assert seen.problems == []
        assert seen.pictures == 3
        assert seen.api == to_api(ui, object_info), "the frontend converts it differently"

    def test_bypassed_nodes(self, visit, toy_folder, object_info):
        ui = weave(object_info).ui()
        nodes = {node["type"]: node for node in ui["nodes"]}  # of several the last: the second yarn
        nodes["ToyYarn"]["mode"] = BYPASSED
        (square,) = ui["definitions"]["subgraphs"]
        {node["type"]: node for node in square["nodes"]}["InvertMask"]["mode"] = BYPASSED
        self.publish(toy_folder, "off", ui)
        seen = visit("off", "nodes2")
        assert seen.problems == []
        assert seen.api == to_api(ui, object_info), "the frontend converts it differently"

    def test_trouble_is_seen(self, visit, toy_folder, object_info):
        ui = weave(object_info).ui()
        del ui["nodes"][4]["widgets_values"]
        ui["nodes"][4]["type"] = "ToyGone"
        self.publish(toy_folder, "broken", ui, card=False)
        problems = " | ".join(visit("broken", "classic").problems)
        assert "placeholder" in problems
        assert "shown: " in problems and "ToyGone" in problems
