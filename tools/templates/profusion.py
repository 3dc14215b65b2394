"""Workflows of ProFusion."""

from __future__ import annotations

from workflow_builder import Node, Output, Subgraph, Workflow

from .fastcomposer import in_words, load, two_drawn
from .parts import (
    NEGATIVE,
    SD15,
    SHAPELAND,
    SIDE,
    YOUR_PHOTOS,
    Base,
    checkpoint,
    drawn_subject,
    empty,
    shapeland_base,
    show,
    text,
)

LORA = "my subject.safetensors"
SCALES = {"subject_scale": 4.0, "text_scale": 3.0, "fusion_scale": 4.0}
"""For Shapeland; the nodes' own are the published ones."""
SUBJECT = ("a house on a white background", "house", 12)
TARGET = "a house on a navy background"


def schedule(flow: Workflow, model: Output, steps: int, side: int, seed: int, column: int) -> dict[str, Output]:
    """What all samplings of a workflow share: noise, sigmas and an empty latent."""
    return {
        "noise": flow.add("RandomNoise", {"noise_seed": seed}, column=column)[0],
        "sigmas": flow.add(
            "BasicScheduler",
            {"model": model, "scheduler": "ddim_uniform", "steps": steps, "denoise": 1.0},
            column=column,
        )[0],
        "latent_image": empty(flow, side, column),
    }


def fused(flow: Workflow, column: int, title: str, guider: Node, vae: Output, shared: dict[str, Output]) -> Output:
    """A picture by Fusion Sampler from a guider."""

    def describe(inner: Subgraph) -> None:
        sampler = inner.add("ConceptLoomFusionSampler", {"fusion_steps": inner.input("fusion_steps", 1)})
        sampling = inner.add(
            "SamplerCustomAdvanced",
            {
                "guider": inner.input("guider"),
                "sampler": sampler[0],
                **{name: inner.input(name) for name in shared},
            },
            column=1,
        )
        decoded = inner.add("VAEDecode", {"samples": sampling[0], "vae": inner.input("vae")}, column=2)
        inner.output("image", decoded[0])

    given = {"guider": guider[0], "vae": vae, **shared}
    return flow.place(flow.subgraph("Fusion Sampling", describe), given, column, title=title)[0]


def plain(flow: Workflow, column: int, title: str, vae: Output, shared: dict[str, Output], **given: Output) -> Output:
    """A picture by plain guidance with euler; given are model, positive and negative."""

    def describe(inner: Subgraph) -> None:
        names = ("model", "positive", "negative")
        guider = inner.add("CFGGuider", {**{name: inner.input(name) for name in names}, "cfg": inner.input("cfg", 4.0)})
        sampling = inner.add(
            "SamplerCustomAdvanced",
            {
                "guider": guider[0],
                "sampler": inner.add("KSamplerSelect", {"sampler_name": "euler"})[0],
                **{name: inner.input(name) for name in shared},
            },
            column=1,
        )
        decoded = inner.add("VAEDecode", {"samples": sampling[0], "vae": inner.input("vae")}, column=2)
        inner.output("image", decoded[0])

    return flow.place(flow.subgraph("Plain Guidance", describe), {**given, "vae": vae, **shared}, column, title=title)[
        0
    ]


def fastcomposer(flow: Workflow) -> None:
    """Two drawn subjects by plain guidance and by fusion sampling, with one seed."""
    flow.note(
        "## START HERE: likeness and prompt at once\n"
        "Press **Run**; nothing has to be downloaded. **Fusion Guider** moves towards the text and towards the "
        "subjects, each at a scale of its own. **Fusion Sampler** draws the subjects in before each step and renews a "
        "part of the noise, so that the picture can move to where both agree.\n\n"
        "The subjects come from FastComposer here. An embedding, a LoRA or an IP-Adapter works the same way. The "
        "picture at the end shows both references and, below them, the same seed by plain guidance and by fusion "
        "sampling."
    )
    base, parts = load(flow)
    flow.note(
        "### Things to try\n"
        "- **subject_scale**: more is more likeness\n"
        "- **text_scale**: more follows the prompt better\n"
        "- **fusion_steps** 0: guidance alone\n"
        "- **gamma**: lower it if the text is ignored"
    )
    (fish, ball), prompt = two_drawn(flow, ("fish", 14), ("ball", 27))
    words = in_words(flow, 2, parts, [fish["subject"], ball["subject"]], prompt, background="noise", crop=True)
    negative = text(flow, parts["CLIP"], "", "Negative prompt (empty)", 2)
    shared = schedule(flow, parts["MODEL"], 25, SIDE, 0, 3)
    plans = {"plain": ("Plain guidance (same seed)", words["subject"])}
    drawn = ways(flow, 3, base.vae, parts["MODEL"], words, negative, shared, plans)
    pictures = {"fish": fish["image"], "ball": ball["image"], **drawn}
    show(flow, 5, pictures, "conceptloom/profusion", "References, plain, fusion", references=2)
    flow.group("Start", 0)
    flow.group("1. Model and subjects", 1)
    flow.group("2. Prompt and guidance", 2, 3)
    flow.group("3. Drawing", 4)
    flow.group("4. Result", 5, 6)


