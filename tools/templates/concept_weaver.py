"""Workflows of Concept Weaver."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from workflow_builder import Node, Output, Workflow

from .freecustom import NEGATIVE, SD15, SDXL

SAM3 = {
    "name": "sam3.1_multiplex_fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/sam3.1/resolve/main/checkpoints/sam3.1_multiplex_fp16.safetensors",
    "directory": "checkpoints",
}


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


@dataclass(frozen=True)
class Base:
    """A model's outputs."""

    model: Output
    clip: Output
    vae: Output


def shapeland_base(flow: Workflow) -> Base:
    """The model that ships with the pack."""
    node = flow.add("ConceptLoomLoadShapeland", column=0)
    return Base(node["MODEL"], node["CLIP"], node["VAE"])


def checkpoint(flow: Workflow, file: dict) -> Base:
    """A checkpoint from models/checkpoints."""
    node = flow.add("CheckpointLoaderSimple", {"ckpt_name": file["name"]}, column=0, models=[file])
    return Base(node["MODEL"], node["CLIP"], node["VAE"])


def bank(flow: Workflow, base: Base, files: dict[str, str], column: int = 1) -> tuple[list[Node], Output]:
    """Concepts from files, each with its class word, on one wire."""
    loaded = [
        flow.add(
            "ConceptLoomLoadConcept", {"model": base.model, "file": file, "class_word": word}, column=column, title=file
        )
        for file, word in files.items()
    ]
    together = flow.add("ConceptLoomConceptBank", {"concepts": [node[0] for node in loaded]}, column=column)
    return [*loaded, together], together[0]


def sam3(flow: Workflow) -> Node:
    """What finds things in photographs."""
    loader = flow.add("CheckpointLoaderSimple", {"ckpt_name": SAM3["name"]}, column=0, models=[SAM3], title="SAM3")
    return flow.add(
        "ConceptLoomLoadSegmenter",
        {"kind": "SAM3", "kind.model": loader["MODEL"], "kind.clip": loader["CLIP"]},
        column=1,
    )


def places(flow: Workflow, segmenter: Node, image: Output, nouns: str) -> list[Node]:
    """Masks of the template's things, divided among the concepts."""
    found = flow.add("ConceptLoomTextToMasks", {"segmenter": segmenter[0], "image": image, "nouns": nouns}, column=2)
    divided = flow.add("ConceptLoomConceptMasks", {"masks": [found["masks"]], "image": image}, column=2)
    return [found, divided]


def weave(
    flow: Workflow,
    base: Base,
    concepts: Output,
    template: Output,
    partition: Output,
    texts: tuple[str, str],
    steps: int,
    cfg: float,
) -> tuple[Node, Node, Output]:
    """Prompts, inversion, injection, fusion and sampling; the prompts, the inversion and the picture."""
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
        "ConceptLoomPlugAndPlayInjection", {"model": base.model, "trajectory": inverted["trajectory"]}, column=3
    )
    fused = flow.add(
        "ConceptLoomMultiConceptFusion",
        {"model": injected[0], "prompts": prompts[0], "partition": partition},
        column=4,
    )
    sampled = sample(flow, fused["model"], fused["positive"], fused["negative"], inverted, "All concepts", cfg)
    flow.group("3. Inversion, injection, fusion", [prompts, described, inverted, injected, fused])
    return prompts, inverted, flow.add("VAEDecode", {"samples": sampled[0], "vae": base.vae}, column=6)[0]


def stitched(flow: Workflow, pictures: list[Output]) -> Output:
    """One row of small pictures."""
    row = pictures[0]
    for picture in pictures[1:]:
        row = flow.add(
            "ImageStitch",
            {"image1": row, "image2": picture, "direction": "right", "match_image_size": True, "spacing_width": 4},
            column=6,
        )[0]
    return row


def shapeland(flow: Workflow) -> None:
    """Three trained identities in the places of a drawn scene."""
    base = shapeland_base(flow)
    flow.note(
        "## Each concept in its place\n"
        "Three concepts were trained on four small pictures each: a star, a fish and a house whose looks no word "
        "says. The **template** gives the scene; its masks say where each concept goes. **Multi-Concept Fusion** lets "
        "each answer there with its own weights, in one evaluation of the model for all.\n\n"
        "Press **Run**.",
        column=0,
    )
    flow.note(
        "### Things to try\n"
        "- another `seed` of the template: other places\n"
        "- `strength` of a concept: 0 is the plain star\n"
        "- `suppression`: how far to move away from what the base model alone would draw\n"
        "- `residual_share`: lower lets the concepts change the shapes\n"
        "- **Train Concept** in place of a **Load Concept**: your own pictures",
        column=0,
    )
    text = "a star and a fish and a house on a navy background"
    loaded, concepts = bank(flow, base, {f"{word}.safetensors": "" for word in ("star", "fish", "house")})
    scene = flow.add("ConceptLoomDrawScene", {"description": text, "seed": 11}, column=1, title="The template")
    encoded = flow.add("VAEEncode", {"pixels": scene[0], "vae": base.vae}, column=1)
    segmenter = flow.add("ConceptLoomLoadSegmenter", {"kind": "Shapeland judge"}, column=1)
    found = places(flow, segmenter, scene[0], "star, fish, house")
    prompts, _, picture = weave(flow, base, concepts, encoded[0], found[1][0], (text, ""), 25, 4.0)
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


