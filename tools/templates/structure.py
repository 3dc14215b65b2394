"""Workflows that keep a picture's structure, or take places from the model's own preview."""

from __future__ import annotations

from workflow_builder import Node, Workflow

from .concept_parts import SHAPELAND_BLOCKS, bank, enlarged, places, sample, shapeland_base, stitched


def prompt(flow: Workflow, clip, text: str, title: str) -> Node:
    """An encoded text."""
    return flow.add("CLIPTextEncode", {"clip": clip, "text": text}, column=2, title=title)


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
        "- `residual_until` and `attention_until`: 0 lets everything go, 1 holds it to the end\n"
        "- the `error` of the inversion: more `refinements` bring it down",
        column=0,
    )
    described = "a red striped star on a gray background"
    scene = flow.add(
        "ConceptLoomDrawScene", {"description": described, "seed": 3}, column=1, title="The picture to start from"
    )
    encoded = flow.add("VAEEncode", {"pixels": scene[0], "vae": base["VAE"]}, column=1)
    source = prompt(flow, base["CLIP"], described, "What the picture shows")
    target = prompt(flow, base["CLIP"], "a green star on a navy background", "What it shall show")
    negative = prompt(flow, base["CLIP"], "", "Negative prompt (empty)")
    inverted = flow.add(
        "ConceptLoomDDIMInversion",
        {"model": base["MODEL"], "latent": encoded[0], "conditioning": source[0], "steps": 25},
        column=3,
    )
    injected = flow.add(
        "ConceptLoomPlugAndPlayInjection",
        {
            "model": base["MODEL"],
            "trajectory": inverted["trajectory"],
            "blocks": SHAPELAND_BLOCKS,
            "attention_until": 0.8,
        },
        column=3,
    )
    pictures = []
    for title, model in (("Without injection", base["MODEL"]), ("With injection", injected[0])):
        sampled = sample(flow, model, target[0], negative[0], inverted, title)
        pictures.append(flow.add("VAEDecode", {"samples": sampled[0], "vae": base["VAE"]}, column=6)[0])
    row = stitched(flow, [scene[0], *pictures])
    flow.add("PreviewAny", {"source": inverted["error"]}, column=6, title="Error of the inversion")
    enlarged(flow, row, 4.0, "Picture, without, with", "conceptloom/plug_and_play")
    enlarged(flow, pictures[-1], 6.0, "With injection", "conceptloom/plug_and_play")
    flow.group("1. Picture and prompts", [scene, encoded, source, target, negative])
    flow.group("2. Inversion and injection", [inverted, injected])


def self_template(flow: Workflow) -> None:
    """Places from the model's own early preview: no template picture."""
    base = shapeland_base(flow)
    flow.note(
        "## No template picture\n"
        "The model lays its picture out in the first steps. What it would draw is decoded after 8 of 30 and "
        "**Text to Masks** finds the things in it; from there on each concept is drawn in its own place (the idea of "
        "TweedieMix).\n\n"
        "Press **Run**. Another `noise_seed` gives another layout.",
        column=0,
    )
    text = "a star and a fish on a navy background"
    loaded, concepts = bank(flow, base, {"star.safetensors": "", "fish.safetensors": ""})
    prompts = flow.add(
        "ConceptLoomConceptPrompts",
        {"clip": base.clip, "concepts": concepts, "prompt": text, "negative_prompt": ""},
        column=1,
    )
    plain = flow.add("CLIPTextEncode", {"clip": base.clip, "text": text}, column=2, title="Plain prompt")
    negative = flow.add("CLIPTextEncode", {"clip": base.clip, "text": ""}, column=2, title="Negative prompt (empty)")
    schedule = flow.add(
        "BasicScheduler", {"model": base.model, "scheduler": "normal", "steps": 30, "denoise": 1.0}, column=1
    )
    split = flow.add("SplitSigmas", {"sigmas": schedule[0], "step": 8}, column=1)
    latent = flow.add("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}, column=1)
    chosen = flow.add("KSamplerSelect", {"sampler_name": "euler"}, column=1)

    def part(model, positive, below, noise: Node, sigmas, start, title: str, column: int) -> Node:
        guider = flow.add(
            "CFGGuider",
            {"model": model, "positive": positive, "negative": below, "cfg": 4.0},
            column=column,
            title=title,
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
            column=column,
            title=title,
        )

    noise = flow.add("RandomNoise", {"noise_seed": 1}, column=1)
    laid_out = part(base.model, plain[0], negative[0], noise, split[0], latent[0], "Layout", 2)
    preview = flow.add(
        "VAEDecode", {"samples": laid_out["denoised_output"], "vae": base.vae}, column=2, title="What it would draw"
    )
    segmenter = flow.add("ConceptLoomLoadSegmenter", {"kind": "Shapeland judge"}, column=1)
    found = places(flow, segmenter, preview[0], "star, fish")
    fused = flow.add(
        "ConceptLoomMultiConceptFusion",
        {"model": base.model, "prompts": prompts[0], "partition": found[1][0]},
        column=3,
    )
    rest = part(
        fused["model"],
        fused["positive"],
        fused["negative"],
        flow.add("DisableNoise", column=3),
        split[1],
        laid_out["output"],
        "Concepts in their places",
        4,
    )
    alone = part(
        base.model,
        plain[0],
        negative[0],
        flow.add("DisableNoise", column=3),
        split[1],
        laid_out["output"],
        "Without",
        4,
    )
    pictures = [preview[0]]
    pictures += [flow.add("VAEDecode", {"samples": n["output"], "vae": base.vae}, column=5)[0] for n in (alone, rest)]
    row = stitched(flow, pictures)
    enlarged(flow, row, 4.0, "Preview, without, with concepts", "conceptloom/self_template")
    enlarged(flow, pictures[-1], 6.0, "With concepts", "conceptloom/self_template")
    flow.group("1. Concepts", loaded)
    flow.group("2. Places from the preview", [segmenter, *found])


WORKFLOWS = {"plug_and_play_shapeland": plug_and_play, "self_template_shapeland": self_template}
