"""The builder and the checker of workflows, on the toy pack and nodes of the host."""

import copy
import json

import pytest
from workflow_builder import Subgraph, Workflow
from workflow_checks import api_problems, layout_problems, ui_problems
from workflow_format import BYPASSED, MUTED, TITLE_HEIGHT, to_api, types_fit


def weave(info: dict) -> Workflow:
    """A workflow with every kind of input."""
    flow = Workflow(info, "weave")
    first = flow.add("ToyYarn", {"shade": 3, "color": "#ff0000"}, title="First yarn")
    second = flow.add("ToyYarn", {"seed": 7})
    flow.note("## Two yarns\nPress **Run**.")
    inner = Subgraph(info, "Square")
    solid = inner.add("SolidMask", {"value": 0.5, "width": inner.input("side", 8), "height": inner.input("side")})
    inverted = inner.add("InvertMask", {"mask": solid[0]}, column=1)
    image = inner.add("MaskToImage", {"mask": solid[0]}, column=1)
    inner.output("mask", inverted[0])
    inner.output("image", image[0])
    region = flow.place(inner, {"side": 16}, column=1)
    weaving = flow.add(
        "ToyWeave",
        {
            "yarns": [first["yarn"], second[0]],
            "binding": "twill",
            "binding.region": region[0],
            "binding.shift": 2,
            "label": "x",
        },
        column=2,
    )
    flow.add("PreviewImage", {"images": weaving["image"]}, column=3)
    # Over the column between, so above its nodes.
    flow.add("PreviewImage", {"images": region["image"]}, column=3)
    flow.group("Yarns", 0)
    flow.group("Weaving", 1, 2)
    flow.group("Cloth", 3)
    return flow


@pytest.fixture
def ui(object_info) -> dict:
    return weave(object_info).ui()


API = {
    "1": {
        "inputs": {"shade": 3, "seed": 0, "color": "#ff0000"},
        "class_type": "ToyYarn",
        "_meta": {"title": "First yarn"},
    },
    "2": {
        "inputs": {"shade": 1, "seed": 7, "color": "#22cc88"},
        "class_type": "ToyYarn",
        "_meta": {"title": "Yarn"},
    },
    "4:101": {
        "inputs": {"value": 0.5, "width": 16, "height": 16},
        "class_type": "SolidMask",
        "_meta": {"title": "Create Solid Mask"},
    },
    "4:102": {
        "inputs": {"mask": ["4:101", 0]},
        "class_type": "InvertMask",
        "_meta": {"title": "Invert Mask"},
    },
    "4:103": {
        "inputs": {"mask": ["4:101", 0]},
        "class_type": "MaskToImage",
        "_meta": {"title": "Convert Mask to Image"},
    },
    "5": {
        "inputs": {
            "yarns.yarn0": ["1", 0],
            "yarns.yarn1": ["2", 0],
            "size": 64,
            "binding": "twill",
            "binding.shift": 2,
            "binding.region": ["4:102", 0],
            "label": "x",
        },
        "class_type": "ToyWeave",
        "_meta": {"title": "Weave"},
    },
    "6": {"inputs": {"images": ["5", 0]}, "class_type": "PreviewImage", "_meta": {"title": "Preview Image"}},
    "7": {"inputs": {"images": ["4:103", 0]}, "class_type": "PreviewImage", "_meta": {"title": "Preview Image"}},
}


def test_api_is_exactly_what_was_described(ui, object_info):
    assert to_api(ui, object_info) == API


def test_description_is_deterministic_and_without_fault(ui, object_info):
    assert json.dumps(weave(object_info).ui()) == json.dumps(ui)
    assert ui_problems(ui, object_info) == []


def test_what_was_built_runs(ui, object_info, server):
    run = server.run(to_api(ui, object_info))
    assert {picture.node for picture in run.pictures} == {"5", "6", "7"}


