"""Reads node schemas as `/object_info` returns them, including Autogrow and DynamicCombo inputs.

`python tools/schema.py` freezes the schemas of this pack in tests/schema.json, the contract that saved workflows rely
on. Review the difference before committing it: only appended inputs, new nodes and new options are safe for them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from environment import ROOT, choose_host

SNAPSHOT = ROOT / "tests" / "schema.json"

AUTOGROW = "COMFY_AUTOGROW_V3"
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", DYNAMIC_COMBO}
# Options of an input that the snapshot keeps: those that decide whether an old value is still valid.
FROZEN_OPTIONS = ("default", "min", "max", "step", "multiline", "forceInput", "advanced", "control_after_generate")


class Field(NamedTuple):
    """One input: its name in an API workflow (dotted if nested), type, options, and whether it is required.

    `place` is the index, from 0, of an input inside an Autogrow input; it is None for all other inputs.
    """

    name: str
    type: str
    options: dict[str, Any]
    required: bool
    place: int | None = None

    @property
    def is_widget(self) -> bool:
        """Whether the node shows a control for it, whose value is stored in a UI workflow."""
        return self.type in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def choices(self) -> list | None:
        """The values a combo offers, None for other types."""
        if self.type == DYNAMIC_COMBO:
            return [option["key"] for option in self.options["options"]]
        return self.options.get("options", []) if self.type == "COMBO" else None

    @property
    def default(self) -> Any:
        """The value the frontend gives a new node's widget."""
        if "default" in self.options:
            return self.options["default"]
        if self.choices is not None:
            return self.choices[0] if self.choices else None
        return {"STRING": "", "BOOLEAN": False}.get(self.type, 0)


def fields(inputs: dict[str, dict], prefix: str = "", required: bool = True) -> list[Field]:
    """The inputs of one level, all required ones first, as the frontend orders them."""
    found = []
    for section in ("required", "optional"):
        for name, (kind, *options) in inputs.get(section, {}).items():
            options = dict(options[0]) if options else {}
            if isinstance(kind, list):  # how older nodes declare a combo
                options["options"], kind = kind, "COMBO"
            found.append(Field(prefix + name, kind, options, required and section == "required"))
    return found


def grown(field: Field) -> list[Field]:
    """All inputs that an Autogrow input can grow to."""
    template = field.options["template"]
    names = template.get("names") or [f"{template['prefix']}{index}" for index in range(template["max"])]
    child = fields(template["input"])[0]
    return [
        Field(
            f"{field.name}.{name}",
            child.type,
            child.options,
            required=field.required and child.required and place < template["min"],
            place=place,
        )
        for place, name in enumerate(names)
    ]


def option_fields(field: Field, key: str) -> list[Field]:
    """The inputs that one choice of a DynamicCombo shows; raises ValueError if there is no such choice."""
    for option in field.options["options"]:
        if option["key"] == key:
            return fields(option["inputs"], f"{field.name}.", field.required)
    raise ValueError(f"{field.name} has no option {key!r}: it offers {', '.join(field.choices)}")


def live_fields(info: dict, values: dict[str, Any]) -> list[Field]:
    """The inputs of a node with these values (API names), each Autogrow input replaced by what it grows to."""

    def expand(level: list[Field]) -> Iterator[Field]:
        for field in level:
            if field.type == AUTOGROW:
                yield from grown(field)
                continue
            yield field
            if field.type == DYNAMIC_COMBO:
                yield from expand(option_fields(field, values.get(field.name, field.default)))

    return list(expand(fields(info["input"])))


def all_fields(info: dict) -> list[Field]:
    """Every input that a node can ever have, including the Autogrow and DynamicCombo inputs themselves."""

    def expand(level: list[Field]) -> Iterator[Field]:
        for field in level:
            yield field
            if field.type == AUTOGROW:
                yield from grown(field)
            if field.type == DYNAMIC_COMBO:
                for key in field.choices:
                    yield from expand(option_fields(field, key))

    return list(expand(fields(info["input"])))


def pack_info() -> dict[str, dict]:
    """`/object_info` of this pack's nodes, without a server; the host must be importable."""
    from conceptloom.nodes import NODES

    return {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in NODES}


def open_pack() -> dict[str, dict]:
    """The same for a standalone program: makes pack and host importable first."""
    from run import alias_pack, open_host

    alias_pack()
    open_host(str(choose_host(os.environ).path), cpu=True)
    return pack_info()


def frozen(info: dict[str, dict]) -> dict[str, dict]:
    """What must not change for saved workflows, and what the menu shows."""

    def freeze(field: Field) -> dict:
        result = {"name": field.name, "type": field.type, "required": field.required}
        result |= {name: field.options[name] for name in FROZEN_OPTIONS if name in field.options}
        if field.choices is not None:
            # File names in a combo depend on this machine's disk.
            result["choices"] = [c for c in field.choices if not re.search(r"\.[A-Za-z]\w+$", str(c))]
        return result

    return {
        name: {
            "display_name": node["display_name"],
            "category": node["category"],
            "inputs": [freeze(field) for field in all_fields(node)],
            "outputs": [list(pair) for pair in zip(node["output_name"], node["output"], strict=True)],
        }
        for name, node in sorted(info.items())
    }


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(frozen(open_pack()), indent=1) + "\n", encoding="utf-8")
    print(SNAPSHOT)
