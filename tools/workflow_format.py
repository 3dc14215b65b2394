"""The two file formats of a workflow: conversion from one to the other, and what can be wrong with them.

The UI format stores widget values by position and links in a separate list; the API format stores every input by name.
`info` is always the server's `/object_info`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
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

TITLE_HEIGHT = 30
PREVIEW_HEIGHT = 300


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


def to_api(ui: dict, info: dict[str, dict]) -> dict[str, dict]:
    """A UI workflow in API format, as the frontend would post it; raises ValueError if it cannot be converted.

    Muted and bypassed nodes are left out. An input linked to a muted node stays empty, and one linked to a bypassed
    node gets what `passed_through` finds for it.
    """
    nodes = {node["id"]: node for node in ui["nodes"]}
    links = {link[0]: link for link in ui["links"]}

    def origin(entry: dict) -> list | None:
        """The API link [node id, output index] of an input, or None if nothing comes through it."""
        if entry.get("link") is None:
            return None
        _, source, slot, *_ = links[entry["link"]]
        node = nodes[source]
        if node["mode"] == MUTED:
            return None
        if node["mode"] == BYPASSED:
            through = passed_through(node, slot, entry["type"], info[node["type"]])
            return origin(through) if through else None
        return [str(source), slot]

    return {
        str(node["id"]): {
            "inputs": node_inputs(node, info[node["type"]], origin),
            "class_type": node["type"],
            "_meta": {"title": node.get("title") or info[node["type"]]["display_name"] or node["type"]},
        }
        for node in ui["nodes"]
        if node["type"] not in FRONTEND_ONLY and node["mode"] not in (MUTED, BYPASSED)
    }


def passed_through(node: dict, slot: int, wanted: str, info: dict) -> dict | None:
    """The input of a bypassed node that replaces one of its outputs, as the frontend chooses it.

    That is the input at the output's own index if its type fits, else the first of exactly the wanted type, else the
    first that fits. The frontend orders a widget's socket after all others.

    Args:
        node: the bypassed node.
        slot: index of its output.
        wanted: type of the input at the link's other end.
        info: the server's description of the node.
    """
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
    nodes = {node["id"]: node for node in ui["nodes"]}
    real = [node for node in ui["nodes"] if node["type"] not in FRONTEND_ONLY]
    problems = [f"node {node['id']}: the host has no {node['type']}" for node in real if node["type"] not in info]
    if problems:
        return problems
    for node in real:
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
    for number, source, out, target, slot, kind in ui["links"]:
        ends = source in nodes and target in nodes
        if not ends or nodes[target]["inputs"][slot]["link"] != number:
            problems.append(f"link {number} does not end where it says")
        elif number not in nodes[source]["outputs"][out]["links"] or nodes[source]["outputs"][out]["type"] != kind:
            problems.append(f"link {number} does not begin where it says")
    linked = [entry["link"] for node in ui["nodes"] for entry in node["inputs"] if entry.get("link") is not None]
    if sorted(linked) != sorted(link[0] for link in ui["links"]):
        problems.append("the nodes' inputs and the list of links disagree")
    if "workflowRendererVersion" in ui["extra"]:
        problems.append("extra.workflowRendererVersion makes the frontend rescale the layout")
    problems += layout_problems(ui, info)
    if not problems:
        try:
            problems += api_problems(to_api(ui, info), info)
        except ValueError as error:
            problems.append(str(error))
    return problems


def node_box(node: dict, info: dict[str, dict]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a node, including its title and room for the picture it may show.

    A node that is tall enough for its picture needs no more; one that is not grows when the picture comes.
    """
    (left, top), (width, height) = node["pos"], node["size"]
    if node["type"] in info and shows_picture(info[node["type"]]):
        rows = len(node["widgets_values"]) + max(len(node["inputs"]), len(node["outputs"]))
        height = max(height, rows * 20 + PREVIEW_HEIGHT)
    return left, top - TITLE_HEIGHT, left + width, top + height


def layout_problems(ui: dict, info: dict[str, dict]) -> list[str]:
    """Overlapping nodes, including their room for pictures, and links that run backwards."""
    problems = []
    boxes = [(node, node_box(node, info)) for node in ui["nodes"]]
    for index, (one, a) in enumerate(boxes):
        for other, b in boxes[index + 1 :]:
            if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]:
                problems.append(f"nodes {one['id']} ({one['type']}) and {other['id']} ({other['type']}) overlap")
    places = {node["id"]: node["pos"][0] for node in ui["nodes"]}
    for number, source, _, target, *_ in ui["links"]:
        if places[source] > places[target]:
            problems.append(f"link {number} runs backwards, from node {source} to node {target}")
    return problems