class TestSwitchedOff:
    """Bypassed and muted nodes, as the frontend (ExecutableNodeDTO) resolves what is linked to them."""

    def linked(self, info: dict, *modes: tuple[str, int]) -> dict:
        """Inputs of the API nodes, by type, with nodes of the named types in these modes."""
        flow = Workflow(info, "off")
        model = flow.add("ToyYarn")  # stands for anything that is no picture
        one, two = flow.add("EmptyImage"), flow.add("EmptyImage")
        batch = flow.add("ImageBatch", {"image1": one[0], "image2": two[0]}, column=1)
        mask = flow.add("ImageToMask", {"image": batch[0]}, column=2)
        pasted = flow.add(
            "ImageCompositeMasked", {"destination": one[0], "source": batch[0], "mask": mask[0]}, column=3
        )
        flow.add("PreviewImage", {"images": pasted[0]}, column=4)
        flow.add("MaskPreview", {"mask": mask[0]}, column=4)
        flow.add("PreviewAny", {"source": mask[0]}, column=4)
        flow.add("ToyWeave", {"yarns": [model["yarn"]]}, column=4)
        ui = flow.ui()
        for node in ui["nodes"]:
            node["mode"] = dict(modes).get(node["type"], 0)
        return {node["class_type"]: node["inputs"] for node in to_api(ui, info).values()}

    def test_bypassed_node_hands_on_the_input_at_its_outputs_place(self, object_info):
        assert self.linked(object_info, ("ImageCompositeMasked", BYPASSED))["PreviewImage"] == {"images": ["2", 0]}

    def test_bypassed_nodes_in_a_row(self, object_info):
        found = self.linked(object_info, ("ImageBatch", BYPASSED))
        assert found["ImageToMask"]["image"] == found["ImageCompositeMasked"]["source"] == ["2", 0]
        found = self.linked(object_info, ("ImageBatch", BYPASSED), ("ImageToMask", BYPASSED))
        # Nothing of its type is there for a mask; a socket of any type takes what stands at the output's place.
        assert "mask" not in found["MaskPreview"] and "mask" not in found["ImageCompositeMasked"]
        assert found["PreviewAny"] == {"source": ["2", 0]}

    def test_muted_node_hands_on_nothing(self, object_info):
        found = self.linked(object_info, ("ImageBatch", MUTED))
        assert "ImageBatch" not in found
        assert "image" not in found["ImageToMask"] and "source" not in found["ImageCompositeMasked"]
        assert found["ImageCompositeMasked"]["destination"] == ["2", 0]

    def test_widgets_keep_their_values_and_growing_inputs_lose_theirs(self, object_info):
        found = self.linked(object_info, ("ToyYarn", BYPASSED))["ToyWeave"]
        assert found == {"size": 64, "binding": "plain", "label": ""}


def test_stored_form(ui):
    nodes = {node["id"]: node for node in ui["nodes"]}
    assert nodes[1]["widgets_values"] == [3, 0, "fixed", "#ff0000"]
    # One empty socket more than are linked, for the next yarn.
    names = [(entry["name"], entry["link"] is None) for entry in nodes[5]["inputs"]]
    assert names == [
        ("yarns.yarn0", False),
        ("yarns.yarn1", False),
        ("yarns.yarn2", True),
        ("binding.region", False),
    ]
    assert nodes[5]["widgets_values"] == [64, "twill", 2, "x"]
    assert nodes[5]["properties"]["cnr_id"] == "toy" and nodes[4]["properties"]["cnr_id"] == "comfy-core"