def train_concept(flow: Workflow) -> None:
    """A concept from three drawn pictures, and a picture of it."""
    base = shapeland_base(flow)
    flow.note(
        "## Teach it a thing\n"
        "**Train Concept** learns one thing from a few pictures: what cross-attention makes of text, and a new word. "
        "The node shows previews while it learns; cancelling leaves the models as they were. 150 steps are few, to be "
        "done in a minute; the default is 400.\n\n"
        "For SD 1.5 replace the loader and the pictures, and set `size` to 512.",
        column=0,
    )
    flow.note(
        "### How to choose\n"
        "- one caption for all pictures, or a line each that says what else they show: that is then not learnt\n"
        "- too little alike: more `steps`. Everything looks like it: fewer, or more `class_pictures`\n"
        "- `rank` 8 to 32 for small files",
        column=0,
    )
    drawn = [
        flow.add(
            "ConceptLoomDrawScene",
            {"description": f"a star on a {ground} background", "seed": seed, "identity_seed": 41},
            column=1,
            title="A picture of it",
        )
        for seed, ground in ((1, "white"), (2, "gray"), (3, "beige"))
    ]
    first = flow.add("ImageBatch", {"image1": drawn[0][0], "image2": drawn[1][0]}, column=1)
    batch = flow.add("ImageBatch", {"image1": first[0], "image2": drawn[2][0]}, column=1)
    trained = flow.add(
        "ConceptLoomTrainConcept",
        {
            "model": base.model,
            "clip": base.clip,
            "vae": base.vae,
            "images": batch[0],
            "class_word": "star",
            "placeholder": "<mine>",
            "captions": "a {} on a white background\na {} on a gray background\na {} on a beige background",
            "steps": 150,
            "class_pictures": 8,
            "size": 64,
            "preview_every": 50,
        },
        column=2,
    )
    saved = flow.add("ConceptLoomSaveConcept", {"concept": trained[0], "filename": "my star", "rank": 8}, column=3)
    everywhere = flow.add("SolidMask", {"value": 1.0, "width": 64, "height": 64}, column=3)
    divided = flow.add("ConceptLoomConceptMasks", {"masks": [everywhere[0]], "dilation": 0.0}, column=3)
    prompts = flow.add(
        "ConceptLoomConceptPrompts",
        {
            "clip": base.clip,
            "concepts": trained[0],
            "prompt": "a star on a navy background",
            "negative_prompt": "",
        },
        column=3,
    )
    fused = flow.add(
        "ConceptLoomMultiConceptFusion",
        {"model": base.model, "prompts": prompts[0], "partition": divided[0], "suppression": 0.0},
        column=4,
    )
    latent = flow.add("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}, column=4)
    pictures = [drawn[0][0]]
    for title, model, positive in (
        ("Any star (same seed)", base.model, fused["positive"]),
        ("The concept", fused["model"], fused["positive"]),
    ):
        sampled = flow.add(
            "KSampler",
            {
                "model": model,
                "positive": positive,
                "negative": fused["negative"],
                "latent_image": latent[0],
                "seed": 3,
                "steps": 25,
                "cfg": 4.0,
                "sampler_name": "dpmpp_2m",
                "scheduler": "normal",
                "denoise": 1.0,
            },
            column=5,
            title=title,
        )
        pictures.append(flow.add("VAEDecode", {"samples": sampled[0], "vae": base.vae}, column=6)[0])
    flow.add("PreviewImage", {"images": trained["loss"]}, column=3, title="Loss")
    enlarged(flow, stitched(flow, pictures), 4.0, "Picture, any star, the concept", "conceptloom/train_concept")
    enlarged(flow, pictures[-1], 6.0, "The concept", "conceptloom/train_concept")
    flow.group("1. Pictures", [*drawn, first, batch])
    flow.group("2. Training", [trained])
    flow.group("3. Drawing it", [saved, everywhere, divided, prompts, fused, latent])


def self_template(flow: Workflow) -> None:
    """Places from the model's own early preview: no template picture."""
    base = shapeland_base(flow)
    flow.note(
        "## No template picture\n"
        "The model lays its picture out in the first steps. What it would draw is decoded after a third of them and "
        "**Text to Masks** finds the things in it; from there on each concept answers in its own place (the idea of "
        "TweedieMix).\n\n"
        "Press **Run**. Another `noise_seed` gives another layout.",
        column=0,
    )
    text = "a star and a fish on a navy background"
    loaded, concepts = bank(flow, base, {"star.safetensors": "", "fish.safetensors": ""})
    prompts = flow.add(
        "ConceptLoomConceptPrompts",
        {"clip": base.clip, "concepts": concepts, "prompt": text, "negative_prompt": ""},
        column=2,
    )
    plain = flow.add("CLIPTextEncode", {"clip": base.clip, "text": text}, column=2, title="Plain prompt")
    negative = flow.add("CLIPTextEncode", {"clip": base.clip, "text": ""}, column=2, title="Negative prompt (empty)")
    schedule = flow.add(
        "BasicScheduler", {"model": base.model, "scheduler": "normal", "steps": 30, "denoise": 1.0}, column=2
    )
    split = flow.add("SplitSigmas", {"sigmas": schedule[0], "step": 12}, column=2)
    latent = flow.add("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}, column=2)
    chosen = flow.add("KSamplerSelect", {"sampler_name": "euler"}, column=2)

    def part(model, positive, below, noise: Node, sigmas, start, title: str) -> Node:
        guider = flow.add(
            "CFGGuider", {"model": model, "positive": positive, "negative": below, "cfg": 4.0}, column=3, title=title
        )
        return flow.add(
            "SamplerCustomAdvanced",
            {
                "noise": noise[0],
                "guider": guider[0],
                "sampler": chosen[0],
                "sigmas": sigmas,
                "latent_image": start,
            },
            column=3,
            title=title,
        )

    noise = flow.add("RandomNoise", {"noise_seed": 6}, column=3)
    laid_out = part(base.model, plain[0], negative[0], noise, split[0], latent[0], "Layout")
    preview = flow.add(
        "VAEDecode", {"samples": laid_out["denoised_output"], "vae": base.vae}, column=4, title="What it would draw"
    )
    segmenter = flow.add("ConceptLoomLoadSegmenter", {"kind": "Shapeland judge"}, column=1)
    found = places(flow, segmenter, preview[0], "star, fish")
    fused = flow.add(
        "ConceptLoomMultiConceptFusion",
        {"model": base.model, "prompts": prompts[0], "partition": found[1][0]},
        column=4,
    )
    rest = part(
        fused["model"],
        fused["positive"],
        fused["negative"],
        flow.add("DisableNoise", column=3),
        split[1],
        laid_out["output"],
        "Concepts in their places",
    )
    alone = part(
        base.model, plain[0], negative[0], flow.add("DisableNoise", column=3), split[1], laid_out["output"], "Without"
    )
    pictures = [preview[0]]
    pictures += [flow.add("VAEDecode", {"samples": n["output"], "vae": base.vae}, column=6)[0] for n in (alone, rest)]
    row = stitched(flow, pictures)
    enlarged(flow, row, 4.0, "Preview, without, with concepts", "conceptloom/self_template")
    enlarged(flow, pictures[-1], 6.0, "With concepts", "conceptloom/self_template")
    flow.group("1. Concepts", loaded)
    flow.group("2. Places from the preview", [segmenter, *found])


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
        "- not alike enough: `strength` up to 1.5, or a lower `residual_share`\n"
        "- the scene is lost: a higher `residual_share`\n"
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
    _, _, picture = weave(flow, base, concepts, latent, found[1][0], (text, NEGATIVE), 50, 7.5)
    flow.add("SaveImage", {"images": picture, "filename_prefix": "conceptloom/concept_weaver"}, column=8)
    flow.group("1. Concepts", loaded)
    flow.group("2. Template and places", [*members, segmenter, *found])


WORKFLOWS = {
    "concept_weaver_shapeland": shapeland,
    "train_concept_shapeland": train_concept,
    "plug_and_play_shapeland": plug_and_play,
    "self_template_shapeland": self_template,
    "concept_weaver_sd15_two_loras": partial(two_loras, file=SD15, side=512),
    "concept_weaver_sdxl": partial(two_loras, file=SDXL, side=1024),
    "photo_template_sd15": partial(two_loras, file=SD15, side=512, photo=True),
}
