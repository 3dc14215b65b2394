"""Workflows of ProFusion."""

from __future__ import annotations

from workflow_builder import Node, Workflow

from .concept_parts import enlarged, stitched
from .fastcomposer import load
from .freecustom import NEGATIVE, SD15, reference

LORA = "my subject.safetensors"


def sampled(flow: Workflow, guider: Node, sampler, shared: dict, vae, title: str):
    """A picture from a guider and a sampler."""
    made = flow.add("SamplerCustomAdvanced", {"guider": guider[0], "sampler": sampler, **shared}, column=5, title=title)
    return flow.add("VAEDecode", {"samples": made[0], "vae": vae}, column=6)[0]


def schedule(flow: Workflow, model, steps: int, side: int, seed: int) -> dict:
    """What all samplings of a workflow share: noise, sigmas and an empty latent."""
    return {
        "noise": flow.add("RandomNoise", {"noise_seed": seed}, column=4)[0],
        "sigmas": flow.add(
            "BasicScheduler", {"model": model, "scheduler": "ddim_uniform", "steps": steps, "denoise": 1.0}, column=4
        )[0],
        "latent_image": flow.add("EmptyLatentImage", {"width": side, "height": side, "batch_size": 1}, column=4)[0],
    }


def shapeland(flow: Workflow) -> None:
    """Two drawn subjects by plain guidance and by fusion sampling, with one seed."""
    base, parts = load(flow)
    flow.note(
        "## Likeness and prompt at once\n"
        "**Fusion Guider** moves towards the text and towards the subject, each at a scale of its own. **Fusion "
        "Sampler** draws the subject in before each step and renews a part of the noise, so that the picture can move "
        "to where both agree.\n\n"
        "Press **Run**. The subjects come from FastComposer here. An embedding, a LoRA or an IP-Adapter works the same "
        "way.",
        column=0,
    )
    flow.note(
        "### Things to try\n"
        "- `subject_scale`: more is more likeness\n"
        "- `text_scale`: more follows the prompt better\n"
        "- `fusion_steps` 0: guidance alone\n"
        "- `gamma`: lower it if the text is ignored",
        column=0,
    )
    house = reference(flow, "a house on a white background", "house", 12, 64, 1.0)
    star = reference(flow, "a star on a gray background", "star", 5, 64, 1.0)
    encoded = flow.add(
        "ConceptLoomSubjectEncoder",
        {
            "clip_vision": parts["CLIP_VISION"],
            "subjects": [house[1][0], star[1][0]],
            "background": "noise",
            "crop": True,
        },
        column=3,
    )
    fused = flow.add(
        "ConceptLoomFuseSubjects",
        {
            "clip": parts["CLIP"],
            "fuser": parts["fuser"],
            "subjects": [encoded[0]],
            "prompt": "a house @subject and a star @subject on a navy background",
        },
        column=3,
    )
    negative = flow.add(
        "CLIPTextEncode", {"clip": parts["CLIP"], "text": ""}, column=3, title="Negative prompt (empty)"
    )
    shared = schedule(flow, parts["MODEL"], 25, 64, 0)
    plain = flow.add(
        "CFGGuider",
        {"model": parts["MODEL"], "positive": fused["subject"], "negative": negative[0], "cfg": 4.0},
        column=4,
        title="Plain guidance by the subjects",
    )
    guider = flow.add(
        "ConceptLoomFusionGuider",
        {
            "model": parts["MODEL"],
            "text": fused["text_only"],
            "negative": negative[0],
            "subjects": [fused["subject"]],
            "subject_scale": 4.0,
            "text_scale": 3.0,
            "fusion_scale": 4.0,
        },
        column=4,
    )
    euler = flow.add("KSamplerSelect", {"sampler_name": "euler"}, column=4)
    fusion = flow.add("ConceptLoomFusionSampler", {"sampler": euler[0]}, column=4)
    pictures = [
        sampled(flow, plain, euler[0], shared, base["VAE"], "Plain guidance (same seed)"),
        sampled(flow, guider, fusion[0], shared, base["VAE"], "Fusion sampling"),
    ]
    judged = flow.add("ConceptLoomReadPicture", {"image": pictures[-1], "reference": house[0][0]}, column=6)
    flow.add("PreviewAny", {"source": judged[1]}, column=7, title="The judge: how much each thing looks like the house")
    enlarged(
        flow,
        stitched(flow, [house[0][0], star[0][0], *pictures]),
        6.0,
        "References, plain, fusion",
        "conceptloom/profusion",
    )
    enlarged(flow, pictures[-1], 6.0, "Fusion sampling", "conceptloom/profusion")
    flow.group("1. Subjects", [*house, *star])
    flow.group("2. Prompt with the subjects", [encoded, fused, negative])
    flow.group("3. Guidance and sampler", [plain, guider, euler, fusion])


