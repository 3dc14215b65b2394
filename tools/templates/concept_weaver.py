"""Workflows of Concept Weaver."""

from __future__ import annotations

from functools import partial

from workflow_builder import Node, Output, Subgraph, Workflow

from .parts import (
    NEGATIVE,
    SD15,
    SDXL,
    SHAPELAND_BLOCKS,
    Base,
    along,
    bank,
    checkpoint,
    inverted,
    places,
    shapeland_base,
    show,
)

SAM3 = {
    "name": "sam3.1_multiplex_fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/sam3.1/resolve/main/checkpoints/sam3.1_multiplex_fp16.safetensors",
    "directory": "checkpoints",
}
LOOKS = {
    "star": ("a star on a gray background", 41),
    "fish": ("a fish on a gray background", 42),
    "house": ("a house on a gray background", 45),
}
"""What Shapeland's concepts were trained on."""


def weave(
    flow: Workflow,
    column: int,
    base: Base,
    concepts: Output,
    inversion: Node,
    partition: Output,
    prompt: str,
    negative: str,
    fresh: bool = False,
    cfg: float = 4.0,
    **injection,
) -> Output:
    """A picture: prompts, injection with the given inputs, fusion and sampling in three columns from `column` on, with
    fresh noise in the concepts' places if `fresh`."""
    prompts = flow.add(
        "ConceptLoomConceptPrompts",
        {"clip": base.clip, "concepts": concepts, "prompt": prompt, "negative_prompt": negative},
        column=column,
    )
    injected = flow.add(
        "ConceptLoomPlugAndPlayInjection",
        {"model": base.model, "trajectory": inversion["trajectory"], **injection},
        column=column,
    )
    fused = flow.add(
        "ConceptLoomMultiConceptFusion",
        {"model": injected[0], "prompts": prompts[0], "partition": partition},
        column=column + 1,
        title="Multi-Concept Fusion",
    )
    noise = inversion["noise"]
    if fresh:
        renewed = {"noise": noise, "partition": partition, "seed": 0}
        noise = flow.add("ConceptLoomRenewNoise", renewed, column=column + 1)[0]
    return along(
        flow,
        column + 2,
        "All concepts",
        model=fused["model"],
        positive=fused["positive"],
        negative=fused["negative"],
        sigmas=inversion["sigmas"],
        latent=noise,
        vae=base.vae,
        cfg=cfg,
    )


def shapeland(flow: Workflow) -> None:
    """Three trained identities in the places of a drawn scene."""
    flow.note(
        "## START HERE: each concept in its place\n"
        "Press **Run**; nothing has to be downloaded. Three concepts were trained on eight small pictures each: a "
        "star, a fish and a house, whose looks the prompt does not describe. The **template** gives the scene, and "
        "its things are found by their nouns. **Multi-Concept Fusion** draws each concept there with its own weights, "
        "in one evaluation of the model for all.\n\n"
        "The picture at the end shows what the three were trained on and, below, the template and the result.\n\n"
        "**Your own concepts**: template 06 trains one; for LoRAs see template 24."
    )
    base = shapeland_base(flow)
    flow.note(
        "### Things to try\n"
        "- another **seed** of the template: other places\n"
        "- another **seed** of **Renew Noise**: the concepts drawn anew; its **strength** 0 keeps the template's "
        "colors\n"
        "- **strength** of a concept: 0 is the plain star\n"
        "- **suppression**: how far to move away from what the base model alone would draw\n"
        "- **attention_until**: lower lets the concepts change the shapes"
    )
    prompt = "a star and a fish and a house on a navy background"
    concepts = bank(flow, base, {f"{word}.safetensors": "" for word in LOOKS})
    scene = flow.add(
        "ConceptLoomDrawScene", {"description": prompt, "seed": 0, "identity_seed": 10}, column=1, title="The template"
    )
    place = places(flow, 2, scene[0], ", ".join(LOOKS))
    inversion = inverted(flow, 2, base, prompt, 25, image=scene[0])
    held = {"attention_until": 1.0, "blocks": SHAPELAND_BLOCKS}
    picture = weave(flow, 3, base, concepts, inversion, place["partition"], prompt, "", fresh=True, **held)
    show(
        flow,
        6,
        {"template": scene[0], "result": picture},
        "conceptloom/concept_weaver",
        "Concepts, template, result",
        looks=LOOKS,
    )
    flow.group("Start", 0)
    flow.group("1. Concepts and template", 1)
    flow.group("2. Places, noise and prompts", 2, 3)
    flow.group("3. Fusion and drawing", 4, 5)
    flow.group("4. Result", 6, 7)


