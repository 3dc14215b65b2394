"""Workflows of Composer for Stable Diffusion 1.5: representations go to ControlNets, T2I-Adapters and style models."""

from __future__ import annotations

from workflow_builder import Node, Output, Subgraph, Workflow

from .composer_operations import NOTHING_ELSE
from .parts import NEGATIVE, SD15, Base, checkpoint, empty, sampled, text

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
COADAPTERS = {
    kind: {
        "name": f"coadapter-{kind}-sd15v1.pth",
        "url": f"https://huggingface.co/TencentARC/T2I-Adapter/resolve/main/models/coadapter-{kind}-sd15v1.pth",
        "directory": directory,
    }
    for kind, directory in (
        ("sketch", "controlnet"),
        ("color", "controlnet"),
        ("fuser", "controlnet"),
        ("style", "style_models"),
    )
}
CLIP_L = {
    "name": "clip-vit-large-patch14.safetensors",
    "url": "https://huggingface.co/openai/clip-vit-large-patch14/resolve/main/model.safetensors",
    "directory": "clip_vision",
}
RECOLOR = {
    "name": "ioclab_sd15_recolor.safetensors",
    "url": "https://huggingface.co/lllyasviel/sd_control_collection/resolve/main/ioclab_sd15_recolor.safetensors",
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
        "**Your own photos**: put **Load Image** in the place of each *Your photo*, and take the depth from any "
        "depth node."
    )
    base = checkpoint(flow, SD15)
    flow.note(
        "### Things to try\n"
        "- **strength** and **end_percent** of **Sketch and Depth**: less of the sketch, or only at the beginning\n"
        "- inside of it, **method** canny in a **Sketch** before **Decompose Image**, or **take_palette** with a color "
        "adapter in a third **Apply Representation**"
    )
    scenes = (
        ("a house and a star on a white background", 3, 12, "Your photo: lines"),
        ("a mug and a fish on a gray background", 8, 5, "Your photo: depth"),
    )
    lines, space = (_photo(flow, *scene) for scene in scenes)
    merged = flow.place(
        flow.subgraph("Sketch and Depth", _sketch_and_depth),
        {"lines": lines[0], "space": space[0], "depth": space["depth"]},
        2,
    )
    sides = _prompts(flow, base, "a cottage in a snowy valley at dawn, oil painting")
    for column, (name, file) in enumerate((("sketch", SCRIBBLE), ("depth", DEPTH)), 3):
        net = _loaded(flow, "ControlNetLoader", "control_net_name", file, 1)
        node = flow.add(
            "ConceptLoomApplyRepresentation",
            {
                "positive": sides[0],
                "negative": sides[1],
                "composition": merged[0],
                "control_net": net,
                "representation": name,
            },
            column=column,
            title=f"Apply: {name}",
            width=240,
        )
        sides = (node[0], node[1])
    _drawn(flow, base, *sides, 5)


