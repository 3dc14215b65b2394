"""The two file formats of a workflow: conversion from one to the other, and what can be wrong with them.

The UI format stores widget values by position and links in a separate list; the API format stores every input by name.
`info` is always the server's `/object_info`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from schema import AUTOGROW, DYNAMIC_COMBO, Field, fields, live_fields, option_fields

NOTE = "MarkdownNote"
# Nodes that only the frontend has: the server never sees them.
FRONTEND_ONLY = {NOTE, "Note"}
SEED_NAMES = ("seed", "noise_seed")
# Which model files a loader offers depends on the machine, so a missing one is not an error of a workflow.
MODEL_FILE = re.compile(r"\.(safetensors|sft|ckpt|pth?|bin|gguf)$")
ANY_TYPE = {"*", "COMFY_MATCHTYPE_V3"}
# Modes of a node in a UI workflow: muted ones are left out, bypassed ones pass their inputs on.
MUTED, BYPASSED = 2, 4
# Where links begin and end inside a subgraph that come from outside and go there.
SUBGRAPH_INPUT, SUBGRAPH_OUTPUT = -10, -20

TITLE_HEIGHT = 30
PREVIEW_HEIGHT = 240
"""The least that the frontend gives a picture is 220."""
TITLE_LETTER = 8
"""Mean width of a letter in a node's title."""
WINDOW, FIT = (1920, 1080), 0.75
"""A common screen, and the share of it that a workflow fills when it is opened."""
LEAST_ZOOM = 0.58
"""The frontend draws no text below this."""


def stored_after(field: Field) -> list:
    """Values of controls that the frontend adds after this widget: the seed's mode, the upload button."""
    if field.type == "INT" and (field.options.get("control_after_generate") or field.name in SEED_NAMES):
        return ["fixed"]
    if field.type == "COMBO" and field.options.get("image_upload"):
        return ["image"]
    return []


def shows_picture(info: dict) -> bool:
    """Whether the frontend may draw a picture under the node's controls."""
    uploads = any(field.options.get("image_upload") for field in fields(info["input"]))
    return bool(info["output_node"] or info.get("has_intermediate_output") or uploads)


def types_fit(output: str, wanted: str) -> bool:
    """Whether the host accepts this output for this input; both may name several types."""
    given, taken = set(str(output).split(",")), set(str(wanted).split(","))
    return bool(given & taken or ANY_TYPE & (given | taken))


class Graph:
    """The nodes and links of a workflow, or of a subgraph that stands in one of its nodes.

    Args:
        content: a UI workflow, or the definition of a subgraph.
        info: the server's description of all nodes.
        definitions: subgraphs by their id.
        prefix: of the nodes' numbers in the API form.
        outer: the graph and the node that a subgraph stands in.
    """

    def __init__(
        self,
        content: dict,
        info: dict[str, dict],
        definitions: dict[str, dict],
        prefix: str = "",
        outer: tuple[Graph, dict] | None = None,
    ):
        self.content, self.info, self.definitions, self.prefix, self.outer = content, info, definitions, prefix, outer
        self.nodes = {node["id"]: node for node in content["nodes"]}
        self.links = {link[0]: link for link in links_of(content)}

    def inner(self, node: dict) -> Graph:
        """The subgraph in a node."""
        definition = self.definitions[node["type"]]
        return Graph(definition, self.info, self.definitions, f"{self.prefix}{node['id']}:", (self, node))

    def origin(self, entry: dict) -> Any:
        """What an input gets: the API link [node id, output index], the value of a subgraph's widget, or None."""
        if entry.get("link") is None:
            return None
        _, source, slot, *_ = self.links[entry["link"]]
        if source == SUBGRAPH_INPUT:
            graph, holder = self.outer
            name = self.content["inputs"][slot]["name"]
            (given,) = [one for one in holder["inputs"] if one["name"] == name]
            if given.get("link") is None and "widget" in given:
                return promoted(holder)[name]
            return graph.origin(given)
        node = self.nodes[source]
        if node["mode"] == MUTED:
            return None
        if node["mode"] == BYPASSED:
            through = passed_through(node, slot, entry["type"], self.info.get(node["type"]))
            return self.origin(through) if through else None
        if node["type"] in self.definitions:
            inner = self.inner(node)
            (number,) = inner.content["outputs"][slot]["linkIds"]
            return inner.origin({"link": number, "type": entry["type"]})
        return [f"{self.prefix}{source}", slot]

    def api(self) -> dict[str, dict]:
        """The nodes in API format, those in subgraphs among them."""
        found = {}
        for node in self.content["nodes"]:
            if node["type"] in FRONTEND_ONLY or node["mode"] in (MUTED, BYPASSED):
                continue
            if node["type"] in self.definitions:
                found |= self.inner(node).api()
                continue
            info = self.info[node["type"]]
            found[f"{self.prefix}{node['id']}"] = {
                "inputs": node_inputs(node, info, self.origin),
                "class_type": node["type"],
                "_meta": {"title": shown_title(node, self.info, {})},
            }
        return found


