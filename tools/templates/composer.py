"""Workflows of Composer."""

from __future__ import annotations

from workflow_builder import Workflow

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


WORKFLOWS = {"composer_controlnets_sd15": controlnets_sd15}