def promptnet(flow: Workflow) -> None:
    """A word that PromptNet makes of one picture, by plain guidance and by fusion sampling."""
    flow.note(
        "## START HERE: one picture becomes a word of the prompt\n"
        "Press **Run**; nothing has to be downloaded. **PromptNet Encode** turns the picture into a word, anew in "
        "every evaluation of the model, which replaces **house** in the prompt. **Fusion Guider** and **Fusion "
        "Sampler** bring it and the plain text together.\n\n"
        "The row at the end shows the picture, then the same seed by plain text, by plain guidance with the word, and "
        "by fusion sampling.\n\n" + YOUR_PHOTOS
    )
    base = shapeland_base(flow)
    flow.note(
        "### Things to try\n"
        "- change **identity_seed** of the subject: it gets other colors, and so does the new picture\n"
        "- set **update** to *once*: the word is made in the first evaluation alone\n"
        "- **subject_scale** and **text_scale**: likeness against prompt\n"
        "- more likeness: template 07, which fine-tunes PromptNet on the picture"
    )
    house = drawn_subject(flow, *SUBJECT)
    net = flow.add("ConceptLoomLoadPromptNet", {"model": base.model, "file": SHAPELAND}, column=1)
    words = encode(flow, 2, base, net["promptnet"], house["subject"])
    negative = text(flow, base.clip, "", "Negative prompt (empty)", 2)
    shared = schedule(flow, net["MODEL"], 25, SIDE, 0, 3)
    plans = {
        "text": ("Plain text (same seed)", words["text_only"]),
        "plain": ("Plain guidance (same seed)", words["subject"]),
    }
    drawn = ways(flow, 3, base.vae, net["MODEL"], words, negative, shared, plans)
    pictures = {"reference": house["image"], **drawn}
    show(flow, 5, pictures, "conceptloom/promptnet", "Reference, text, plain, fusion", references=1)
    flow.group("Start", 0)
    flow.group("1. Model and subject", 1)
    flow.group("2. Prompt and guidance", 2, 3)
    flow.group("3. Drawing", 4)
    flow.group("4. Result", 5, 6)


def encode(flow: Workflow, column: int, base: Base, net: Output, subject: Output) -> Node:
    """The prompt with PromptNet's word; outputs `text_only` and `subject`."""
    return flow.add(
        "ConceptLoomPromptNetEncode",
        {
            "promptnet": net,
            "clip": base.clip,
            "clip_vision": base.vision,
            "vae": base.vae,
            "subjects": [subject],
            "prompt": TARGET,
        },
        column=column,
    )


def ways(
    flow: Workflow,
    column: int,
    vae: Output,
    model: Output,
    words: Node,
    negative: Output,
    shared: dict[str, Output],
    plans: dict[str, tuple[str, Output]],
) -> dict[str, Output]:
    """The same seed by plain guidance, with a title and a positive conditioning each, and by fusion sampling."""
    guider = flow.add(
        "ConceptLoomFusionGuider",
        {"model": model, "text": words["text_only"], "negative": negative, "subjects": [words["subject"]], **SCALES},
        column=column,
    )
    pictures = {
        name: plain(flow, column + 1, title, vae, shared, model=model, positive=positive, negative=negative)
        for name, (title, positive) in plans.items()
    }
    return {**pictures, "fusion": fused(flow, column + 1, "Fusion sampling", guider, vae, shared)}


