"""Workflows that keep a picture's structure, or take places from the model's own preview."""

from __future__ import annotations

from workflow_builder import Node, Output, Subgraph, Workflow

from .parts import SHAPELAND_BLOCKS, SIDE, WIDE, Base, along, bank, empty, inverted, places, shapeland_base, show, text


def plug_and_play(flow: Workflow) -> None:
    """A drawn scene in other colors, with its shapes kept and without."""
    flow.note(
        "## START HERE: keep the shapes, change the rest\n"
        "Press **Run**; nothing has to be downloaded. **DDIM Inversion** finds the noise that makes a given picture. "
        "**Plug-and-Play Injection** holds the picture's shapes while it is sampled again with another prompt.\n\n"
        "The row at the end shows the picture, then the other prompt without and with injection.\n\n"
        "**Your own photo**: put **Load Image** in the place of *The picture to start from*, scaled to the size of "
        "your model (512 for SD 1.5), and your checkpoint in the place of **Load Shapeland**. Describe the photo in "
        "**picture_shows**, and write what you want in *What it should show*."
    )
    base = shapeland_base(flow)
    flow.note(
        "### Things to try\n"
        "- another prompt: other colors, another background\n"
        "- **residual_until** and **attention_until**: 0 lets everything go, 1 holds it to the end\n"
        "- the error of the inversion: more **refinements** bring it down"
    )
    described = "a red striped star on a gray background"
    scene = flow.add(
        "ConceptLoomDrawScene", {"description": described, "seed": 3}, column=1, title="The picture to start from"
    )
    target = text(flow, base.clip, "a green star on a navy background", "What it should show", 1)
    negative = text(flow, base.clip, "", "Negative prompt (empty)", 1)
    inversion = inverted(flow, 2, base, described, 25, image=scene[0])
    injected = flow.add(
        "ConceptLoomPlugAndPlayInjection",
        {
            "model": base.model,
            "trajectory": inversion["trajectory"],
            "blocks": SHAPELAND_BLOCKS,
            "attention_until": 0.8,
        },
        column=3,
    )
    given = {"positive": target, "negative": negative, "sigmas": inversion["sigmas"], "latent": inversion["noise"]}
    given["vae"] = base.vae
    pictures = {"picture": scene[0]}
    for name, title, model in (
        ("without", "Without injection", base.model),
        ("with", "With injection", injected[0]),
    ):
        pictures[name] = along(flow, 4, title, model=model, **given)
    show(flow, 5, pictures, "conceptloom/plug_and_play", "Picture, without, with", times=6.0)
    flow.add("PreviewAny", {"source": inversion["error"]}, column=6, title="Error of the inversion", width=WIDE)
    flow.group("Start", 0)
    flow.group("1. Picture and prompts", 1)
    flow.group("2. Inversion and injection", 2, 3)
    flow.group("3. Drawing", 4)
    flow.group("4. Result", 5, 6)


def laid_out(flow: Workflow, column: int, base: Base, positive: Output, negative: Output, latent: Output) -> Node:
    """The first steps of a sampling; outputs `preview`, what the model would draw, the `latent` after them, and the
    `sigmas` of the others."""

    def describe(inner: Subgraph) -> None:
        model = inner.input("model")
        schedule = inner.add(
            "BasicScheduler",
            {"model": model, "scheduler": "normal", "steps": inner.input("steps"), "denoise": 1.0},
        )
        split = inner.add("SplitSigmas", {"sigmas": schedule[0], "step": inner.input("first_steps")}, column=1)
        guider = inner.add(
            "CFGGuider",
            {
                "model": model,
                "positive": inner.input("positive"),
                "negative": inner.input("negative"),
                "cfg": inner.input("cfg", 4.0),
            },
        )
        sampling = inner.add(
            "SamplerCustomAdvanced",
            {
                "noise": inner.add("RandomNoise", {"noise_seed": inner.input("noise_seed")})[0],
                "guider": guider[0],
                "sampler": inner.add("KSamplerSelect", {"sampler_name": "euler"})[0],
                "sigmas": split[0],
                "latent_image": inner.input("latent"),
            },
            column=2,
        )
        decoded = inner.add("VAEDecode", {"samples": sampling["denoised_output"], "vae": inner.input("vae")}, column=3)
        inner.output("preview", decoded[0])
        inner.output("latent", sampling["output"])
        inner.output("sigmas", split[1])

    given = {"model": base.model, "positive": positive, "negative": negative, "latent": latent, "vae": base.vae}
    given |= {"steps": 30, "first_steps": 8, "noise_seed": 1}
    return flow.place(flow.subgraph("Lay the Picture Out", describe), given, column)


def self_template(flow: Workflow) -> None:
    """Places from the model's own early preview: no template picture."""
    flow.note(
        "## START HERE: no template picture\n"
        "Press **Run**; nothing has to be downloaded. The model lays its picture out in the first steps. What it "
        "would draw is decoded after 8 of 30, and **Places of Things** finds the things in it. From there on each "
        "concept is drawn in its own place (the idea of TweedieMix).\n\n"
        "The row at the end shows the preview, then the rest of the steps without and with the concepts. Another "
        "**noise_seed** gives another layout."
    )
    base = shapeland_base(flow)
    prompt = "a star and a fish on a navy background"
    concepts = bank(flow, base, {"star.safetensors": "", "fish.safetensors": ""})
    plain = text(flow, base.clip, prompt, "Plain prompt", 1)
    negative = text(flow, base.clip, "", "Negative prompt (empty)", 1)
    first = laid_out(flow, 2, base, plain, negative, empty(flow, SIDE, 1))
    prompts = flow.add(
        "ConceptLoomConceptPrompts",
        {"clip": base.clip, "concepts": concepts, "prompt": prompt, "negative_prompt": ""},
        column=3,
    )
    place = places(flow, 3, first["preview"], "star, fish")
    fused = flow.add(
        "ConceptLoomMultiConceptFusion",
        {"model": base.model, "prompts": prompts[0], "partition": place["partition"]},
        column=4,
        title="Multi-Concept Fusion",
    )
    given = {"sigmas": first["sigmas"], "latent": first["latent"], "vae": base.vae}
    pictures = {
        "preview": first["preview"],
        "without": along(flow, 5, "Without", model=base.model, positive=plain, negative=negative, **given),
        "with": along(
            flow,
            5,
            "Concepts in their places",
            model=fused["model"],
            positive=fused["positive"],
            negative=fused["negative"],
            **given,
        ),
    }
    show(flow, 6, pictures, "conceptloom/self_template", "Preview, without, with concepts", times=6.0)
    flow.group("Start", 0)
    flow.group("1. Concepts and prompts", 1)
    flow.group("2. Layout and places", 2, 3)
    flow.group("3. Fusion and drawing", 4, 5)
    flow.group("4. Result", 6, 7)


WORKFLOWS = {
    "10_No_template_picture_Concept_Weaver_no_download": self_template,
    "11_Keep_the_shapes_Plug_and_Play_no_download": plug_and_play,
}
