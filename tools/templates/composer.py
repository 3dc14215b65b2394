"""Workflows of Composer."""

from __future__ import annotations

from workflow_builder import Workflow

from .composer_operations import OPERATIONS, REFINEMENT, compositional_generation, style_transfer, translation, try_on
from .freecustom import NEGATIVE, SD15

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
    base = flow.add("CheckpointLoaderSimple", {"ckpt_name": SD15["name"]}, column=0, models=[SD15])
    flow.note(
        "## The lines of one picture, the space of another\n"
        "Needs the two ControlNets that are named in the loaders. **Decompose Image** takes each picture apart, "
        "**Merge Compositions** puts the sketch of the first and the depth of the second together, and **Apply "
        "Representation** gives each to its ControlNet.\n\n"
        "The pictures are drawn here. For your own, replace **Draw Scene** by **Load Image**, and take the depth "
        "from any depth node.",
        column=0,
    )
    flow.note(
        "### Things to try\n"
        "- `strength` and `end_percent` of **Pick Representations**: less of the sketch, or only at the beginning\n"
        "- `method` canny in a **Sketch** before **Decompose Image**\n"
        "- `take_palette` in one of them, with a color adapter in a third **Apply Representation**",
        column=0,
    )
    lines = flow.add(
        "ConceptLoomDrawScene",
        {"description": "a house and a star on a white background", "seed": 3, "identity_seed": 12, "size": SIDE},
        column=1,
        title="Picture with the lines",
    )
    space = flow.add(
        "ConceptLoomDrawScene",
        {"description": "a mug and a fish on a gray background", "seed": 8, "identity_seed": 5, "size": SIDE},
        column=1,
        title="Picture with the depth",
    )
    nothing = {"take_palette": False, "take_sketch": False, "take_intensity": False}
    first = flow.add(
        "ConceptLoomDecomposeImage",
        {"image": lines[0], **nothing, "take_sketch": True},
        column=2,
        title="Decompose Image: sketch",
    )
    second = flow.add(
        "ConceptLoomDecomposeImage",
        {"image": space[0], "depth": space["depth"], **nothing},
        column=2,
        title="Decompose Image: depth",
    )
    picked = flow.add(
        "ConceptLoomPickRepresentations",
        {"composition": first[0], "sketch": True, "strength": 0.8, "end_percent": 0.7},
        column=3,
    )
    merged = flow.add("ConceptLoomMergeCompositions", {"composition1": picked[0], "composition2": second[0]}, column=3)
    flow.add("ConceptLoomInspectComposition", {"composition": merged[0]}, column=3)
    prompt = "a cottage in a snowy valley at dawn, oil painting"
    positive = flow.add("CLIPTextEncode", {"clip": base["CLIP"], "text": prompt}, column=4, title="Prompt")
    negative = flow.add("CLIPTextEncode", {"clip": base["CLIP"], "text": NEGATIVE}, column=4, title="Negative prompt")
    sides, applied = (positive[0], negative[0]), []
    for name, file in (("sketch", SCRIBBLE), ("depth", DEPTH)):
        net = flow.add("ControlNetLoader", {"control_net_name": file["name"]}, column=4, models=[file])
        node = flow.add(
            "ConceptLoomApplyRepresentation",
            {
                "positive": sides[0],
                "negative": sides[1],
                "composition": merged[0],
                "control_net": net[0],
                "representation": name,
            },
            column=5,
            title=f"Apply Representation: {name}",
        )
        sides = (node[0], node[1])
        applied += [net, node]
    latent = flow.add("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1}, column=5)
    sampled = flow.add(
        "KSampler",
        {
            "model": base["MODEL"],
            "positive": sides[0],
            "negative": sides[1],
            "latent_image": latent[0],
            "seed": 1,
            "steps": 25,
            "cfg": 7.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
        column=6,
    )
    picture = flow.add("VAEDecode", {"samples": sampled[0], "vae": base["VAE"]}, column=6)
    flow.add("SaveImage", {"images": picture[0], "filename_prefix": "conceptloom/composer"}, column=7)
    flow.group("1. Pictures, taken apart", [lines, space, first, second])
    flow.group("2. A new composition", [picked, merged])
    flow.group("3. Sketch and depth for ControlNets", [positive, negative, *applied])


def three_pictures_shapeland(flow: Workflow) -> None:
    """Sketch and depth of one picture, colours of a second, meaning of a third, and a text."""
    flow.note(
        "## One picture from three others and a text\n"
        "Press **Run**; nothing has to be downloaded. **Decompose Image** takes each picture apart. **Pick "
        "Representations** keeps the lines and the depth of the first, what the second is about, and the colors of the "
        "third, **Merge Compositions** adds the text, and the new picture obeys them all.\n\n"
        "The row at the end shows the three pictures and what became of them."
    )
    flow.note(
        "### Things to try\n"
        "- another thing in the descriptions of **Draw Scene**, or another text\n"
        "- `strength` of **Pick Representations**: how much a representation counts\n"
        "- one **Pick Representations** bypassed (Ctrl+B): what it brought is gone"
    )
    compositional_generation(flow)
    _grouped(flow)


def other_text_shapeland(flow: Workflow) -> None:
    """The layout of a picture with another text."""
    flow.note(
        "## The same layout, another text\n"
        "Press **Run**; nothing has to be downloaded. Lines, things and depth of the picture stay, and the text says "
        "what they look like.\n\n"
        "Change the text in the second **Decompose Image**: colors, a pattern (striped, dotted, checked, ringed) and "
        "the background (white, gray, black, beige, navy, mint)."
    )
    translation(flow)
    _grouped(flow)


def style_shapeland(flow: Workflow) -> None:
    """The shapes of one picture in the look of another."""
    flow.note(
        "## The shapes of one picture, the look of another\n"
        "Press **Run**; nothing has to be downloaded. Lines, things and depth come from the first picture, meaning and "
        "colors from the second. There is no text at all.\n\n"
        "The row at the end shows both pictures and the new one."
    )
    style_transfer(flow)
    _grouped(flow)


def try_on_shapeland(flow: Workflow) -> None:
    """A thing in one picture, drawn anew in the look of another picture's."""
    flow.note(
        "## Only one thing, in the look of another\n"
        "Press **Run**; nothing has to be downloaded. **Region Mask** says what is drawn anew: here the mask of the "
        "thing, grown by two pixels. Outside of it every pixel stays.\n\n"
        "For a picture of your own, draw the mask in the mask editor of **Load Image**."
    )
    try_on(flow)
    _grouped(flow)


def _grouped(flow: Workflow) -> None:
    flow.group_columns("1. Pictures", 1)
    flow.group_columns("2. Taken apart", 2)
    flow.group_columns("3. A new composition", 3)
    flow.group_columns("4. Drawn", 4, 5)


TEMPLATES = {
    "compositional_generation": "composer_three_pictures_shapeland",
    "translation": "composer_other_text_shapeland",
    "style_transfer": "composer_style_shapeland",
    "try_on": "composer_try_on_shapeland",
}
"""Operations that are templates, with their names; the others are for scripts."""
WORKFLOWS = {
    "composer_controlnets_sd15": controlnets_sd15,
    TEMPLATES["compositional_generation"]: three_pictures_shapeland,
    TEMPLATES["translation"]: other_text_shapeland,
    TEMPLATES["style_transfer"]: style_shapeland,
    TEMPLATES["try_on"]: try_on_shapeland,
}
FOR_SCRIPTS = {
    f"composer_{name}_shapeland": flow for name, flow in {**OPERATIONS, **REFINEMENT}.items() if name not in TEMPLATES
}
