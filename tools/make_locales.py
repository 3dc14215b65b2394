"""Writes locales/en: the tooltips that the frontend cannot find in the schema. `python tools/make_locales.py`

The frontend shows no tooltips from the schema for inputs inside an Autogrow or DynamicCombo input; it looks these up in
the locale files, under the dotted name with underscores. All other text is in the schema alone, so that nothing is
written twice.
"""

import json

from environment import ROOT
from schema import all_fields, open_pack

FOLDER = ROOT / "locales" / "en"


def node_texts(info: dict[str, dict]) -> dict[str, dict]:
    """The content of nodeDefs.json; raises ValueError if two different tooltips have the same key."""
    texts = {}
    for name, node in info.items():
        inputs: dict[str, dict] = {}
        for field in all_fields(node):
            if "." not in field.name or not field.options.get("tooltip"):
                continue
            key, text = field.name.replace(".", "_"), {"tooltip": field.options["tooltip"]}
            if inputs.setdefault(key, text) != text:
                raise ValueError(f"{name}: the options of {field.name} give it different tooltips; the locale has one.")
        if inputs:
            texts[name] = {"inputs": inputs}
    return texts


def locale_files(info: dict[str, dict]) -> dict[str, str]:
    """File name and content of everything in locales/en."""
    contents = {
        "nodeDefs.json": node_texts(info),
        # Otherwise the pack's section among the templates would have its directory's name.
        "main.json": {"templateWorkflows": {"category": {"conceptloom": "ConceptLoom"}}},
    }
    return {name: json.dumps(content, indent=1, ensure_ascii=False) + "\n" for name, content in contents.items()}


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in locale_files(open_pack()).items():
        (FOLDER / name).write_text(content, encoding="utf-8")
        print(FOLDER / name)
