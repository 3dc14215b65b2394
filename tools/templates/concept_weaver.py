"""Workflows of Concept Weaver."""

from __future__ import annotations

from functools import partial

from workflow_builder import Node, Output, Workflow

from .concept_parts import SHAPELAND_BLOCKS, Base, bank, enlarged, places, sample, shapeland_base, stitched
from .freecustom import NEGATIVE, SD15, SDXL

SAM3 = {
    "name": "sam3.1_multiplex_fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/sam3.1/resolve/main/checkpoints/sam3.1_multiplex_fp16.safetensors",
    "directory": "checkpoints",
}


def checkpoint(flow: Workflow, file: dict) -> Base:
    """A checkpoint from models/checkpoints."""
    node = flow.add("CheckpointLoaderSimple", {"ckpt_name": file["name"]}, column=0, models=[file])
    return Base(node["MODEL"], node["CLIP"], node["VAE"])


def sam3(flow: Workflow) -> Node:
    """A segmenter for photographs."""
    loader = flow.add("CheckpointLoaderSimple", {"ckpt_name": SAM3["name"]}, column=0, models=[SAM3], title="SAM3")
    return flow.add(
        "ConceptLoomLoadSegmenter",
        {"kind": "SAM3", "kind.model": loader["MODEL"], "kind.clip": loader["CLIP"]},
        column=1,
    )


def weave(
    flow: Workflow,
    base: Base,
    concepts: Output,
    template: Output,
    partition: Output,
    texts: tuple[str, str],
    steps: int,
    cfg: float,
    fresh: bool = False,
    **injection,
) -> tuple[Node, Output]:
    """Prompts, inversion, injection with the given inputs, fusion and sampling, with fresh noise in the concepts'
    places if `fresh`; returns the prompts and the picture."""
    text, negative = texts
    prompts = flow.add(
        "ConceptLoomConceptPrompts",
        {"clip": base.clip, "concepts": concepts, "prompt": text, "negative_prompt": negative},
        column=3,
    )
    described = flow.add("CLIPTextEncode", {"clip": base.clip, "text": text}, column=3, title="What the template shows")
    inverted = flow.add(
        "ConceptLoomDDIMInversion",
        {"model": base.model, "latent": template, "conditioning": described[0], "steps": steps},
        column=3,
    )
    injected = flow.add(
        "ConceptLoomPlugAndPlayInjection",
        {"model": base.model, "trajectory": inverted["trajectory"], **injection},
        column=3,
    )
    fused = flow.add(
        "ConceptLoomMultiConceptFusion",
        {"model": injected[0], "prompts": prompts[0], "partition": partition},
        column=4,
    )
    members, noise = [prompts, described, inverted, injected, fused], None
    if fresh:
        renewed = flow.add(
            "ConceptLoomRenewNoise", {"noise": inverted["noise"], "partition": partition, "seed": 0}, column=4
        )
        members.append(renewed)
        noise = renewed[0]
    sampled = sample(flow, fused["model"], fused["positive"], fused["negative"], inverted, "All concepts", cfg, noise)
    flow.group("3. Inversion, injection, fusion", members)
    return prompts, flow.add("VAEDecode", {"samples": sampled[0], "vae": base.vae}, column=6)[0]


def shapeland(flow: Workflow) -> None:
    """Three trained identities in the places of a drawn scene."""
    base = shapeland_base(flow)
    flow.note(
        "## Each concept in its place\n"
        "Three concepts were trained on eight small pictures each: a star, a fish and a house whose looks no word "
        "says. The **template** gives the scene; its masks say where each concept goes. **Multi-Concept Fusion** draws "
        "each there with its own weights, in one evaluation of the model for all.\n\n"
        "Press **Run**.",
        column=0,
    )
    flow.note(
        "### Things to try\n"
        "- another `seed` of the template: other places\n"
        "- another `seed` of **Renew Noise**: the same places, the concepts drawn anew; its `strength` 0 leaves the "
        "template's colours in them\n"
        "- `strength` of a concept: 0 is the plain star\n"
        "- `suppression`: how far to move away from what the base model alone would draw\n"
        "- `attention_until`: lower lets the concepts change the shapes\n"
        "- **Train Concept** in place of a **Load Concept**: your own pictures",
        column=0,
    )
    text = "a star and a fish and a house on a navy background"
    loaded, concepts = bank(flow, base, {f"{word}.safetensors": "" for word in ("star", "fish", "house")})
    scene = flow.add(
        "ConceptLoomDrawScene", {"description": text, "seed": 0, "identity_seed": 10}, column=1, title="The template"
    )
    encoded = flow.add("VAEEncode", {"pixels": scene[0], "vae": base.vae}, column=1)
    segmenter = flow.add("ConceptLoomLoadSegmenter", {"kind": "Shapeland judge"}, column=1)
    found = places(flow, segmenter, scene[0], "star, fish, house")
    held = {"attention_until": 1.0, "blocks": SHAPELAND_BLOCKS}
    prompts, picture = weave(flow, base, concepts, encoded[0], found[1][0], (text, ""), 25, 4.0, fresh=True, **held)
    flow.add("PreviewAny", {"source": prompts["texts"]}, column=4, title="What each concept's prompt says")
    looks = [
        flow.add(
            "ConceptLoomDrawScene",
            {"description": f"a {word} on a gray background", "seed": 2, "identity_seed": identity},
            column=5,
            title=f"What the {word} was trained on",
        )
        for word, identity in (("star", 41), ("fish", 42), ("house", 45))
    ]
    row = stitched(flow, [*(node[0] for node in looks), scene[0], picture])
    judged = flow.add("ConceptLoomReadPicture", {"image": picture, "reference": looks[0][0]}, column=6)
    flow.add("PreviewAny", {"source": judged[1]}, column=7, title="The judge: how much each thing looks like the star")
    enlarged(flow, row, 4.0, "Concepts, template, result", "conceptloom/concept_weaver")
    enlarged(flow, picture, 6.0, "All three", "conceptloom/concept_weaver")
    flow.group("1. Concepts", loaded)
    flow.group("2. Template and places", [scene, encoded, segmenter, *found])