def scene_of(flow: Workflow, column: int, base: Base, prompt: str, side: int) -> Node:
    """A scene that the model draws; outputs `latent` and `image`."""

    def describe(inner: Subgraph) -> None:
        model, clip, vae = (inner.input(name) for name in ("model", "clip", "vae"))
        positive = inner.add("CLIPTextEncode", {"clip": clip, "text": inner.input("scene")}, title="The scene")
        below = inner.add("CLIPTextEncode", {"clip": clip, "text": NEGATIVE}, title="Negative prompt")
        size = inner.input("side")
        latent = inner.add("EmptyLatentImage", {"width": size, "height": size, "batch_size": 1})
        drawn = inner.add(
            "KSampler",
            {
                "model": model,
                "positive": positive[0],
                "negative": below[0],
                "latent_image": latent[0],
                "seed": inner.input("seed"),
                "steps": 30,
                "cfg": 7.0,
                "sampler_name": "dpmpp_2m",
                "scheduler": "karras",
                "denoise": 1.0,
            },
            column=1,
        )
        decoded = inner.add("VAEDecode", {"samples": drawn[0], "vae": vae}, column=2)
        inner.output("latent", drawn[0])
        inner.output("image", decoded[0])

    given = {"model": base.model, "clip": base.clip, "vae": base.vae, "scene": prompt, "side": side, "seed": 1}
    return flow.place(flow.subgraph("Draw the Scene", describe), given, column)


def two_loras(flow: Workflow, file: dict, side: int, photo: bool = False) -> None:
    """Two community LoRAs, each in its own place, in a scene that the model draws or a photo shows."""
    where = "your photo" if photo else "the scene that the model draws first"
    swap = (
        "*Your photo* is drawn here so that the workflow needs no file: put **Load Image** in its place, and your "
        "words into the prompts, into `nouns` and into both **Load Concept**. The prompt should describe the photo.\n\n"
    )
    flow.note(
        "## START HERE: two LoRAs that do not mix\n"
        "Needs the two checkpoints named below and two LoRAs of yours. Choose them in **Load Concept** and write each "
        "one's trigger and class word into **class_word** (*ohwx man*), and the same words into the prompt. "
        f"**Places of Things** finds the plain words (*man, woman*) in {where}, and each LoRA acts in its own place, "
        "in one evaluation of the model.\n\n"
        + (swap if photo else "")
        + "A LoRA of a person needs that person's consent.",
        width=290 if photo else 240,
    )
    base, sam = checkpoint(flow, file), checkpoint(flow, SAM3, title="SAM3")
    flow.note(
        "### When it does not work\n"
        "- too little likeness: **strength** up to 1.5, or a lower **residual_until**\n"
        "- the scene is lost: a higher **residual_until**\n"
        "- concepts take on the template's colors: **Renew Noise** before the sampling\n"
        "- something is not found: another word in **nouns**, or a painted mask for **Concept Masks**",
        width=290 if photo else 240,
    )
    prompt, words = "a photo of a man and a woman sitting on a bench in a park", ("man", "woman")
    if photo:
        prompt, words = "a mug and a star on a gray table", ("mug", "star")
    names = ("loras/first subject.safetensors", "loras/second subject.safetensors")
    concepts = bank(flow, base, dict(zip(names, words, strict=True)))
    if photo:
        shown = flow.add(
            "ConceptLoomDrawScene",
            {"description": "a mug and a star on a gray background", "seed": 1, "identity_seed": 2, "size": side},
            column=1,
            title="Your photo",
        )
        resized = flow.add(
            "ImageScale",
            {"image": shown[0], "upscale_method": "lanczos", "width": side, "height": side, "crop": "center"},
            column=2,
        )
        image, source = resized[0], {"image": resized[0]}
    else:
        scene = scene_of(flow, 1, base, prompt, side)
        image, source = scene["image"], {"latent": scene["latent"]}
    start = 3 if photo else 2
    place = places(flow, start, image, ", ".join(words), sam)
    inversion = inverted(flow, start, base, prompt, 50, **source)
    picture = weave(flow, start + 1, base, concepts, inversion, place["partition"], prompt, NEGATIVE, cfg=7.5)
    flow.add("SaveImage", {"images": picture, "filename_prefix": "conceptloom/concept_weaver"}, column=start + 4)
    flow.group("Start", 0)
    flow.group("1. Concepts and scene", *range(1, start))
    flow.group("2. Places, noise and prompts", start, start + 1)
    flow.group("3. Fusion and drawing", start + 2, start + 3)
    flow.group("4. Result", start + 4)


WORKFLOWS = {
    "03_Three_concepts_in_place_Concept_Weaver_no_download": shapeland,
    "24_Two_LoRAs_Concept_Weaver_needs_SD15": partial(two_loras, file=SD15, side=512),
    "25_Two_LoRAs_Concept_Weaver_needs_SDXL": partial(two_loras, file=SDXL, side=1024),
    "26_Two_LoRAs_in_your_photo_Concept_Weaver_needs_SD15": partial(two_loras, file=SD15, side=512, photo=True),
}
