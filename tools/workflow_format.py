"""The two file formats of a workflow, and conversion from one to the other.

The UI format stores widget values by position and links in a separate list; the API format stores every input by name.
`info` is always the server's `/object_info`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from schema import AUTOGROW, DYNAMIC_COMBO, Field, fields, option_fields

NOTE = "MarkdownNote"
# Nodes that only the frontend has: the server never sees them.
FRONTEND_ONLY = {NOTE, "Note"}
SEED_NAMES = ("seed", "noise_seed")
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