def _sketch_and_depth(inner: Subgraph) -> None:
    """The sketch of a picture and the depth of another, as one composition."""
    first = inner.add("ConceptLoomDecomposeImage", {"image": inner.input("lines"), **NOTHING_ELSE, "take_sketch": True})
    second = inner.add(
        "ConceptLoomDecomposeImage", {"image": inner.input("space"), "depth": inner.input("depth"), **NOTHING_ELSE}
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


def coadapters_sd15(flow: Workflow) -> None:
    """The sketch of one picture with the colors and the style of another, by CoAdapter."""
    flow.note(
        "## START HERE: the lines of one picture, the colors and style of another\n"
        "Needs the checkpoint, the three CoAdapters, their fuser and the vision tower named in the loaders "
        "(clip-vit-large-patch14 is called model.safetensors where it is downloaded: rename it). "
        "**Sketch, Colors and Style** takes the pictures apart; the fuser lets the adapters see one another.\n\n"
        "**Your own photos**: put **Load Image** in the place of the nodes *Your photo*.\n\n"
        "**Try**: **sketch_weight**, **color_weight** and **style_weight**, or another prompt."
    )
    base = checkpoint(flow, SD15)
    lines = _photo(flow, "a house and a tree on a white background", 3, 12, "Your photo: lines")
    look = _photo(flow, "a yellow striped ball and a red star on a navy background", 5, 2, "Your photo: colors, style")
    nets = {
        f"{kind}_adapter": _loaded(flow, "ControlNetLoader", "control_net_name", COADAPTERS[kind], 1)
        for kind in ("sketch", "color")
    }
    vision = _loaded(flow, "CLIPVisionLoader", "clip_name", CLIP_L, 1)
    taken = flow.place(
        flow.subgraph("Sketch, Colors and Style", _sketch_colors_style),
        {"lines": lines[0], "look": look[0], "clip_vision": vision, **nets},
        2,
    )
    sides = _prompts(flow, base, "a cottage in a snowy valley at dawn, oil painting")
    style = _loaded(flow, "StyleModelLoader", "style_model_name", COADAPTERS["style"], 2)
    fuser = _loaded(flow, "ConceptLoomLoadCoAdapterFuser", "file", COADAPTERS["fuser"], 2)
    made = flow.add(
        "ConceptLoomApplyCoAdapter",
        {
            "positive": sides[0],
            "negative": sides[1],
            "fuser": fuser,
            "conditions": [taken["sketch"], taken["color"]],
            "style_model": style,
            "style": taken["style"],
        },
        column=3,
    )
    _drawn(flow, base, made[0], made[1], 4)


def _sketch_colors_style(inner: Subgraph) -> None:
    """Two adapters with their hints, and what the vision tower sees, of two pictures."""
    lines, look = inner.input("lines"), inner.input("look")
    drawn = inner.add("ConceptLoomDecomposeImage", {"image": lines, **NOTHING_ELSE, "take_sketch": True})
    colored = inner.add("ConceptLoomDecomposeImage", {"image": look, **NOTHING_ELSE, "take_palette": True})
    for kind, output, composition in (("sketch", "sketch", drawn), ("color", "palette", colored)):
        hints = inner.add("ConceptLoomCompositionImages", {"composition": composition["composition"]}, column=1)
        condition = inner.add(
            "ConceptLoomCoAdapterCondition",
            {
                "control_net": inner.input(f"{kind}_adapter"),
                "image": hints[output],
                "kind": kind,
                "weight": inner.input(f"{kind}_weight"),
            },
            column=2,
        )
        inner.output(kind, condition[0])
    seen = inner.add("CLIPVisionEncode", {"clip_vision": inner.input("clip_vision"), "image": look}, column=1)
    inner.output("style", seen[0])


def recolor_sd15(flow: Workflow) -> None:
    """A picture in other colors, with its light and shade kept."""
    flow.note(
        "## START HERE: other colors, the same light\n"
        "Needs the checkpoint and the ControlNet named in the loaders. **Decompose Image** takes the picture in gray, "
        "the ControlNet draws it anew in the colors of the prompt, and **Luma Merge** puts these on the lightness of "
        "the original, so that no line moves.\n\n"
        "**Your own photo**: put **Load Image** in the place of *Your photo*. A black and white photo is colored "
        "in the same way.\n\n"
        "**Try**: other colors in the prompt, or a lower **strength** of **Luma Merge**."
    )
    base = checkpoint(flow, SD15)
    photo = _photo(flow, "a house and a star on a white background", 3, 12, "Your photo")
    net = _loaded(flow, "ControlNetLoader", "control_net_name", RECOLOR, 1)
    taken = flow.add("ConceptLoomDecomposeImage", {"image": photo[0], **NOTHING_ELSE, "take_intensity": True}, column=2)
    sides = _prompts(flow, base, "a teal house and a golden star, pastel background, vivid colors")
    given = {"positive": sides[0], "negative": sides[1], "composition": taken[0], "control_net": net}
    node = flow.add(
        "ConceptLoomApplyRepresentation", {**given, "representation": "intensity"}, column=3, title="Apply: intensity"
    )
    picture = _sampled(flow, base, node[0], node[1], 4)
    merged = flow.add("ConceptLoomLumaMerge", {"light": photo[0], "color": picture}, column=6)
    _saved(flow, merged[0], 4, 7)


def between_sd15(flow: Workflow) -> None:
    """Pictures on the way from the look of one picture to that of another."""
    flow.note(
        "## START HERE: from the look of one picture to that of another\n"
        "Needs the checkpoint, the style model and the vision tower named in the loaders "
        "(clip-vit-large-patch14 is called model.safetensors where it is downloaded: rename it). "
        "**Between Two Pictures** mixes what the vision tower sees in both, once for each of the **shares**, and every "
        "mix becomes a picture.\n\n"
        "**Your own photos**: put **Load Image** in the place of the nodes *Your photo*.\n\n"
        "**Try**: **shares** with more steps, the **strength** of **Apply Style Model**, or another prompt."
    )
    base = checkpoint(flow, SD15)
    one = _photo(flow, "a red heart on a white background", 3, 1, "Your photo: at 0")
    two = _photo(flow, "a blue striped ball on a navy background", 4, 2, "Your photo: at 1")
    vision = _loaded(flow, "CLIPVisionLoader", "clip_name", CLIP_L, 1)
    style = _loaded(flow, "StyleModelLoader", "style_model_name", COADAPTERS["style"], 1)
    mixed = flow.place(
        flow.subgraph("Between Two Pictures", _between),
        {"first": one[0], "second": two[0], "clip_vision": vision},
        2,
    )
    sides = _prompts(flow, base, "a still life on a table")
    styled = flow.add(
        "StyleModelApply",
        {"conditioning": sides[0], "style_model": style, "clip_vision_output": mixed[0]},
        column=3,
    )
    _drawn(flow, base, styled[0], sides[1], 4)


def _between(inner: Subgraph) -> None:
    """What a vision tower sees in two pictures, mixed."""
    vision = inner.input("clip_vision")
    seen = [
        inner.add("ConceptLoomDecomposeImage", {"image": inner.input(name), **NOTHING_ELSE, "clip_vision": vision})[0]
        for name in ("first", "second")
    ]
    between = inner.add(
        "ConceptLoomInterpolateCompositions",
        {"composition1": seen[0], "composition2": seen[1], "shares": inner.input("shares", "0, 0.5, 1")},
        column=1,
    )
    semantics = inner.add("ConceptLoomCompositionSemantics", {"composition": between[0]}, column=2)
    inner.output("semantics", semantics[0])


def _photo(flow: Workflow, description: str, seed: int, identity: int, title: str) -> Node:
    """A picture that is drawn in place of a photo; outputs its image and its depth."""
    given = {"description": description, "seed": seed, "identity_seed": identity, "size": SIDE}
    return flow.add("ConceptLoomDrawScene", given, column=1, title=title)


def _loaded(flow: Workflow, kind: str, widget: str, file: dict, column: int) -> Output:
    """What a loader gives of a file that the frontend offers to download."""
    return flow.add(kind, {widget: file["name"]}, column=column, models=[file])[0]


def _prompts(flow: Workflow, base: Base, prompt: str) -> tuple[Output, Output]:
    return text(flow, base.clip, prompt, "Prompt", 2), text(flow, base.clip, NEGATIVE, "Negative prompt", 2)


def _sampled(flow: Workflow, base: Base, positive: Output, negative: Output, column: int) -> Output:
    """A picture, in this column and the next."""
    given = {"model": base.model, "positive": positive, "negative": negative}
    given["latent_image"] = empty(flow, SIDE, column - 1)
    latent = sampled(flow, column, "KSampler", **given, seed=1, cfg=7.0, sampler_name="euler")
    return flow.add("VAEDecode", {"samples": latent, "vae": base.vae}, column=column + 1)[0]


def _saved(flow: Workflow, picture: Output, drawn_in: int, column: int) -> None:
    """Saves the result and puts frames around everything; it was drawn in a column."""
    flow.add("SaveImage", {"images": picture, "filename_prefix": "conceptloom/composer"}, column=column)
    flow.group("Start", 0)
    flow.group("1. Pictures and files", 1)
    flow.group("2. Taken apart, prompts", *range(2, drawn_in))
    flow.group("3. Drawing", drawn_in)
    flow.group("4. Result", *range(drawn_in + 1, column + 1))


def _drawn(flow: Workflow, base: Base, positive: Output, negative: Output, column: int) -> None:
    _saved(flow, _sampled(flow, base, positive, negative, column), column, column + 2)


WORKFLOWS = {
    "29_Two_ControlNets_Composer_needs_SD15": controlnets_sd15,
    "30_Lines_colors_and_style_CoAdapter_needs_SD15": coadapters_sd15,
    "31_Other_colors_Composer_needs_SD15": recolor_sd15,
    "32_Between_two_looks_Composer_needs_SD15": between_sd15,
}
