"""The contract with saved workflows, and the text that makes nodes understandable."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import schema
from environment import ROOT
from make_locales import FOLDER, locale_files, node_texts

HINT = f"look at the difference; if it is meant: {sys.executable} tools/{{}}"


@pytest.fixture(scope="module")
def info(host):
    return schema.pack_info()


@pytest.fixture(scope="module")
def toys(host):
    """`/object_info` of the toy pack."""
    spec = importlib.util.spec_from_file_location("toy_pack", Path(__file__).parent / "toy_pack" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in module.NODES}


def test_schema_is_the_frozen_one(info):
    frozen = json.loads(schema.SNAPSHOT.read_text(encoding="utf-8"))
    assert json.loads(json.dumps(schema.frozen(info))) == frozen, HINT.format("schema.py")


def test_names(info):
    for name, node in info.items():
        assert name.startswith("ConceptLoom")
        assert node["category"].startswith("ConceptLoom/")
        assert "ConceptLoom" not in node["display_name"]
        assert node["description"]


def test_advanced_widgets_are_the_last(info):
    """The classic renderer shows them all, in this order."""
    for name, node in info.items():
        order = [bool(field.options.get("advanced")) for field in schema.fields(node["input"]) if field.is_widget]
        assert order == sorted(order), name


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("consistent character", "ReferenceSubject"),
        ("two characters", "MultiReferenceSelfAttention"),
        ("face", "SubjectEncoder"),
        ("person", "FuseSubjects"),
        ("ip adapter", "FusionGuider"),
        ("mask by text", "TextToMasks"),
        ("multiple loras", "MultiConceptFusion"),
        ("train lora", "TrainConcept"),
        ("unsampler", "DDIMInversion"),
        ("color palette", "Palette"),
        ("t2i adapter", "ApplyRepresentation"),
    ],
)
def test_what_people_type_finds_a_node(info, typed, found):
    node = info[f"ConceptLoom{found}"]
    assert typed in [word.lower() for word in (node["display_name"], *node["search_aliases"])]


def test_every_input_has_a_tooltip(info):
    silent = [f"{name}.{field.name}" for name, node in info.items() for field in without_tooltip(node)]
    assert not silent


def test_every_output_has_a_tooltip(info):
    for name, node in info.items():
        assert all(node["output_tooltips"]), name


def without_tooltip(node: dict) -> list[schema.Field]:
    """Inputs that say nothing about themselves."""
    return [field for field in schema.all_fields(node) if not field.options.get("tooltip")]


def test_locale_files_are_up_to_date(info):
    for name, content in locale_files(info).items():
        assert (FOLDER / name).read_text(encoding="utf-8") == content, HINT.format("make_locales.py")


def test_every_node_has_a_help_page(info):
    assert set(info) == set(help_pages())


def test_help_pages_name_what_their_nodes_have(info):
    pages = help_pages()
    faults = [f"{name}.md {fault}" for name, node in info.items() for fault in page_faults(node, pages[name])]
    assert not faults, "\n".join(faults)


def help_pages() -> dict[str, str]:
    """The text of every help page, by its node."""
    return {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "nodes" / "web" / "docs").glob("*.md")}


def page_faults(node: dict, page: str) -> list[str]:
    """What the help page's tables lack, and what they name without need.

    Names are those that the node shows: "region" for "binding.region". A growing input stands for all it grows to.
    """
    inputs = {field.name.rpartition(".")[2] for field in schema.all_fields(node) if field.place is None}
    faults = []
    for kind, has in (("input", inputs), ("output", set(node["output_name"]))):
        told = names_in_tables(page, kind)
        faults += [f"has no row for the {kind} {name!r}" for name in sorted(has - told)]
        faults += [f"has a row for the {kind} {name!r}, which the node has not" for name in sorted(told - has)]
    return faults


def names_in_tables(page: str, kind: str) -> set[str]:
    """What stands in the first column of the tables headed "input" or "output", such as `| a, b (advanced) |`."""
    rows = "".join(re.findall(rf"^\| {kind} \|.*\n\|.*\n((?:\|.*\n)*)", page, re.MULTILINE))
    cells = re.findall(r"^\| (.*?)(?: \((?:advanced|optional)\))? \|", rows, re.MULTILINE)
    return {name for cell in cells for name in cell.split(", ")}


class TestReading:
    """The reader of schemas, on nodes with every kind of input."""

    def test_live_inputs_follow_the_values(self, toys):
        names = [field.name for field in schema.live_fields(toys["ToyWeave"], {"binding": "twill"})]
        assert names == [
            *("yarns.yarn0", "yarns.yarn1", "yarns.yarn2", "yarns.yarn3"),
            *("size", "binding", "binding.shift", "binding.region", "label"),
        ]
        plain = {field.name: field for field in schema.live_fields(toys["ToyWeave"], {})}
        assert "binding.shift" not in plain
        assert plain["yarns.yarn0"].required and not plain["yarns.yarn1"].required
        assert plain["binding"].default == "plain"

    def test_unknown_option_is_named(self, toys):
        with pytest.raises(ValueError, match="binding has no option 'satin': it offers plain, twill"):
            schema.live_fields(toys["ToyWeave"], {"binding": "satin"})

    def test_old_style_combo(self):
        (field,) = schema.fields({"required": {"ink": [["red", "blue"]]}})
        assert (field.type, field.choices, field.default, field.is_widget) == ("COMBO", ["red", "blue"], "red", True)

    def test_missing_tooltip_is_seen_at_every_depth(self, toys):
        node = json.loads(json.dumps(toys["ToyWeave"]))
        del node["input"]["required"]["size"][1]["tooltip"]
        del node["input"]["required"]["binding"][1]["options"][1]["inputs"]["optional"]["region"][1]["tooltip"]
        del node["input"]["required"]["yarns"][1]["template"]["input"]["required"]["yarn"][1]["tooltip"]
        silent = {field.name for field in without_tooltip(node)}
        assert silent == {"size", "binding.region", *(f"yarns.yarn{index}" for index in range(4))}

    def test_faults_of_a_help_page(self, toys):
        page = "| input | meaning |\n|---|---|\n| yarns | - |\n| size, knots | - |\n| binding (advanced) | - |\n"
        page += "\n| choice | meaning |\n|---|---|\n| twill | - |\n"
        assert page_faults(toys["ToyWeave"], page) == [
            "has no row for the input 'label'",
            "has no row for the input 'region'",
            "has no row for the input 'shift'",
            "has a row for the input 'knots', which the node has not",
            "has no row for the output 'image'",
        ]

    def test_locale_keys(self, toys):
        assert set(node_texts(toys)["ToyWeave"]["inputs"]) == {
            *("yarns_yarn0", "yarns_yarn1", "yarns_yarn2", "yarns_yarn3"),
            *("binding_shift", "binding_region"),
        }
        assert "ToyYarn" not in node_texts(toys)

    def test_snapshot_sees_changes_and_ignores_files(self, toys):
        node = json.loads(json.dumps(toys["ToyWeave"]))
        before = schema.frozen({"ToyWeave": node})
        node["input"]["required"]["file"] = ["COMBO", {"options": ["none", "v1.5", "a.safetensors"]}]
        after = schema.frozen({"ToyWeave": node})
        assert before != after
        added = next(field for field in after["ToyWeave"]["inputs"] if field["name"] == "file")
        assert added["choices"] == ["none", "v1.5"]