def finetune(flow: Workflow) -> None:
    """PromptNet and the model's attention, trained on variants of one picture, before and after."""
    flow.note(
        "## START HERE: one picture, learned in a minute\n"
        "Press **Run**; nothing has to be downloaded. **Augment Subject** makes variants of the subject's only "
        "picture, and **Fine-tune PromptNet** trains 50 steps on them. Its *lora* goes on the model by ComfyUI's own "
        "node.\n\n"
        "The row at the end shows the picture, then the same seed by fusion sampling before and after."
    )
    base = shapeland_base(flow)
    flow.note(
        "### Things to try\n"
        "- **steps** and **learning_rate**: more learns more, and forgets more of the prompt\n"
        "- **rank** 8: a small LoRA\n"
        "- **Save PromptNet** and **Save LoRA Weights** keep what was learned"
    )
    scene = flow.add(
        "ConceptLoomDrawScene",
        {"description": SUBJECT[0], "seed": 3, "identity_seed": SUBJECT[2]},
        column=1,
        title="The picture",
    )
    net = flow.add("ConceptLoomLoadPromptNet", {"model": base.model, "file": SHAPELAND}, column=1)
    variants = flow.add(
        "ConceptLoomAugmentSubject", {"image": scene[0], "mask": scene[1], "count": 16, "size": SIDE}, column=2
    )
    subject = flow.add(
        "ConceptLoomReferenceSubject",
        {"image": scene[0], "mask": scene[1], "noun": SUBJECT[1], "weight": 1.0},
        column=2,
    )
    tuned = flow.add(
        "ConceptLoomFineTunePromptNet",
        {
            "model": net["MODEL"],
            "promptnet": net["promptnet"],
            "clip": base.clip,
            "clip_vision": base.vision,
            "vae": base.vae,
            "images": variants["images"],
            "masks": variants["masks"],
            "captions": "a {}",
            "size": SIDE,
        },
        column=3,
    )
    learned = flow.add(
        "LoraModelLoader",
        {"model": net["MODEL"], "lora": tuned["lora"], "strength_model": 1.0, "bypass": False},
        column=4,
        title="The LoRA on the model",
    )
    negative = text(flow, base.clip, "", "Negative prompt (empty)", 4)
    shared = schedule(flow, net["MODEL"], 25, SIDE, 0, 4)
    pictures = {"reference": scene[0]}
    for name, title, model, promptnet in (
        ("before", "Before", net["MODEL"], net["promptnet"]),
        ("after", "After", learned[0], tuned["promptnet"]),
    ):
        pictures[name] = by_word(flow, 5, title, base, model, promptnet, subject[0], negative, shared)
    show(flow, 6, pictures, "conceptloom/finetune_promptnet", "Picture, before, after", references=1, plain=True)
    flow.group("Start", 0)
    flow.group("1. Picture and variants", 1, 2)
    flow.group("2. Fine-tuning", 3)
    flow.group("3. Drawing", 4, 5)
    flow.group("4. Result", 6, 7)


def by_word(
    flow: Workflow,
    column: int,
    title: str,
    base: Base,
    model: Output,
    promptnet: Output,
    subject: Output,
    negative: Output,
    shared: dict[str, Output],
) -> Output:
    """A picture by fusion sampling with the word of a PromptNet."""

    def describe(inner: Subgraph) -> None:
        model = inner.input("model")
        words = inner.add(
            "ConceptLoomPromptNetEncode",
            {
                **{name: inner.input(name) for name in ("promptnet", "clip", "clip_vision", "vae")},
                "subjects": [inner.input("subject")],
                "prompt": inner.input("prompt"),
            },
        )
        guider = inner.add(
            "ConceptLoomFusionGuider",
            {
                "model": model,
                "text": words["text_only"],
                "negative": inner.input("negative"),
                "subjects": [words["subject"]],
                **{name: inner.input(name, value) for name, value in SCALES.items()},
            },
            column=1,
        )
        sampling = inner.add(
            "SamplerCustomAdvanced",
            {
                "guider": guider[0],
                "sampler": inner.add("ConceptLoomFusionSampler", {}, column=1)[0],
                **{name: inner.input(name) for name in shared},
            },
            column=2,
        )
        decoded = inner.add("VAEDecode", {"samples": sampling[0], "vae": inner.input("vae")}, column=3)
        inner.output("image", decoded[0])

    given = {"model": model, "promptnet": promptnet, "clip": base.clip, "clip_vision": base.vision, "vae": base.vae}
    given |= {"subject": subject, "prompt": TARGET, "negative": negative, **shared}
    return flow.place(flow.subgraph("Fusion Sampling by PromptNet", describe), given, column, title=title)[0]


