"""What can be wrong with a workflow: its API form, its own consistency, and how a person sees it.

`info` is always the server's `/object_info`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from schema import Field, live_fields
from workflow_format import (
    FRONTEND_ONLY,
    PREVIEW_HEIGHT,
    SUBGRAPH_INPUT,
    SUBGRAPH_OUTPUT,
    TITLE_HEIGHT,
    is_link,
    links_of,
    shown_title,
    shows_picture,
    subgraphs_of,
    title_width,
    to_api,
    types_fit,
)

# Which model files a loader offers depends on the machine, so a missing one is not an error of a workflow.
MODEL_FILE = re.compile(r"\.(safetensors|sft|ckpt|pth?|bin|gguf)$")
WINDOW, FIT = (1920, 1080), 0.75
"""A common screen, and the share of it that a workflow fills when it is opened."""
LEAST_ZOOM = 0.58
"""The frontend draws no text below this."""


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
        if source in places and target in places and places[source] >= places[target]:
            problems.append(f"link {number} runs backwards, from node {source} to node {target}")
    return problems