def links_of(content: dict) -> list[list]:
    """The links of a workflow or subgraph as [number, source, output, target, input, type]."""
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    return [[link[key] for key in keys] if isinstance(link, dict) else link for link in content["links"]]


def subgraphs_of(ui: dict) -> dict[str, dict]:
    """The subgraphs that a workflow defines, by their id."""
    return {one["id"]: one for one in ui.get("definitions", {}).get("subgraphs", ())}


def promoted(holder: dict) -> dict[str, Any]:
    """The values of a subgraph's widgets by name, which its node stores."""
    names = [entry["name"] for entry in holder["inputs"] if "widget" in entry]
    return dict(zip(names, holder["widgets_values"], strict=True))


def to_api(ui: dict, info: dict[str, dict]) -> dict[str, dict]:
    """A UI workflow in API format, as the frontend would post it; raises ValueError if it cannot be converted.

    Muted and bypassed nodes are left out. An input linked to a muted node stays empty, and one linked to a bypassed
    node gets what `passed_through` finds for it. Node 3 of the subgraph in node 10 becomes 10:3.
    """
    return Graph(ui, info, subgraphs_of(ui)).api()


def passed_through(node: dict, slot: int, wanted: str, info: dict | None) -> dict | None:
    """The input of a bypassed node that replaces one of its outputs, as the frontend chooses it.

    That is the input at the output's own index if its type fits, else the first of exactly the wanted type, else the
    first that fits. The frontend orders a widget's socket after all others.

    Args:
        node: the bypassed node.
        slot: index of its output.
        wanted: type of the input at the link's other end.
        info: the server's description of the node; None for that of a subgraph, which has an entry for each widget.
    """
    if info is None:
        sockets = node["inputs"]
    else:
        sockets = [entry for entry in node["inputs"] if "widget" not in entry]
        linked = {entry["name"]: entry for entry in node["inputs"] if "widget" in entry}
        stored = widget_values(node, info)
        sockets += [linked.get(name, {"name": name, "type": kind}) for name, (kind, _) in stored.items()]
    if wanted == "*":
        return (sockets[slot] if slot < len(sockets) else sockets[0]) if sockets else None

    def fits(entry: dict) -> bool:
        return types_fit(entry["type"], node["outputs"][slot]["type"]) and types_fit(entry["type"], wanted)

    same_place = [entry for entry in sockets[slot : slot + 1] if fits(entry)]
    exact = [entry for entry in sockets if entry["type"] == wanted]
    return next(iter([*same_place, *exact, *filter(fits, sockets)]), None)


def widget_values(node: dict, info: dict) -> dict[str, tuple[str, Any]]:
    """Type and stored value of each widget of a UI node; raises ValueError if they do not match."""
    stored = list(node["widgets_values"])
    values: dict[str, tuple[str, Any]] = {}

    def read(level: list[Field]) -> None:
        for field in level:
            if field.type == AUTOGROW or not field.is_widget:
                continue
            if not stored:
                raise ValueError(f"node {node['id']} ({node['type']}) stores no value for {field.name}")
            values[field.name] = (field.type, stored.pop(0))
            del stored[: len(stored_after(field))]
            if field.type == DYNAMIC_COMBO:
                read(option_fields(field, values[field.name][1]))

    read(fields(info["input"]))
    if stored:
        raise ValueError(f"node {node['id']} ({node['type']}) stores values that no widget takes: {stored}")
    return values


def node_inputs(node: dict, info: dict, origin: Callable[[dict], list | None]) -> dict[str, Any]:
    """The inputs of a UI node by name: the values of its widgets, overridden by the links that `origin` finds."""
    values = {name: value for name, (_, value) in widget_values(node, info).items()}
    links = {entry["name"]: origin(entry) for entry in node["inputs"]}
    return {**values, **{name: link for name, link in links.items() if link is not None}}