def lora_sd15(flow: Workflow) -> None:
    """A subject of a LoRA that acts on its own conditioning alone."""
    flow.note(
        "## START HERE: a LoRA that does not override the prompt\n"
        "Needs the checkpoint named below and a LoRA of yours. Choose it in **Create Hook LoRA**, write its trigger "
        "word into *Prompt with the subject*, and the same prompt with the plain class word into *Text*. The LoRA "
        "acts on one conditioning alone. **Fusion Guider** guides towards that subject and towards the plain text at "
        "two scales, and **Fusion Sampler** brings both together.\n\n"
        "It is meant for a LoRA that has learned too much of its training pictures and ignores the prompt."
    )
    base = checkpoint(flow, SD15)
    flow.note(
        "### When it does not work\n"
        "- The prompt is ignored: raise **text_scale**, or lower **subject_scale**\n"
        "- Too little likeness: raise **subject_scale**, then **fusion_scale**\n"
        "- Colors burn: lower all three scales together, or **fusion_steps** 0\n"
        "- Too slow: open *Fusion sampling* and set **start_percent** of **Fusion Sampler** to 0.4, or turn on "
        "**reuse_differences** of **Fusion Guider** (advanced)"
    )
    hooks = flow.add("CreateHookLora", {"lora_name": LORA}, column=1)
    hooked = flow.add("SetClipHooks", {"clip": base.clip, "hooks": hooks[0]}, column=2)
    subject = text(
        flow,
        hooked[0],
        "a photo of sks dog as a knight in shining armor, oil painting",
        "Prompt with the subject",
        3,
    )
    words = text(flow, base.clip, "a photo of a dog as a knight in shining armor, oil painting", "Text", 3)
    negative = text(flow, base.clip, NEGATIVE, "Negative prompt", 3)
    shared = schedule(flow, base.model, 30, 512, 1, 4)
    guider = flow.add(
        "ConceptLoomFusionGuider",
        {"model": base.model, "text": words, "negative": negative, "subjects": [subject]},
        column=4,
    )
    picture = fused(flow, 5, "Fusion sampling", guider, base.vae, shared)
    flow.add("SaveImage", {"images": picture, "filename_prefix": "conceptloom/profusion"}, column=6)
    flow.group("Start", 0)
    flow.group("1. The subject's LoRA", 1, 2)
    flow.group("2. Prompts", 3)
    flow.group("3. Guidance and drawing", 4, 5)
    flow.group("4. Result", 6)


def ipadapter_sd15(flow: Workflow) -> None:
    """A subject that an IP-Adapter sees in one picture."""
    flow.note(
        "## START HERE: an IP-Adapter that does not override the prompt\n"
        "Needs the pack **ComfyUI_IPAdapter_plus** with its models, and the checkpoint named below. The adapter acts "
        "on the *subject* of **Fusion Guider** alone, and the plain text is guided towards beside it, at a scale of "
        "its own. **Fusion Sampler** brings both together.\n\n"
        "**Your own photo**: put **Load Image** in the place of *Your photo*. A photo of a person needs that "
        "person's consent."
    )
    base = checkpoint(flow, SD15)
    flow.note(
        "### When it does not work\n"
        "- The prompt is ignored: raise **text_scale**, or lower **subject_scale**\n"
        "- Too little likeness: raise **subject_scale**, then **weight** of **IPAdapter**\n"
        "- Colors burn: lower all three scales together, or **fusion_steps** 0\n"
        "- Two subjects: a second **IPAdapter** with its **attn_mask**, on the same model"
    )
    drawn = {"description": "a red striped ball on a white background", "seed": 3, "identity_seed": 2, "size": 512}
    photo = flow.add("ConceptLoomDrawScene", drawn, column=1, title="Your photo")
    loader = flow.add("IPAdapterUnifiedLoader", {"model": base.model, "preset": "PLUS (high strength)"}, column=1)
    adapted = flow.add(
        "IPAdapter",
        {"model": loader["model"], "ipadapter": loader["ipadapter"], "image": photo[0], "weight": 0.8},
        column=2,
    )
    words = text(flow, base.clip, "a photo of a ball on a beach", "Prompt", 2)
    negative = text(flow, base.clip, NEGATIVE, "Negative prompt", 2)
    shared = schedule(flow, adapted[0], 30, 512, 1, 3)
    guider = flow.add(
        "ConceptLoomFusionGuider",
        {"model": adapted[0], "text": words, "negative": negative, "subjects": [words]},
        column=3,
    )
    picture = fused(flow, 4, "Fusion sampling", guider, base.vae, shared)
    flow.add("SaveImage", {"images": picture, "filename_prefix": "conceptloom/profusion"}, column=5)
    flow.group("Start", 0)
    flow.group("1. The subject's IP-Adapter", 1, 2)
    flow.group("2. Guidance and drawing", 3, 4)
    flow.group("3. Result", 5)


WORKFLOWS = {
    "04_One_picture_ProFusion_no_download": promptnet,
    "07_Fine_tune_PromptNet_no_download": finetune,
    "09_Likeness_and_prompt_ProFusion_no_download": fastcomposer,
    "27_A_LoRA_and_a_prompt_ProFusion_needs_SD15": lora_sd15,
    "28_An_IP-Adapter_and_a_prompt_ProFusion_needs_SD15": ipadapter_sd15,
}
