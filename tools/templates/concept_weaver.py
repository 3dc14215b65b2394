"""Workflows of Concept Weaver."""

from __future__ import annotations

from workflow_builder import Node, Workflow


def prompt(flow: Workflow, clip, text: str, title: str) -> Node:
    """An encoded text."""
    return flow.add("CLIPTextEncode", {"clip": clip, "text": text}, column=2, title=title)


def sample(flow: Workflow, model, positive, negative, inverted: Node, title: str, cfg: float = 4.0) -> Node:
    """Sampling from an inversion's noise along its schedule, with nothing random added."""
    guider = flow.add(
        "CFGGuider", {"model": model, "positive": positive, "negative": negative, "cfg": cfg}, column=4, title=title
    )
    return flow.add(
        "SamplerCustomAdvanced",
        {
            "noise": flow.add("DisableNoise", column=4)[0],
            "guider": guider[0],
            "sampler": flow.add("KSamplerSelect", {"sampler_name": "euler"}, column=4)[0],
            "sigmas": inverted["SIGMAS"],
            "latent_image": inverted["noise"],
        },
        column=5,
        title=title,
    )


def enlarged(flow: Workflow, image, times: float, title: str, prefix: str) -> None:
    """A small picture, shown large and saved."""
    larger = flow.add("ImageScaleBy", {"image": image, "upscale_method": "nearest-exact", "scale_by": times}, column=7)
    flow.add("SaveImage", {"images": larger[0], "filename_prefix": prefix}, column=8, title=title)


def plug_and_play(flow: Workflow) -> None:
    """A drawn scene in other colours, with its shapes kept and without."""
    base = flow.add("ConceptLoomLoadShapeland", column=0)
    flow.note(
        "## Keep the structure, change the rest\n"
        "**DDIM Inversion** finds the noise that makes a given picture. **Plug-and-Play Injection** holds the "
        "picture's shapes while it is sampled again with another prompt.\n\n"
        "Press **Run**. For a photo of your own, replace **Draw Scene** by **Load Image**, and the model by yours.",
        column=0,
    )
    flow.note(
        "### Things to try\n"
        "- another prompt: other colours, another background\n"
        "- `residual_share` and `attention_share`: 0 lets everything go, 1 holds it to the end\n"
        "- the `error` of the inversion: more `refinements` bring it down",
        column=0,
    )
    described = "a red striped star and a blue mug on a gray background"
    scene = flow.add(
        "ConceptLoomDrawScene", {"description": described, "seed": 4}, column=1, title="The picture to start from"
    )
    encoded = flow.add("VAEEncode", {"pixels": scene[0], "vae": base["VAE"]}, column=1)
    source = prompt(flow, base["CLIP"], described, "What the picture shows")
    target = prompt(flow, base["CLIP"], "a green star and a yellow mug on a navy background", "What it shall show")
    negative = prompt(flow, base["CLIP"], "", "Negative prompt (empty)")
    inverted = flow.add(
        "ConceptLoomDDIMInversion",
        {"model": base["MODEL"], "latent": encoded[0], "conditioning": source[0], "steps": 25},
        column=3,
    )
    injected = flow.add(
        "ConceptLoomPlugAndPlayInjection",
        {"model": base["MODEL"], "trajectory": inverted["trajectory"]},
        column=3,
    )
    row = scene[0]
    pictures = []
    for title, model in (("Without injection", base["MODEL"]), ("With injection", injected[0])):
        sampled = sample(flow, model, target[0], negative[0], inverted, title)
        pictures.append(flow.add("VAEDecode", {"samples": sampled[0], "vae": base["VAE"]}, column=6)[0])
    for picture in pictures:
        row = flow.add(
            "ImageStitch",
            {"image1": row, "image2": picture, "direction": "right", "match_image_size": True, "spacing_width": 4},
            column=6,
        )[0]
    flow.add("PreviewAny", {"source": inverted["error"]}, column=6, title="Error of the inversion")
    enlarged(flow, row, 4.0, "Picture, without, with", "conceptloom/plug_and_play")
    enlarged(flow, pictures[-1], 6.0, "With injection", "conceptloom/plug_and_play")
    flow.group("1. Picture and prompts", [scene, encoded, source, target, negative])
    flow.group("2. Inversion and injection", [inverted, injected])


WORKFLOWS = {"plug_and_play_shapeland": plug_and_play}