@pytest.mark.parametrize(
    ("kind", "inputs", "sentence"),
    [
        ("NoSuchNode", {}, "no node NoSuchNode"),
        ("ToyYarn", {"thickness": 1}, "no input 'thickness'"),
        ("ToyWeave", {"binding": "satin"}, "no option 'satin'"),
        ("ToyWeave", {"binding.shift": 1}, "no input 'binding.shift' here"),
        ("ToyWeave", {}, "yarns.yarn0 needs a link"),
        ("PreviewImage", {"images": "yarn"}, "takes IMAGE, not the TOY_YARN of ToyYarn"),
        ("ToyWeave", {"yarns": ["yarn"] * 5}, "at most 4, not 5"),
    ],
)
def test_wrong_description_is_refused(object_info, kind, inputs, sentence):
    flow = Workflow(object_info, "wrong")
    yarn = flow.add("ToyYarn")[0]
    linked = {name: yarn if value == "yarn" else value for name, value in inputs.items()}
    linked = {name: [yarn] * len(value) if isinstance(value, list) else value for name, value in linked.items()}
    with pytest.raises(ValueError, match=sentence):
        flow.add(kind, linked)


def test_unknown_output_is_named(object_info):
    with pytest.raises(ValueError, match="has no output 'wool': it has yarn"):
        Workflow(object_info, "wrong").add("ToyYarn")["wool"]


def change(workflow: dict, path: str, value) -> dict:
    """A copy with one entry set, or removed for a value of None."""
    result = copy.deepcopy(workflow)
    *parents, last = path.split("/")
    place = result
    for step in parents:
        place = place[step]
    place[last] = value
    if value is None:
        del place[last]
    return result


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("5/class_type", "Gone", "no such node"),
        ("5/_meta", {}, "no _meta title"),
        ("5/inputs/size", None, "lacks its required input size"),
        ("5/inputs/yarns.yarn0", None, "lacks its required input yarns.yarn0"),
        ("5/inputs/yarns.yarn0", ["9", 0], "linked to node 9, which is not there"),
        ("5/inputs/yarns.yarn0", ["1", 3], "linked to output 3 of node 1, which has 1"),
        ("5/inputs/yarns.yarn0", ["4:102", 0], "takes TOY_YARN and is linked to MASK"),
        ("5/inputs/yarns.yarn0", 3, "takes a link to TOY_YARN"),
        ("5/inputs/wool", 1, "has no input wool"),
        ("5/inputs/size", 4, "outside 8 to 512"),
        ("5/inputs/size", "64", "which is no INT"),
        ("5/inputs/size", True, "which is no INT"),
        ("5/inputs/binding", "satin", "no option 'satin'"),
    ],
)
def test_faults_of_api_workflows_are_found(object_info, path, value, sentence):
    assert api_problems(API, object_info) == []
    problems = api_problems(change(API, path, value), object_info)
    assert any(sentence in problem for problem in problems), problems


def test_workflow_without_output_is_found(object_info):
    assert api_problems({"1": API["1"]}, object_info) == ["no node puts anything out"]


def test_absent_model_file_is_no_fault(object_info):
    api = {**API, "8": {"class_type": "CheckpointLoaderSimple", "_meta": {"title": "x"}, "inputs": {}}}
    api["8"]["inputs"]["ckpt_name"] = "sd15.safetensors"
    assert api_problems(api, object_info) == []
    api["8"]["inputs"]["ckpt_name"] = "sd15"
    assert len(api_problems(api, object_info)) == 1


def node(ui: dict, number: int) -> dict:
    return next(node for node in ui["nodes"] if node["id"] == number)


def test_faults_of_ui_workflows_are_found(ui, object_info):
    def problems(edit) -> str:
        broken = copy.deepcopy(ui)
        edit(broken)
        return " | ".join(ui_problems(broken, object_info))

    assert "has no Gone" in problems(lambda ui: node(ui, 1).update(type="Gone"))
    assert "bypassed" in problems(lambda ui: node(ui, 1).update(mode=4))
    assert "no cnr_id" in problems(lambda ui: node(ui, 1)["properties"].pop("cnr_id"))
    assert "does not end" in problems(lambda ui: node(ui, 5)["inputs"][0].update(link=None))
    assert "does not begin" in problems(lambda ui: node(ui, 1)["outputs"][0].update(links=[]))
    assert "stores no value for color" in problems(lambda ui: node(ui, 1)["widgets_values"].pop())
    assert "no widget takes: [1]" in problems(lambda ui: node(ui, 1)["widgets_values"].append(1))
    assert "outside 0 to 9" in problems(lambda ui: node(ui, 1).update(widgets_values=[10, 0, "fixed", "#ff0000"]))
    assert "rescale" in problems(lambda ui: ui["extra"].update(workflowRendererVersion="Vue"))
    model = {"name": "a.safetensors", "url": "x", "directory": "loras"}
    assert "does not use it" in problems(lambda ui: node(ui, 1)["properties"].update(models=[model]))


