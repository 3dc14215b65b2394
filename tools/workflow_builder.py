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
and in each column below one another, in the order in which they are added.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from schema import AUTOGROW, DYNAMIC_COMBO, Field, fields, grown, live_fields, option_fields
from workflow_format import NOTE, PREVIEW_HEIGHT, TITLE_HEIGHT, shows_picture, stored_after, types_fit

ROW_HEIGHT = 24
TEXT_HEIGHT = 120
GAP = 40
GROUP_PADDING = 20


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


class Workflow:
    """A workflow under construction; `info` is the server's `/object_info`."""

    def __init__(self, info: dict[str, dict], name: str) -> None:
        self.info, self.name = info, name
        self.nodes: list[dict] = []
        self.links: list[list] = []
        self.groups: list[dict] = []
        self.columns: dict[int, list[dict]] = {}

    def add(
        self,
        kind: str,
        inputs: dict[str, Any] | None = None,
        column: int = 0,
        title: str | None = None,
        width: int = 320,
        models: Sequence[dict] = (),
    ) -> Node:
        """Adds a node; raises ValueError if the node or an input is unknown. `models` are {name, url, directory} of the
        files that a loader needs."""
        if kind not in self.info:
            raise ValueError(f"The host has no node {kind}")
        info = self.info[kind]
        values = self._flat(kind, info, inputs or {})
        origin, _, pack = str(info["python_module"]).partition(".")
        data = {
            "id": len(self.nodes) + 1,
            "type": kind,
            "pos": [0, 0],
            "size": [width, 0],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [
                {"name": name, "type": kind, "links": [], "slot_index": slot}
                for slot, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
            ],
            "properties": {
                "Node name for S&R": kind,
                "cnr_id": pack if origin == "custom_nodes" else "comfy-core",
                **({"models": list(models)} if models else {}),
            },
            "widgets_values": [],
        }
        if title:
            data["title"] = title
        self.nodes.append(data)
        height = 0
        for field in live_fields(info, values):
            height += self._add_input(data, field, values)
        height += max(len(info["output"]) - sum("widget" not in entry for entry in data["inputs"]), 0) * ROW_HEIGHT
        data["size"][1] = height + GROUP_PADDING + (PREVIEW_HEIGHT if shows_picture(info) else 0)
        self.columns.setdefault(column, []).append(data)
        return Node(data, info)

    def note(self, text: str, column: int = 0, width: int = 320) -> Node:
        """Adds a note in Markdown. It gets no colour of its own: that would be unreadable in one of the themes."""
        lines = sum(1 + len(line) * 8 // width for line in text.splitlines())
        data = {
            "id": len(self.nodes) + 1,
            "type": NOTE,
            "pos": [0, 0],
            "size": [width, 60 + 22 * lines],
            "flags": {},
            "order": len(self.nodes),
            "mode": 0,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [text],
        }
        self.nodes.append(data)
        self.columns.setdefault(column, []).append(data)
        return Node(data, {"output_name": []})

    def group(self, title: str, members: Sequence[Node], color: str = "#3f789e") -> None:
        """Draws a titled frame around nodes."""
        self.groups.append({"title": title, "members": [node.data for node in members], "color": color})

    def group_columns(self, title: str, *columns: int) -> None:
        """Draws a titled frame around everything in some columns."""
        self.group(title, [Node(data, self.info[data["type"]]) for column in columns for data in self.columns[column]])

    def ui(self) -> dict:
        """The finished workflow in UI format."""
        self._place()
        groups = [
            {
                "id": index + 1,
                "title": group["title"],
                "bounding": frame(group["members"]),
                "color": group["color"],
                "font_size": 24,
                "flags": {},
            }
            for index, group in enumerate(self.groups)
        ]
        return {
            # The same description always gives the same file.
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"conceptloom/{self.name}")),
            "revision": 0,
            "last_node_id": len(self.nodes),
            "last_link_id": len(self.links),
            "nodes": self.nodes,
            "links": self.links,
            "groups": groups,
            "config": {},
            "extra": {"ds": {"scale": 0.8, "offset": [60, 120]}},
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

    def _add_input(self, data: dict, field: Field, values: dict[str, Any]) -> int:
        """Adds a field as socket, widget or both, and returns its height."""
        value = values.get(field.name)
        linked = isinstance(value, Output)
        if not field.is_widget and not linked:
            if field.required:
                raise ValueError(f"{data['type']}.{field.name} needs a link")
            if not is_next_empty(field, values):
                return 0
        if linked or not field.is_widget:
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
            data["widgets_values"] += [field.default if linked or field.name not in values else value]
            data["widgets_values"] += stored_after(field)
            return TEXT_HEIGHT if field.options.get("multiline") else ROW_HEIGHT * (1 + len(stored_after(field)))
        return ROW_HEIGHT

    def _link(self, output: Output, target: dict, slot: int, field: Field) -> int:
        """Links an output to an input and returns the link's id."""
        kind = output.node.info["output"][output.slot]
        if not types_fit(kind, field.type):
            raise ValueError(
                f"{target['type']}.{field.name} takes {field.type}, not the {kind} of {output.node.data['type']}"
            )
        number = len(self.links) + 1
        self.links.append([number, output.node.data["id"], output.slot, target["id"], slot, kind])
        output.node.data["outputs"][output.slot]["links"].append(number)
        return number

    def _place(self) -> None:
        """Puts every column to the right of the one before, and every node below the one above it."""
        left = 0
        for column in sorted(self.columns):
            top = 0
            for node in self.columns[column]:
                node["pos"] = [left, top + TITLE_HEIGHT]
                top += TITLE_HEIGHT + node["size"][1] + GAP
            # Room for the frames of two neighbouring groups.
            left += max(node["size"][0] for node in self.columns[column]) + GAP + 2 * GROUP_PADDING


def is_next_empty(field: Field, values: dict[str, Any]) -> bool:
    """Whether an unlinked socket is shown: of an Autogrow input, only the first empty one is."""
    family = field.name.rpartition(".")[0] + "."
    return field.place is None or field.place == sum(name.startswith(family) for name in values)


def frame(members: Sequence[dict]) -> list[float]:
    """The rectangle [x, y, width, height] around nodes, with room for the group's title."""
    left = min(node["pos"][0] for node in members) - GROUP_PADDING
    top = min(node["pos"][1] for node in members) - TITLE_HEIGHT - GROUP_PADDING - 30
    right = max(node["pos"][0] + node["size"][0] for node in members) + GROUP_PADDING
    bottom = max(node["pos"][1] + node["size"][1] for node in members) + GROUP_PADDING
    return [left, top, right - left, bottom - top]