def is_link(value: Any) -> bool:
    """Whether an API input is a link [node id, output index]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def api_problems(api: dict[str, dict], info: dict[str, dict]) -> list[str]:
    """What the server would refuse in an API workflow, each in one sentence."""
    problems = []
    for number, node in api.items():
        kind = node["class_type"]
        name = f"node {number} ({kind})"
        if kind not in info:
            problems.append(f"{name}: the host has no such node")
            continue
        if not node.get("_meta", {}).get("title"):
            problems.append(f"{name} has no _meta title, without which a renamed node cannot be replaced")
        try:
            known = {field.name: field for field in live_fields(info[kind], node["inputs"])}
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        for field in known.values():
            if field.required and field.name not in node["inputs"]:
                problems.append(f"{name} lacks its required input {field.name}")
        for key, value in node["inputs"].items():
            if key not in known:
                problems.append(f"{name} has no input {key}")
            elif is_link(value):
                problems += [f"{name}.{key} {fault}" for fault in link_faults(value, known[key], api, info)]
            else:
                problems += [f"{name}.{key} {fault}" for fault in value_faults(value, known[key])]
    if not any(info.get(node["class_type"], {}).get("output_node") for node in api.values()):
        problems.append("no node puts anything out")
    return problems


def link_faults(link: list, field: Field, api: dict[str, dict], info: dict[str, dict]) -> list[str]:
    """What is wrong with a link in an API workflow."""
    source, slot = link
    if source not in api:
        return [f"is linked to node {source}, which is not there"]
    outputs = info.get(api[source]["class_type"], {}).get("output", [])
    if slot >= len(outputs):
        return [f"is linked to output {slot} of node {source}, which has {len(outputs)}"]
    if not types_fit(outputs[slot], field.type):
        return [f"takes {field.type} and is linked to {outputs[slot]}"]
    return []


def value_faults(value: Any, field: Field) -> list[str]:
    """What is wrong with a constant in an API workflow."""
    if not field.is_widget:
        return [f"takes a link to {field.type}, not {value!r}"]
    if field.choices is not None:
        fits = value in field.choices or (isinstance(value, str) and MODEL_FILE.search(value))
        return [] if fits else [f"is {value!r}, which is not among its choices"]
    types = {"INT": int, "FLOAT": (int, float), "STRING": str, "BOOLEAN": bool, "COLOR": str}[field.type]
    if not isinstance(value, types) or (isinstance(value, bool) and field.type != "BOOLEAN"):
        return [f"is {value!r}, which is no {field.type}"]
    if field.type in ("INT", "FLOAT"):
        low, high = field.options.get("min", value), field.options.get("max", value)
        return [] if low <= value <= high else [f"is {value}, outside {low} to {high}"]
    return []


def ui_problems(ui: dict, info: dict[str, dict]) -> list[str]:
    """What is wrong with a UI workflow: its own consistency, its layout, and its API form."""
    definitions = subgraphs_of(ui)
    parts = [ui, *definitions.values()]
    every = [node for part in parts for node in part["nodes"] if node["type"] not in FRONTEND_ONLY]
    real = [node for node in every if node["type"] not in definitions]
    problems = [f"node {node['id']}: the host has no {node['type']}" for node in real if node["type"] not in info]
    if problems:
        return problems
    for node in every:
        name = f"node {node['id']} ({node['type']})"
        if node["mode"] != 0:
            problems.append(f"{name} is muted or bypassed")
        if not node["properties"].get("cnr_id"):
            problems.append(f"{name} has no cnr_id, so nothing could offer to install its pack")
        for model in node["properties"].get("models", ()):
            if model["name"] not in node["widgets_values"]:
                problems.append(f"{name} offers {model['name']} for download but does not use it")
            if not {"name", "url", "directory"} <= set(model):
                problems.append(f"{name} names a model without url or directory")
        if title_width(shown_title(node, info, definitions)) > node["size"][0]:
            problems.append(f"{name} is too narrow for its title")
        if node["type"] in info and info[node["type"]].get("deprecated"):
            problems.append(f"{name} is deprecated")
    for part in parts:
        problems += link_problems(part)
        problems += layout_problems(part, info)
    numbers = [node["id"] for part in parts for node in part["nodes"]]
    if len(numbers) != len(set(numbers)):
        problems.append("two nodes have the same number, so the frontend would renumber them")
    if "workflowRendererVersion" in ui["extra"]:
        problems.append("extra.workflowRendererVersion makes the frontend rescale the layout")
    problems += view_problems(ui, info)
    if not problems:
        try:
            problems += api_problems(to_api(ui, info), info)
        except ValueError as error:
            problems.append(str(error))
    return problems


def shown_title(node: dict, info: dict[str, dict], definitions: dict[str, dict]) -> str:
    """The title of a node: its own, or that of its kind."""
    if node.get("title"):
        return node["title"]
    if node["type"] in definitions:
        return definitions[node["type"]]["name"]
    return info[node["type"]]["display_name"] or node["type"]


def title_width(title: str) -> int:
    """The width of a node at which its title is whole."""
    return len(title) * TITLE_LETTER + TITLE_HEIGHT


def link_problems(content: dict) -> list[str]:
    """Links of a workflow or subgraph that do not end or begin where their nodes say."""
    nodes = {node["id"]: node for node in content["nodes"]}
    problems, to_nodes = [], []
    for number, source, out, target, slot, kind in links_of(content):
        if target != SUBGRAPH_OUTPUT:
            to_nodes.append(number)
            if target not in nodes or nodes[target]["inputs"][slot]["link"] != number:
                problems.append(f"link {number} does not end where it says")
        if source != SUBGRAPH_INPUT and not (
            source in nodes
            and number in nodes[source]["outputs"][out]["links"]
            and nodes[source]["outputs"][out]["type"] == kind
        ):
            problems.append(f"link {number} does not begin where it says")
    linked = [entry["link"] for node in nodes.values() for entry in node["inputs"] if entry.get("link") is not None]
    if sorted(linked) != sorted(to_nodes):
        problems.append("the nodes' inputs and the list of links disagree")
    return problems


def view_problems(ui: dict, info: dict[str, dict]) -> list[str]:
    """What a person would not see well: the frontend opens a template so that all of it is in view."""
    boxes = [node_box(node, info) for node in ui["nodes"]]
    frames = [(x, y, x + width, y + height) for x, y, width, height in (group["bounding"] for group in ui["groups"])]
    problems = []
    for index, (group, frame) in enumerate(zip(ui["groups"], frames, strict=True)):
        for other, b in zip(ui["groups"][index + 1 :], frames[index + 1 :], strict=True):
            if overlap(frame, b):
                problems.append(f"groups {group['title']!r} and {other['title']!r} overlap")
    for node, box in zip(ui["nodes"], boxes, strict=True):
        inside = [frame for frame in frames if overlap(box, frame)]
        whole = [f for f in inside if f[0] <= box[0] and f[1] <= box[1] and box[2] <= f[2] and box[3] <= f[3]]
        if len(inside) > 1 or inside != whole:
            problems.append(f"node {node['id']} ({node['type']}) crosses the frame of a group")
        elif not inside and node["type"] not in FRONTEND_ONLY and ui["groups"]:
            problems.append(f"node {node['id']} ({node['type']}) is in no group")
    if not ui["groups"]:
        return problems
    left, top = (min(box[side] for box in (*boxes, *frames)) for side in (0, 1))
    right, bottom = (max(box[side] for box in (*boxes, *frames)) for side in (2, 3))
    zoom = FIT * min(WINDOW[0] / (right - left), WINDOW[1] / (bottom - top))
    if zoom < LEAST_ZOOM:
        problems.append(f"it opens at {zoom:.0%}, {right - left:.0f} x {bottom - top:.0f} large")
    return problems


def overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two rectangles (left, top, right, bottom) have an area in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def node_box(node: dict, info: dict[str, dict]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node, including its title and room for the picture it may show.

    A node that is tall enough for its picture needs no more; one that is not grows when the picture comes.
    """
    (left, top), (width, height) = node["pos"], node["size"]
    if node["type"] in info and shows_picture(info[node["type"]]):
        rows = len(node["widgets_values"]) + max(len(node["inputs"]), len(node["outputs"]))
        height = max(height, rows * 20 + PREVIEW_HEIGHT)
    return left, top - TITLE_HEIGHT, left + width, top + height


def layout_problems(content: dict, info: dict[str, dict]) -> list[str]:
    """Overlapping nodes of a workflow or subgraph, including their room for pictures, and links that run backwards."""
    problems = []
    boxes = [(node, node_box(node, info)) for node in content["nodes"]]
    for index, (one, a) in enumerate(boxes):
        for other, b in boxes[index + 1 :]:
            if overlap(a, b):
                problems.append(f"nodes {one['id']} ({one['type']}) and {other['id']} ({other['type']}) overlap")
    places = {node["id"]: node["pos"][0] for node in content["nodes"]}
    for number, source, _, target, *_ in links_of(content):
        if min(source, target) > 0 and places[source] >= places[target]:
            problems.append(f"link {number} runs backwards, from node {source} to node {target}")
    return problems