def test_layout_faults_are_found(ui, object_info):
    assert layout_problems(ui, object_info) == []
    node(ui, 2)["pos"] = list(node(ui, 1)["pos"])
    assert any("overlap" in problem for problem in layout_problems(ui, object_info))
    node(ui, 2)["pos"] = [9000, 0]
    assert layout_problems(ui, object_info) == ["link 2 runs backwards, from node 2 to node 5"]
    # A picture appears under the preview's controls: what is there must leave room for it.
    node(ui, 6)["size"][1] = 40
    left, top = node(ui, 6)["pos"]
    node(ui, 2)["pos"] = [left - 2000, 0]
    node(ui, 4)["pos"] = [left, top + 200]
    node(ui, 4)["size"][1] = 20
    assert layout_problems(ui, object_info) == [
        f"nodes 4 ({node(ui, 4)['type']}) and 6 (PreviewImage) overlap",
        "link 3 runs backwards, from node 4 to node 5",
        "link 5 runs backwards, from node 4 to node 7",
    ]


def test_what_a_person_would_not_see_well_is_found(ui, object_info):
    def problems(edit) -> str:
        broken = copy.deepcopy(ui)
        edit(broken)
        return " | ".join(ui_problems(broken, object_info))

    def widen(ui):
        ui["groups"][2]["bounding"][2] += 2500

    def cover(ui):
        ui["groups"][2]["bounding"] = list(ui["groups"][1]["bounding"])

    assert "it opens at 3" in problems(widen) and "%" in problems(widen)
    assert "groups 'Weaving' and 'Cloth' overlap" in problems(cover)
    assert "(PreviewImage) is in no group" in problems(cover)
    assert "crosses the frame" in problems(lambda ui: ui["groups"][0]["bounding"].__setitem__(2, 100))
    assert "too narrow for its title" in problems(
        lambda ui: node(ui, 1).update(title="A title that is far longer than its yarn")
    )
    (inner,) = ui["definitions"]["subgraphs"]
    assert "same number" in problems(lambda ui: node(ui["definitions"]["subgraphs"][0], 101).update(id=1))
    assert inner["inputs"][0]["linkIds"] == [101, 102], "one input of the subgraph feeds two of a node"


def test_a_long_link_runs_above_all_nodes(ui):
    (link,) = [link for link in ui["links"] if link[1] == 4 and link[3] == 7]
    first, last = (way for way in ui["extra"]["reroutes"] if link[0] in way["linkIds"])
    assert {"id": link[0], "parentId": last["id"]} in ui["extra"]["linkExtensions"]
    assert last["parentId"] == first["id"] and first["linkIds"] == last["linkIds"] == [link[0]]
    tops = [place["pos"][1] - TITLE_HEIGHT for place in ui["nodes"]]
    assert first["pos"][1] == last["pos"][1] < min(tops)
    source, target = node(ui, 4), node(ui, 7)
    assert source["pos"][0] + source["size"][0] < first["pos"][0] < last["pos"][0] < target["pos"][0]


def test_types():
    assert types_fit("IMAGE", "IMAGE,MASK") and types_fit("IMAGE", "*") and types_fit("COMFY_MATCHTYPE_V3", "MASK")
    assert not types_fit("IMAGE", "MASK")
