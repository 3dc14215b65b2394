"""Writes the shipped workflows: `python tools/make_workflows.py [--keep-cards] [PART OF A NAME...]`

Every workflow is described by a function that takes a builder (workflow_builder.py shows how) and is listed in
tools/templates under its file name. A template's card shows nothing but the name: number it for its place in the list,
and use letters, digits, dots, hyphens and underscores only, so that it can be part of a link. For each, three files are
written:

    workflows/NAME.json      what a person opens
    workflows/api/NAME.json  what a script posts
    workflows/NAME.jpg       its card: the picture that it saves, with a row's last picture large; where it cannot be
                             run (its weights are absent), the reference pictures it starts from, or a
                             scene of Shapeland, and what it needs; stays as it is with --keep-cards

The subgraphs in BLUEPRINTS, which the node library offers, are written to subgraphs/NAME.json.

With the cards of README_PICTURES, the pictures in README are written too.

Those in FOR_SCRIPTS are for scripts alone: they have one file, workflows/api/operations/NAME.json.

A real server supplies the node schemas, so a description that no longer fits its nodes fails here.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from environment import ROOT, WORK, Problem, choose_host, say
from hostserver import HostServer, PromptError
from PIL import Image, ImageDraw, ImageFont, ImageOps
from run import alias_pack
from templates import BLUEPRINTS, FOR_SCRIPTS, STAND_INS, WORKFLOWS
from workflow_builder import Workflow
from workflow_checks import api_problems, ui_problems
from workflow_format import to_api

FOLDER = ROOT / "workflows"
CARD_SIDE, CARD_GAP, CARD_BANNER, LABEL_SIZE = 400, 8, 56, 20
WIDE = 1.5
"""From this ratio of width to height on, a picture is taken for a row."""
KEEP_CARDS = "--keep-cards"
README_PICTURES = {
    "01": "freecustom",
    "02": "fastcomposer",
    "03": "concept_weaver",
    "05": "composer",
    "09": "profusion",
}
"""Templates, by the beginning of their names, whose pictures README shows: docs/images/NAME.png."""
NEEDS = {"SD15": "needs Stable Diffusion 1.5", "SDXL": "needs SDXL"}
"""Words on the card of a workflow that needs a download, by the end of its name."""
THINGS = ("a house and a star", "a mug and a fish", "a heart and a moon", "a tree and a ball")
"""Shown on such a card where the workflow draws no reference."""


def save_json(file: Path, content: dict) -> None:
    """Writes JSON in the form in which it is committed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_row(image: Image.Image) -> bool:
    """Whether it shows pictures side by side."""
    return image.width >= WIDE * image.height