def two_loras(flow: Workflow, file: dict, side: int, photo: bool = False) -> None:
    """Two community LoRAs, each in its own place, in a scene that the model draws or a photo shows."""
    base = checkpoint(flow, file)
    scene = "the photo" if photo else "the scene that the model draws first"
    flow.note(
        "## Two LoRAs that do not mix\n"
        "Choose your LoRAs in **Load Concept** and write each one's trigger and class word into `class_word`; the "
        f"prompt names both. **Text to Masks** finds them in {scene}, and each LoRA acts in its own place, in one "
        "evaluation of the model.",
        column=0,
    )
    flow.note(
        "### When it does not work\n"
        "- not alike enough: `strength` up to 1.5, or a lower `residual_until`\n"
        "- the scene is lost: a higher `residual_until`\n"
        "- concepts take the template's colours: **Renew Noise** between **DDIM Inversion** and the sampler\n"
        "- something is not found: another word in `nouns`, or paint a mask and plug it into **Concept Masks**",
        column=0,
    )
    text, words = "a photo of a man and a woman sitting on a bench in a park", ("man", "woman")
    if photo:
        text, words = "a mug and a star on a gray table", ("mug", "star")
        flow.note(
            "## Your own photo\n"
            "The scene is drawn here so that the workflow needs no file. Replace **Draw Scene** by **Load Image**, and "
            "the words `mug` and `star` in the prompt, in `nouns` and in both **Load Concept** by what your photo "
            "shows. The prompt should describe the photo.",
            column=1,
        )
    names = ("loras/first subject.safetensors", "loras/second subject.safetensors")
    loaded, concepts = bank(flow, base, dict(zip(names, words, strict=True)))
    if photo:
        shown = flow.add(
            "ConceptLoomDrawScene",
            {"description": "a mug and a star on a gray background", "seed": 1, "identity_seed": 2, "size": side},
            column=1,
            title="In place of a photo",
        )
        resized = flow.add(
            "ImageScale",
            {"image": shown[0], "upscale_method": "lanczos", "width": side, "height": side, "crop": "center"},
            column=1,
        )
        encoded = flow.add("VAEEncode", {"pixels": resized[0], "vae": base.vae}, column=1)
        image, latent, members = resized[0], encoded[0], [shown, resized, encoded]
    else:
        positive = flow.add("CLIPTextEncode", {"clip": base.clip, "text": text}, column=1, title="The scene")
        below = flow.add("CLIPTextEncode", {"clip": base.clip, "text": NEGATIVE}, column=1, title="Negative prompt")
        empty = flow.add("EmptyLatentImage", {"width": side, "height": side, "batch_size": 1}, column=1)
        drawn = flow.add(
            "KSampler",
            {
                "model": base.model,
                "positive": positive[0],
                "negative": below[0],
                "latent_image": empty[0],
                "seed": 1,
                "steps": 30,
                "cfg": 7.0,
                "sampler_name": "dpmpp_2m",
                "scheduler": "karras",
                "denoise": 1.0,
            },
            column=1,
            title="The template",
        )
        decoded = flow.add("VAEDecode", {"samples": drawn[0], "vae": base.vae}, column=1)
        image, latent, members = decoded[0], drawn[0], [positive, below, empty, drawn, decoded]
    segmenter = sam3(flow)
    found = places(flow, segmenter, image, ", ".join(words))
    _, picture = weave(flow, base, concepts, latent, found[1][0], (text, NEGATIVE), 50, 7.5)
    flow.add("SaveImage", {"images": picture, "filename_prefix": "conceptloom/concept_weaver"}, column=8)
    flow.group("1. Concepts", loaded)
    flow.group("2. Template and places", [*members, segmenter, *found])


WORKFLOWS = {
    "concept_weaver_shapeland": shapeland,
    "concept_weaver_sd15_two_loras": partial(two_loras, file=SD15, side=512),
    "concept_weaver_sdxl": partial(two_loras, file=SDXL, side=1024),
    "photo_template_sd15": partial(two_loras, file=SD15, side=512, photo=True),
}