def lora_sd15(flow: Workflow) -> None:
    """A subject of a LoRA that acts on its own conditioning alone."""
    base = flow.add("CheckpointLoaderSimple", {"ckpt_name": SD15["name"]}, column=0, models=[SD15])
    flow.note(
        "## A LoRA that leaves the prompt its say\n"
        "The LoRA acts on one conditioning alone, by a hook. **Fusion Guider** guides towards that subject and towards "
        "the plain text at two scales, and **Fusion Sampler** brings both together. It is meant for a LoRA that has "
        "learnt too much of its training pictures and ignores the prompt.\n\n"
        "Choose your LoRA in **Create Hook LoRA**, write its trigger word into *Prompt with the subject*, and the same "
        "prompt with the plain class word into *Text*.",
        column=0,
    )
    flow.note(
        "### When it does not work\n"
        "- The prompt is ignored: raise `text_scale`, or lower `subject_scale`\n"
        "- The subject is not alike: raise `subject_scale`, then `fusion_scale`\n"
        "- Colours burn: lower all three scales together, or `fusion_steps` 0\n"
        "- Too slow: `start_percent` 0.4 of the sampler, or `reuse_differences` of the guider",
        column=0,
    )
    hooks = flow.add("CreateHookLora", {"lora_name": LORA}, column=1)
    hooked = flow.add("SetClipHooks", {"clip": base["CLIP"], "hooks": hooks[0]}, column=1)
    subject = flow.add(
        "CLIPTextEncode",
        {"clip": hooked[0], "text": "a photo of sks dog as a knight in shining armour, oil painting"},
        column=2,
        title="Prompt with the subject",
    )
    text = flow.add(
        "CLIPTextEncode",
        {"clip": base["CLIP"], "text": "a photo of a dog as a knight in shining armour, oil painting"},
        column=2,
        title="Text",
    )
    negative = flow.add("CLIPTextEncode", {"clip": base["CLIP"], "text": NEGATIVE}, column=2, title="Negative prompt")
    guider = flow.add(
        "ConceptLoomFusionGuider",
        {"model": base["MODEL"], "text": text[0], "negative": negative[0], "subjects": [subject[0]]},
        column=3,
    )
    fusion = flow.add("ConceptLoomFusionSampler", column=3)
    shared = schedule(flow, base["MODEL"], 30, 512, 1)
    picture = sampled(flow, guider, fusion[0], shared, base["VAE"], "Fusion sampling")
    flow.add("SaveImage", {"images": picture, "filename_prefix": "conceptloom/profusion"}, column=7)
    flow.group("1. The subject's LoRA", [hooks, hooked])
    flow.group("2. Prompts", [subject, text, negative])
    flow.group("3. Guidance and sampler", [guider, fusion])


def ipadapter_sd15(flow: Workflow) -> None:
    """A subject that an IP-Adapter sees in one picture."""
    base = flow.add("CheckpointLoaderSimple", {"ckpt_name": SD15["name"]}, column=0, models=[SD15])
    flow.note(
        "## An IP-Adapter that leaves the prompt its say\n"
        "Needs the pack **ComfyUI_IPAdapter_plus** and its models. The adapter acts on the *subject* of **Fusion "
        "Guider** alone, and the plain text is guided towards beside it, at a scale of its own. **Fusion Sampler** "
        "brings both together.\n\n"
        "The picture is drawn here; replace **Draw Scene** by **Load Image** with yours. A photo of a person needs "
        "that person's consent.",
        column=0,
    )
    flow.note(
        "### When it does not work\n"
        "- The prompt is ignored: raise `text_scale`, or lower `subject_scale`\n"
        "- The subject is not alike: raise `subject_scale`, then `weight` of **IPAdapter**\n"
        "- Colours burn: lower all three scales together, or `fusion_steps` 0\n"
        "- Two subjects: a second **IPAdapter** with its `attn_mask`, on the same model",
        column=0,
    )
    drawn = {"description": "a red striped ball on a white background", "seed": 3, "identity_seed": 2, "size": 512}
    photo = flow.add("ConceptLoomDrawScene", drawn, column=1, title="Picture of the subject")
    loader = flow.add("IPAdapterUnifiedLoader", {"model": base["MODEL"], "preset": "PLUS (high strength)"}, column=1)
    adapted = flow.add(
        "IPAdapter",
        {"model": loader["model"], "ipadapter": loader["ipadapter"], "image": photo[0], "weight": 0.8},
        column=2,
    )
    text = flow.add(
        "CLIPTextEncode", {"clip": base["CLIP"], "text": "a photo of a ball on a beach"}, column=2, title="Prompt"
    )
    negative = flow.add("CLIPTextEncode", {"clip": base["CLIP"], "text": NEGATIVE}, column=2, title="Negative prompt")
    guider = flow.add(
        "ConceptLoomFusionGuider",
        {"model": adapted[0], "text": text[0], "negative": negative[0], "subjects": [text[0]]},
        column=3,
    )
    fusion = flow.add("ConceptLoomFusionSampler", column=3)
    shared = schedule(flow, adapted[0], 30, 512, 1)
    picture = sampled(flow, guider, fusion[0], shared, base["VAE"], "Fusion sampling")
    flow.add("SaveImage", {"images": picture, "filename_prefix": "conceptloom/profusion"}, column=7)
    flow.group("1. The subject's IP-Adapter", [photo, loader, adapted])
    flow.group("2. Prompts", [text, negative])
    flow.group("3. Guidance and sampler", [guider, fusion])


WORKFLOWS = {
    "profusion_fastcomposer_shapeland": shapeland,
    "profusion_ipadapter_sd15": ipadapter_sd15,
    "profusion_lora_sd15": lora_sd15,
}