def save_card(file: Path, picture: bytes, label: str) -> None:
    """Writes the picture of a template's card with a label; small drawn pictures are enlarged without blur. Of a row of
    pictures, the card shows the row and, large below it, its last."""
    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGB")
    if not is_row(image):
        scale = Image.Resampling.NEAREST if max(image.size) < CARD_SIDE else Image.Resampling.LANCZOS
        card = ImageOps.fit(image, (CARD_SIDE, CARD_SIDE), scale)
    else:
        row = image.resize((CARD_SIDE, round(CARD_SIDE * image.height / image.width)), Image.Resampling.LANCZOS)
        side = CARD_SIDE - row.height - CARD_GAP
        last = image.crop((image.width - image.height, 0, *image.size)).resize((side, side), Image.Resampling.LANCZOS)
        card = Image.new("RGB", (CARD_SIDE, CARD_SIDE), "#ffffff")
        card.paste(row, (0, 0))
        card.paste(last, ((CARD_SIDE - side) // 2, row.height + CARD_GAP))
    labeled(card, label).save(file, quality=88)


def labeled(card: Image.Image, label: str) -> Image.Image:
    """A card with a label in its lower left corner: the dialog cuts long names, which end with what is needed."""
    pen, font = ImageDraw.Draw(card), ImageFont.load_default(LABEL_SIZE)
    width = round(pen.textlength(label, font))
    place = (0, card.height - 2 * LABEL_SIZE, width + 2 * LABEL_SIZE, card.height)
    pen.rectangle(place, "#26272b")
    pen.text(((place[0] + place[2]) / 2, (place[1] + place[3]) / 2), label, "#ffffff", font, anchor="mm")
    return card


def drawn_references(name: str, api: dict) -> Image.Image:
    """The reference pictures that a workflow draws, or a scene of its own, side by side on a square card; below it
    says what the workflow needs."""
    alias_pack()
    from conceptloom.shapeland import world

    drawings = [node["inputs"] for node in api.values() if node["class_type"] == "ConceptLoomDrawScene"]
    card = Image.new("RGB", (CARD_SIDE, CARD_SIDE), "#26272b")
    room = CARD_SIDE - CARD_BANNER
    if not drawings:
        number = int(name[:2])
        things = THINGS[number % len(THINGS)]
        drawings = [{"description": f"{things} on a navy background", "seed": number, "identity_seed": number}]
    side = min(room, CARD_SIDE // len(drawings)) - 2 * CARD_GAP
    left = (CARD_SIDE - len(drawings) * (side + 2 * CARD_GAP)) // 2
    for i, given in enumerate(drawings):
        picture, _ = world.draw_description(given["description"], given["seed"], given["identity_seed"], enlarge=4)
        image = Image.fromarray((picture.image * 255).round().astype("uint8")).resize((side, side))
        card.paste(image, (left + CARD_GAP + i * (side + 2 * CARD_GAP), CARD_GAP + (room - side) // 2))
    font = ImageFont.load_default(26)
    place = CARD_SIDE // 2, CARD_SIDE - CARD_BANNER // 2
    ImageDraw.Draw(card).text(place, NEEDS[name.rpartition("_")[2]], "#ffffff", font, anchor="mm")
    return card


def make(server: HostServer, info: dict, name: str, describe: Callable[[Workflow], None], card: bool) -> None:
    """Writes the files of one workflow, including its card if `card`; raises Problem if the workflow is faulty."""
    flow = Workflow(info, name)
    describe(flow)
    ui = flow.ui()
    # Nobody opens what is for scripts, so its layout is free.
    problems = api_problems(to_api(ui, info), info) if name in FOR_SCRIPTS else ui_problems(ui, info)
    if problems:
        raise Problem(f"{name}: {'; '.join(problems)}")
    api = to_api(ui, info)
    if name in FOR_SCRIPTS:
        save_json(FOLDER / "api" / "operations" / f"{name}.json", api)
        say(f"{name}: written")
        return
    save_json(FOLDER / f"{name}.json", ui)
    save_json(FOLDER / "api" / f"{name}.json", api)
    say(f"{name}: written")
    if not card:
        return
    try:
        pictures = server.pictures(server.finish(server.submit(api)))
    except PromptError as error:
        say(f"{name}: it cannot be run here: {error}")
        if not name.endswith("no_download"):
            drawn_references(name, api).save(FOLDER / f"{name}.jpg", quality=88)
    else:
        data = next(picture.data for picture in pictures if picture.saved)
        save_card(FOLDER / f"{name}.jpg", data, NEEDS.get(name.rpartition("_")[2], "no download"))
        if name[:2] in README_PICTURES:
            with Image.open(io.BytesIO(data)) as image:
                # Without the workflow that the host writes into it.
                image.convert("RGB").save(ROOT / "docs" / "images" / f"{README_PICTURES[name[:2]]}.png", optimize=True)


def main(arguments: list[str]) -> None:
    """Writes all workflows, or those whose names contain one of the given parts."""
    parts = [argument for argument in arguments if argument != KEEP_CARDS]
    base = WORK / "make_workflows"
    base.mkdir(parents=True, exist_ok=True)
    host = choose_host(os.environ)
    with HostServer(Path(sys.executable), host.path, base, log=base / "server.log", more_packs=STAND_INS) as server:
        info = server.get("/object_info")
        for name, describe in {**WORKFLOWS, **FOR_SCRIPTS}.items():
            if not parts or any(part.lower() in name.lower() for part in parts):
                make(server, info, name, describe, card=KEEP_CARDS not in arguments)
        for name, blueprint in BLUEPRINTS.items():
            save_json(ROOT / "subgraphs" / f"{name}.json", blueprint(Workflow(info, name)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Problem as problem:
        sys.exit(f"make_workflows.py: {problem}")
