"""Workflows of Composer."""

from __future__ import annotations

from workflow_builder import Subgraph, Workflow

from .composer_operations import OPERATIONS, REFINEMENT, compositional_generation, style_transfer, translation, try_on
from .parts import NEGATIVE, SD15, checkpoint, empty, sampled, text

SCRIBBLE = {
    "name": "control_v11p_sd15_scribble_fp16.safetensors",
    "url": "https://huggingface.co/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_scribble_fp16.safetensors",
    "directory": "controlnet",
}
DEPTH = {
    "name": "control_v11f1p_sd15_depth_fp16.safetensors",
    "url": "https://huggingface.co/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11f1p_sd15_depth_fp16.safetensors",
    "directory": "controlnet",
}
SIDE = 512


def controlnets_sd15(flow: Workflow) -> None:
    """The sketch of one picture and the depth of another, by two ControlNets."""
    flow.note(
        "## START HERE: the lines of one picture, the space of another\n"
        "Needs the checkpoint and the two ControlNets named in the loaders. **Sketch and Depth** takes each picture "
        "apart and puts the sketch of the first and the depth of the second together; **Apply Representation** gives "
        "each to its ControlNet.\n\n"
        "**Your own photos**: put **Load Image** in the place of each drawn picture, and take the depth from any "
        "depth node."
    )
    base = checkpoint(flow, SD15)
    flow.note(
        "### Things to try\n"
        "- `strength` and `end_percent` of **Sketch and Depth**: less of the sketch, or only at the beginning\n"
        "- inside of it, `method` canny in a **Sketch** before **Decompose Image**, or `take_palette` with a color "
        "adapter in a third **Apply Representation**"
    )
    scenes = (
        ("a house and a star on a white background", 3, 12, "Your photo: lines"),
        ("a mug and a fish on a gray background", 8, 5, "Your photo: depth"),
    )
    lines, space = (
        flow.add(
            "ConceptLoomDrawScene",
            {"description": description, "seed": seed, "identity_seed": identity, "size": SIDE},
            column=1,
            title=title,
        )
        for description, seed, identity, title in scenes
    )
    merged = flow.place(
        flow.subgraph("Sketch and Depth", _sketch_and_depth),
        {"lines": lines[0], "space": space[0], "depth": space["depth"]},
        2,
    )
    prompt = "a cottage in a snowy valley at dawn, oil painting"
    sides = (text(flow, base.clip, prompt, "Prompt", 2), text(flow, base.clip, NEGATIVE, "Negative prompt", 2))
    for column, (name, file) in enumerate((("sketch", SCRIBBLE), ("depth", DEPTH)), 3):
        net = flow.add("ControlNetLoader", {"control_net_name": file["name"]}, column=1, models=[file])
        node = flow.add(
            "ConceptLoomApplyRepresentation",
            {
                "positive": sides[0],
                "negative": sides[1],
                "composition": merged[0],
                "control_net": net[0],
                "representation": name,
            },
            column=column,
            title=f"Apply: {name}",
            width=240,
        )
        sides = (node[0], node[1])
    latent = sampled(
        flow,
        5,
        "KSampler",
        model=base.model,
        positive=sides[0],
        negative=sides[1],
        latent_image=empty(flow, SIDE, 4),
        seed=1,
        cfg=7.0,
        sampler_name="euler",
    )
    picture = flow.add("VAEDecode", {"samples": latent, "vae": base.vae}, column=6)
    flow.add("SaveImage", {"images": picture[0], "filename_prefix": "conceptloom/composer"}, column=7)
    flow.group("Model", 0)
    flow.group("1. Pictures and ControlNets", 1)
    flow.group("2. Sketch and depth, prompts", 2, 3, 4)
    flow.group("3. Drawing", 5)
    flow.group("4. Result", 6, 7)


def _sketch_and_depth(inner: Subgraph) -> None:
    """The sketch of a picture and the depth of another, as one composition."""
    nothing = {"take_palette": False, "take_sketch": False, "take_intensity": False}
    first = inner.add("ConceptLoomDecomposeImage", {"image": inner.input("lines"), **nothing, "take_sketch": True})
    second = inner.add(
        "ConceptLoomDecomposeImage", {"image": inner.input("space"), "depth": inner.input("depth"), **nothing}
    )
    picked = inner.add(
        "ConceptLoomPickRepresentations",
        {
            "composition": first[0],
            "sketch": True,
            "strength": inner.input("strength", 0.8),
            "end_percent": inner.input("end_percent", 0.7),
        },
        column=1,
    )
    merged = inner.add("ConceptLoomMergeCompositions", {"composition1": picked[0], "composition2": second[0]}, column=2)
    inner.output("composition", merged[0])


def three_pictures_shapeland(flow: Workflow) -> None:
    """Sketch and depth of one picture, colours of a second, meaning of a third, and a text."""
    flow.note(
        "## START HERE: one picture from three others and a text\n"
        "Press **Run**; nothing has to be downloaded. Each drawn picture is taken apart. The **Keep** "
        "nodes take the lines and the depth of the first, what the second is about, and the colors of the third. They "
        "are merged with the text, and the new picture obeys them all.\n\n"
        "The row at the end shows the three pictures and what became of them."
    )
    flow.note(
        "### Things to try\n"
        "- another thing in a `caption`, or another text\n"
        "- `strength` of a **Keep** node: how much its representations count; 0 leaves them out"
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
        "The row at the end shows both pictures and the first with the other's look. For a picture of your own, draw "
        "the mask in the mask editor of **Load Image**."
    )
    try_on(flow)
    _grouped(flow)


def _grouped(flow: Workflow) -> None:
    flow.group("Model", 0)
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
    "29_Two_ControlNets_Composer_needs_SD15": controlnets_sd15,
    TEMPLATES["compositional_generation"]: three_pictures_shapeland,
    TEMPLATES["translation"]: other_text_shapeland,
    TEMPLATES["style_transfer"]: style_shapeland,
    TEMPLATES["try_on"]: try_on_shapeland,
}
FOR_SCRIPTS = {f"composer_{name}": flow for name, flow in {**OPERATIONS, **REFINEMENT}.items() if name not in TEMPLATES}
