"""Workflows of Composer on Shapeland."""

from __future__ import annotations

from workflow_builder import Workflow

from .composer_operations import CASCADE, OPERATIONS, compositional_generation, style_transfer, translation, try_on


def three_pictures_shapeland(flow: Workflow) -> None:
    """Sketch and depth of one picture, colors of a second, meaning of a third, and a text."""
    flow.note(
        "## START HERE: one picture from three others and a text\n"
        "Press **Run**; nothing has to be downloaded. Each drawn picture is taken apart. The **Keep** "
        "nodes take the lines and the depth of the first, what the second is about, and the colors of the third. They "
        "are merged with the text, and the new picture follows all of them.\n\n"
        "The row at the end shows the three pictures and what became of them."
    )
    flow.note(
        "### Things to try\n"
        "- another thing in a **caption**, or another text\n"
        "- **strength** of a **Keep** node: how much its representations count; 0 leaves them out"
    )
    compositional_generation(flow)
    _grouped(flow)


def other_text_shapeland(flow: Workflow) -> None:
    """The layout of a picture with another text."""
    flow.note(
        "## START HERE: the same layout, another text\n"
        "Press **Run**; nothing has to be downloaded. Lines, things and depth of the picture stay, and the text says "
        "what they look like.\n\n"
        "Change *The text*: colors, a pattern (striped, dotted, checked, ringed) and the background (white, gray, "
        "black, beige, navy, mint)."
    )
    translation(flow)
    _grouped(flow)


def style_shapeland(flow: Workflow) -> None:
    """The shapes of one picture in the look of another."""
    flow.note(
        "## START HERE: the shapes of one picture, the look of another\n"
        "Press **Run**; nothing has to be downloaded. Lines, things and depth come from the first picture, meaning and "
        "colors from the second. There is no text at all.\n\n"
        "The row at the end shows both pictures and the new one."
    )
    style_transfer(flow)
    _grouped(flow)


def try_on_shapeland(flow: Workflow) -> None:
    """A thing in one picture, drawn anew in the look of another picture's."""
    flow.note(
        "## START HERE: only one thing, in the look of another\n"
        "Press **Run**; nothing has to be downloaded. **Region to Draw Anew** says where: in the mask of the thing, "
        "grown by two pixels. Outside of it every pixel stays.\n\n"
        "The row at the end shows both pictures and the first with the other's look."
    )
    try_on(flow)
    _grouped(flow)


def _grouped(flow: Workflow) -> None:
    flow.group("Start", 0)
    flow.group("1. Pictures, taken apart", 1)
    flow.group("2. A new composition", 2, 3, 4)
    flow.group("3. Drawing", 5)
    flow.group("4. Result", 6, 7)


TEMPLATES = {
    "compositional_generation": "05_Three_pictures_in_one_Composer_no_download",
    "translation": "12_Same_layout_other_text_Composer_no_download",
    "style_transfer": "13_Look_of_another_picture_Composer_no_download",
    "try_on": "14_One_thing_anew_Composer_no_download",
}
"""Operations that are templates, with their names; the others are for scripts."""
WORKFLOWS = {
    TEMPLATES["compositional_generation"]: three_pictures_shapeland,
    TEMPLATES["translation"]: other_text_shapeland,
    TEMPLATES["style_transfer"]: style_shapeland,
    TEMPLATES["try_on"]: try_on_shapeland,
}
FOR_SCRIPTS = {f"composer_{name}": flow for name, flow in {**OPERATIONS, **CASCADE}.items() if name not in TEMPLATES}
