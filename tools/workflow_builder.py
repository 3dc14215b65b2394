"""Builds workflows by program, converts them to API format, and checks both.

A workflow is described once, in terms of nodes and named inputs; the file a person opens (UI
format: positions, sockets, positional widget values) and the file a script posts (API format) both
come from that description (the converter is in workflow_format.py):

    flow = Workflow(object_info, "01_Two-Subjects_FreeCustom_Shapeland")
    cat = flow.add("ConceptLoomExampleSubject", {"file": "cat.png"}, column=0)
    hat = flow.add("ConceptLoomExampleSubject", {"file": "hat.png"}, column=0)
    crowd = flow.add("ConceptLoomFreeCustom", {
        "model": loader[0],                      # a link: an output by number or by name
        "subjects": [cat["subject"], hat[0]],    # an Autogrow input takes a list
        "blocks": "late", "blocks.first": 7,     # a DynamicCombo's inputs carry its name
    }, column=1)
    flow.add("PreviewImage", {"images": decoded[0]}, column=2)
    flow.group("Subjects", [cat, hat])
    flow.note("## Two subjects\\nPress **Run**.", column=0)
    ui = flow.ui()
    api = to_api(ui, object_info)

Inputs that are not named keep the schema's default. Nodes are placed in columns from left to right,
and in each column below one another, in the order in which they are added. A wire that passes over
a column runs above all nodes.

Several nodes can stand in one, which a person may open:

    inner = Subgraph(object_info, "Drawn Subject")
    drawing = inner.add("ConceptLoomDrawScene", {"description": inner.input("description")})
    inner.output("image", drawing[0])
    subject = flow.place(inner, {"description": "a star on a navy background"}, column=1)
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from schema import AUTOGROW, DYNAMIC_COMBO, Field, fields, grown, live_fields, option_fields
from workflow_format import (
    NOTE,
    PREVIEW_HEIGHT,
    SUBGRAPH_INPUT,
    SUBGRAPH_OUTPUT,
    shows_picture,
    stored_after,
    title_width,
    types_fit,
)
from workflow_layout import lanes, long_links, place

MARGIN = 12
"""Below the last row of a node."""
WIDTH, LEAST_WIDTH = 250, 225
"""Nodes 2.0 makes no node narrower than the least."""
ROW_HEIGHT = 24
TEXT_HEIGHT = 84
SUBGRAPH_FOOTER = 44
"""Height of what Nodes 2.0 shows below the node of a subgraph."""
ROOM = 100
"""Numbers of nodes and links of a subgraph begin at a multiple of this: the frontend renumbers what is there twice."""


class Output(NamedTuple):
    """One output socket of a node that was added."""

    node: Node
    slot: int


class Node:
    """A node that was added: `node[0]` and `node["image"]` are its outputs."""

    def __init__(self, data: dict, info: dict) -> None:
        self.data, self.info = data, info

    def __getitem__(self, output: int | str) -> Output:
        names = self.info["output_name"]
        slot = names.index(output) if isinstance(output, str) and output in names else output
        if not isinstance(slot, int) or slot >= len(names):
            raise ValueError(f"{self.data['type']} has no output {output!r}: it has {', '.join(names) or 'none'}")
        return Output(self, slot)


class Input(NamedTuple):
    """One input of a subgraph, as a value for inputs of its nodes."""

    name: str


class Workflow:
    """A workflow under construction; `info` is the server's `/object_info`."""

    def __init__(self, info: dict[str, dict], name: str) -> None:
        self.info, self.name = info, name
        self.nodes: list[dict] = []
        self.links: list[list] = []
        self.groups: list[dict] = []
        self.columns: dict[int, list[dict]] = {}
        self.subgraphs: list[Subgraph] = []

    def add(
        self,
        kind: str,
        inputs: dict[str, Any] | None = None,
        column: int = 0,
        title: str | None = None,
        width: int = WIDTH,
        models: Sequence[dict] = (),
        picture: int = PREVIEW_HEIGHT,
    ) -> Node:
        """Adds a node; raises ValueError if the node or an input is unknown. `models` are {name, url, directory} of the
        files that a loader needs, `picture` is the height of the picture it may show."""
        if kind not in self.info:
            raise ValueError(f"The host has no node {kind}")
        info = self.info[kind]
        values = self._flat(kind, info, inputs or {})
        width = max(width, title_width(title or info["display_name"] or kind))
        data = self._new(kind, column, width, title, zip(info["output_name"], info["output"], strict=True))
        origin, _, pack = str(info["python_module"]).partition(".")
        data["properties"] = {
            "Node name for S&R": kind,
            "cnr_id": pack if origin == "custom_nodes" else "comfy-core",
            **({"models": list(models)} if models else {}),
        }
        height = 0
        for field in live_fields(info, values):
            height += self._add_input(data, field, values)
        height += max(len(info["output"]) - sum("widget" not in entry for entry in data["inputs"]), 0) * ROW_HEIGHT
        data["size"][1] = height + MARGIN + (picture if shows_picture(info) else 0)
        return Node(data, info)

    def place(
        self,
        inner: Subgraph,
        inputs: dict[str, Any] | None = None,
        column: int = 0,
        title: str | None = None,
        width: int = WIDTH,
        open_sockets: bool = False,
    ) -> Node:
        """Adds a node that holds a subgraph; raises ValueError if an input is unknown, or a socket gets no link and
        they may not be open."""
        if inner not in self.subgraphs:
            self.subgraphs.append(inner)
            inner.number_from(ROOM * len(self.subgraphs))
        given = inputs or {}
        unknown = [name for name in given if name not in inner.takes]
        if unknown:
            raise ValueError(f"{inner.name} has no input {unknown[0]!r}: it has {', '.join(inner.sockets())}")
        width = max(width, title_width(title or inner.name))
        data = self._new(inner.id, column, width, title, ((name, kind) for name, (kind, _) in inner.gives.items()))
        data["properties"] = {"cnr_id": "comfy-core"}
        height = 0
        for take in inner.sockets().values():
            field = take.field._replace(required=not open_sockets)
            height += self._add_input(data, field, given, take.default)
        height += max(len(inner.gives) - sum("widget" not in entry for entry in data["inputs"]), 0) * ROW_HEIGHT
        data["size"][1] = height + MARGIN + SUBGRAPH_FOOTER
        if open_sockets:
            for entry in data["inputs"]:
                entry.pop("shape", None)
        info = {"output_name": list(inner.gives), "output": [kind for kind, _ in inner.gives.values()]}
        return Node(data, info)

    def subgraph(self, name: str, describe: Callable[[Subgraph], None]) -> Subgraph:
        """The subgraph of this name, described when it is first asked for."""
        found = next((one for one in self.subgraphs if one.name == name), None)
        if found is None:
            found = Subgraph(self.info, name)
            describe(found)
        return found

    def blueprint(self, category: str, description: str, aliases: list[str]) -> dict:
        """The only subgraph, with the values of its node, as a file of the pack's folder subgraphs/ holds it."""
        ui = self.ui()
        (node,), (definition,) = ui["nodes"], ui["definitions"]["subgraphs"]
        node["properties"]["Node name for S&R"] = definition["name"]
        definition |= {"category": category, "description": description}
        ui["extra"] |= {"BlueprintDescription": description, "BlueprintSearchAliases": aliases}
        return ui

    def _new(self, kind: str, column: int, width: int, title: str | None, outputs: Iterable[tuple[str, str]]) -> dict:
        """A node's data, in its column, with nothing in its inputs yet."""
        data = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [0, 0],
            "size": [max(width, LEAST_WIDTH), 0],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [
                {"name": name, "type": kind, "links": [], "slot_index": slot}
                for slot, (name, kind) in enumerate(outputs)
            ],
            "properties": {},
            "widgets_values": [],
        }
        if title:
            data["title"] = title
        self.nodes.append(data)
        self.columns.setdefault(column, []).append(data)
        return data

    def note(self, text: str, column: int = 0, width: int = 240) -> Node:
        """Adds a note in Markdown. It gets no color of its own: that would be unreadable in one of the themes."""
        data = self._new(NOTE, column, width, None, ())
        lines = sum(1 + len(line) * 7 // width for line in text.splitlines())
        data["size"][1] = 40 + 20 * lines
        data["widgets_values"] = [text]
        return Node(data, {"output_name": []})

    def group(self, title: str, *columns: int, color: str = "#3f789e") -> None:
        """Draws a titled frame around all nodes of neighboring columns."""
        self.groups.append({"title": title, "columns": columns, "color": color})

    def ui(self) -> dict:
        """The finished workflow in UI format."""
        passing = long_links(self.columns, self.links)
        frames = place(self.columns, [group["columns"] for group in self.groups], len(passing))
        reroutes, extensions = lanes(self.nodes, passing)
        groups = [
            {
                "id": index + 1,
                "title": group["title"],
                "bounding": frame,
                "color": group["color"],
                "font_size": 24,
                "flags": {},
            }
            for index, (group, frame) in enumerate(zip(self.groups, frames, strict=True))
        ]
        definitions = [inner.definition() for inner in self.subgraphs]
        return {
            # The same description always gives the same file.
            "id": stable_id(self.name),
            "revision": 0,
            "last_node_id": max(node["id"] for part in (self, *self.subgraphs) for node in part.nodes),
            "last_link_id": max((link[0] for part in (self, *self.subgraphs) for link in part.links), default=0),
            "nodes": self.nodes,
            "links": self.links,
            "groups": groups,
            **({"definitions": {"subgraphs": definitions}} if definitions else {}),
            "config": {},
            "extra": {
                "ds": {"scale": 0.8, "offset": [60, 120]},
                **({"reroutes": reroutes, "linkExtensions": extensions} if reroutes else {}),
            },
            "version": 0.4,
        }

    def _flat(self, kind: str, info: dict, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs by API name, each list spread over its Autogrow input; raises ValueError for unknown names."""
        values = dict(inputs)

        def spread(level: list[Field]) -> None:
            for field in level:
                if field.type == AUTOGROW and field.name in values:
                    given, names = values.pop(field.name), [child.name for child in grown(field)]
                    if len(given) > len(names):
                        raise ValueError(f"{kind}.{field.name} takes at most {len(names)}, not {len(given)}")
                    values.update(zip(names, given, strict=False))
                if field.type == DYNAMIC_COMBO:
                    spread(option_fields(field, values.get(field.name, field.default)))

        spread(fields(info["input"]))
        known = [field.name for field in live_fields(info, values)]
        for name in values:
            if name not in known:
                raise ValueError(f"{kind} has no input {name!r} here: it has {', '.join(known)}")
        return values

    def _add_input(self, data: dict, field: Field, values: dict[str, Any], default: Any = None) -> int:
        """Adds a field as socket, widget or both, and returns its height. `default` is the field's own if None."""
        value = values.get(field.name)
        linked = isinstance(value, Output | Input)
        default = field.default if default is None else default
        if not field.is_widget and not linked:
            if field.required:
                raise ValueError(f"{data['type']}.{field.name} needs a link")
            if not is_next_empty(field, values):
                return 0
        # The node of a subgraph has an entry for each of its inputs, also for those that are widgets alone.
        if linked or not field.is_widget or data["type"] not in self.info:
            entry = {"name": field.name, "type": field.type, "link": None}
            if "." in field.name:
                entry["label"] = field.name.rpartition(".")[2]
            if not field.required:
                entry["shape"] = 7
            if field.is_widget:
                entry["widget"] = {"name": field.name}
            if linked:
                entry["link"] = self._link(value, data, len(data["inputs"]), field)
            data["inputs"].append(entry)
        if field.is_widget:
            data["widgets_values"] += [default if linked or field.name not in values else value]
            if data["type"] in self.info:
                data["widgets_values"] += stored_after(field)
            return TEXT_HEIGHT if field.options.get("multiline") else ROW_HEIGHT * (1 + len(stored_after(field)))
        return ROW_HEIGHT

    def _link(self, value: Output | Input, target: dict, slot: int, field: Field) -> int:
        """Links an output to an input and returns the link's id."""
        output = value
        kind = output.node.info["output"][output.slot]
        if not types_fit(kind, field.type):
            raise ValueError(
                f"{target['type']}.{field.name} takes {field.type}, not the {kind} of {output.node.data['type']}"
            )
        number = len(self.links) + 1
        self.links.append([number, output.node.data["id"], output.slot, target["id"], slot, kind])
        output.node.data["outputs"][output.slot]["links"].append(number)
        return number


class Take(NamedTuple):
    """An input of a subgraph.

    Attributes:
        field: of the first node that it feeds, under the input's name.
        default: the widget's value where none is given.
        links: numbers of its links inside.
    """

    field: Field
    default: Any
    links: list[int]


class Subgraph(Workflow):
    """A workflow inside one node. Nodes take its inputs by `input`, and it hands on what `output` names."""

    def __init__(self, info: dict[str, dict], name: str) -> None:
        super().__init__(info, name)
        self.id = stable_id(f"subgraph/{name}")
        self.takes: dict[str, Take] = {}
        self.gives: dict[str, tuple[str, int]] = {}
        self._values: dict[str, Any] = {}

    def input(self, name: str, value: Any = None) -> Input:
        """An input for the nodes inside; `value` is what its widget has at first, the node's own default if None."""
        self._values.setdefault(name, value)
        return Input(name)

    def sockets(self) -> dict[str, Take]:
        """All inputs, in the order in which they were asked for."""
        return {name: self.takes[name] for name in self._values}

    def output(self, name: str, output: Output) -> None:
        """Hands on an output of a node inside."""
        kind = output.node.info["output"][output.slot]
        number = len(self.links) + 1
        self.links.append([number, output.node.data["id"], output.slot, SUBGRAPH_OUTPUT, len(self.gives), kind])
        output.node.data["outputs"][output.slot]["links"].append(number)
        self.gives[name] = kind, number

    def _link(self, value: Output | Input, target: dict, slot: int, field: Field) -> int:
        if isinstance(value, Output):
            return super()._link(value, target, slot, field)
        if value.name not in self.takes:
            default = self._values[value.name]
            default = field.default if default is None and field.is_widget else default
            own = field._replace(name=value.name, place=None, required=True)
            self.takes[value.name] = Take(own, default, [])
        take = self.takes[value.name]
        number = len(self.links) + 1
        self.links.append(
            [number, SUBGRAPH_INPUT, list(self._values).index(value.name), target["id"], slot, field.type]
        )
        take.links.append(number)
        return number

    def number_from(self, first: int) -> None:
        """Adds `first` to the numbers of all nodes and links."""
        for node in self.nodes:
            node["id"] += first
            for entry in node["inputs"]:
                entry["link"] = entry["link"] and entry["link"] + first
            for entry in node["outputs"]:
                entry["links"] = [number + first for number in entry["links"]]
        for link in self.links:
            link[0] += first
            link[1] += first * (link[1] > 0)
            link[3] += first * (link[3] > 0)
        for take in self.takes.values():
            take.links[:] = [number + first for number in take.links]
        self.gives = {name: (kind, number + first) for name, (kind, number) in self.gives.items()}

    def definition(self) -> dict:
        """The subgraph as a workflow's file holds it."""
        place(self.columns)
        right = max(node["pos"][0] + node["size"][0] for node in self.nodes) + 100

        def sockets(kind: str, left: float, given: dict[str, tuple[str, list[int]]]) -> list[dict]:
            return [
                {
                    "id": stable_id(f"subgraph/{self.name}/{kind}/{name}"),
                    "name": name,
                    "type": socket,
                    "linkIds": numbers,
                    "pos": [left, 20 * (place + 1)],
                }
                for place, (name, (socket, numbers)) in enumerate(given.items())
            ]

        inputs = {name: (take.field.type, take.links) for name, take in self.sockets().items()}
        outputs = {name: (kind, [number]) for name, (kind, number) in self.gives.items()}
        keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return {
            "id": self.id,
            "version": 1,
            "state": {
                "lastGroupId": 0,
                "lastNodeId": max(node["id"] for node in self.nodes),
                "lastLinkId": max(link[0] for link in self.links),
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.name,
            "inputNode": {"id": SUBGRAPH_INPUT, "bounding": [-220, 0, 120, 40 + 20 * len(inputs)]},
            "outputNode": {"id": SUBGRAPH_OUTPUT, "bounding": [right, 0, 120, 40 + 20 * len(outputs)]},
            "inputs": sockets("input", -120, inputs),
            "outputs": sockets("output", right + 20, outputs),
            "widgets": [],
            "nodes": self.nodes,
            "groups": [],
            "links": [dict(zip(keys, link, strict=True)) for link in self.links],
            "extra": {},
        }


def stable_id(name: str) -> str:
    """The same UUID for the same name."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"conceptloom/{name}"))


def is_next_empty(field: Field, values: dict[str, Any]) -> bool:
    """Whether an unlinked socket is shown: of an Autogrow input, only the first empty one is."""
    family = field.name.rpartition(".")[0] + "."
    return field.place is None or field.place == sum(name.startswith(family) for name in values)
