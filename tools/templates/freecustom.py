"""Workflows of FreeCustom."""

from __future__ import annotations

from functools import partial

from workflow_builder import Node, Workflow

NEGATIVE = "lowres, bad anatomy, text, error, cropped, worst quality, low quality, jpeg artifacts, blurry"
SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors",
    "directory": "checkpoints",
}
SDXL = {
    "name": "sd_xl_base_1.0.safetensors",
    "url": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    "directory": "checkpoints",
}


def reference(flow: Workflow, description: str, noun: str, identity: int, size: int, weight: float) -> list[Node]:
    """A drawn reference picture and the subject made of it."""
    drawing = flow.add(
        "ConceptLoomDrawScene",
        {"description": description, "seed": 3, "identity_seed": identity, "size": size},
        column=1,
        title=f"Reference: {noun}",
    )
    subject = flow.add(
        "ConceptLoomReferenceSubject",
        {"image": drawing[0], "mask": drawing[1], "noun": noun, "prompt": description, "weight": weight},
        column=2,
    )
    return [drawing, subject]


def shapeland(flow: Workflow) -> None:
    """Two drawn subjects, the same seed without them, where their attention went, and what the judge says."""
    loader = flow.add("ConceptLoomLoadShapeland", column=0)
    model, clip, vae = loader[0], loader[1], loader[2]
    flow.note(
        "## Two subjects, one picture\n"
        "Each **Reference Subject** shows one thing with its own colours and pattern. **Multi-Reference "
        "Self-Attention** lets the new picture look at both while it is drawn.\n\n"
        "Press **Run**. Above: the two things of the references, together. Below: the same prompt and seed without "
        "references.",
        column=0,
    )
    flow.note(
        "### Things to try\n"
        "- another `identity_seed` in a reference: the picture follows\n"
        "- `weight` of a subject: 0 switches it off\n"
        "- a new sampler seed: the reference passes come from the bank, so it is faster\n"
        "- `weight` 3, right for Stable Diffusion: it drowns pictures as small as these, so 1 is used here\n"
        "- `blocks`: the last stage alone keeps more of the prompt, all blocks copy more",
        column=0,
    )
    heart = reference(flow, "a heart on a white background", "heart", 30, 64, 1.0)
    star = reference(flow, "a star on a gray background", "star", 8, 64, 1.0)
    patched = flow.add(
        "ConceptLoomMultiReferenceSelfAttention",
        {
            "model": model,
            "clip": clip,
            "vae": vae,
            "subjects": [heart[1][0], star[1][0]],
        },
        column=3,
    )
    record = flow.add("ConceptLoomRecordAttentionShare", {"model": patched[0]}, column=3)
    positive = flow.add(
        "CLIPTextEncode", {"clip": clip, "text": "a heart and a star on a navy background"}, column=3, title="Prompt"
    )
    negative = flow.add("CLIPTextEncode", {"clip": clip, "text": ""}, column=3, title="Negative prompt (empty)")
    latent = flow.add("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}, column=3)
    settings = {
        "positive": positive[0],
        "negative": negative[0],
        "latent_image": latent[0],
        "seed": 0,
        "steps": 25,
        "cfg": 4.0,
        "sampler_name": "dpmpp_2m",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    with_subjects = flow.add("KSampler", {"model": record[0], **settings}, column=4, title="With the subjects")
    without = flow.add("KSampler", {"model": model, **settings}, column=4, title="Without (same seed)")
    shown = {}
    for name, sampled in (("plain", without), ("subjects", with_subjects)):
        shown[name] = flow.add("VAEDecode", {"samples": sampled[0], "vae": vae}, column=5)
    shares = flow.add(
        "ConceptLoomAttentionShare",
        {"record": record[1], "latent": with_subjects[0], "image": shown["subjects"][0]},
        column=5,
    )
    judged = flow.add("ConceptLoomReadPicture", {"image": shown["subjects"][0], "reference": heart[0][0]}, column=5)
    flow.add("PreviewAny", {"source": judged[1]}, column=6, title="The judge: how much each thing looks like the heart")
    row = heart[0][0]
    for image in (star[0][0], shown["plain"][0], shown["subjects"][0]):
        row = flow.add(
            "ImageStitch",
            {"image1": row, "image2": image, "direction": "right", "match_image_size": True, "spacing_width": 4},
            column=6,
        )[0]
    for title, kind, image in (
        ("Attention share: heart, star", "PreviewImage", shares[0]),
        ("References, without, with", "SaveImage", row),
        ("With the subjects", "SaveImage", shown["subjects"][0]),
    ):
        larger = flow.add(
            "ImageScaleBy", {"image": image, "upscale_method": "nearest-exact", "scale_by": 6.0}, column=7
        )
        inputs = {"images": larger[0]}
        if kind == "SaveImage":
            inputs["filename_prefix"] = "conceptloom/freecustom"
        flow.add(kind, inputs, column=8, title=title)
    flow.group("1. Subjects", [*heart, *star])
    flow.group("2. Model and prompt", [patched, record, positive, negative, latent])


def stable_diffusion(flow: Workflow, file: dict, size: int, steps: int, cfg: float) -> None:
    """Two subjects on a downloaded checkpoint."""
    loader = flow.add("CheckpointLoaderSimple", {"ckpt_name": file["name"]}, column=0, models=[file])
    model, clip, vae = loader[0], loader[1], loader[2]
    flow.note(
        "## Your own subjects\n"
        "The two references are drawn here so that the workflow runs at once. To use photos, replace **Draw Scene** "
        "by **Load Image**, paint the subject in its mask editor, and connect image and mask.\n\n"
        "References work best when they show the thing in use: a hat that is worn, a cup that is held. **Concept "
        "Collage** pastes a subject into such a picture.",
        column=0,
    )
    flow.note(
        "### When it does not work\n"
        "- The subject is weak: raise its `weight` (3 to 4), and describe its whole reference in `prompt`\n"
        "- The picture falls apart: lower the weights, or end at 0.7\n"
        "- Subjects mix: give each a `target_mask`\n"
        "- Then try other seeds: a new one costs hardly more than without references",
        column=0,
    )
    ball = reference(flow, "a red striped ball on a white background", "ball", 2, size, 3.0)
    star = reference(flow, "a star on a gray background", "star", 5, size, 3.0)
    patched = flow.add(
        "ConceptLoomMultiReferenceSelfAttention",
        {"model": model, "clip": clip, "vae": vae, "subjects": [ball[1][0], star[1][0]]},
        column=3,
    )
    positive = flow.add(
        "CLIPTextEncode",
        {"clip": clip, "text": "a photo of a ball and a star on a wooden table, soft light"},
        column=3,
        title="Prompt",
    )
    negative = flow.add("CLIPTextEncode", {"clip": clip, "text": NEGATIVE}, column=3, title="Negative prompt")
    latent = flow.add("EmptyLatentImage", {"width": size, "height": size, "batch_size": 1}, column=3)
    sampled = flow.add(
        "KSampler",
        {
            "model": patched[0],
            "positive": positive[0],
            "negative": negative[0],
            "latent_image": latent[0],
            "seed": 2,
            "steps": steps,
            "cfg": cfg,
            "sampler_name": "ddim",
            "scheduler": "ddim_uniform",
            "denoise": 1.0,
        },
        column=4,
    )
    decoded = flow.add("VAEDecode", {"samples": sampled[0], "vae": vae}, column=5)
    flow.add("SaveImage", {"images": decoded[0], "filename_prefix": "conceptloom/freecustom"}, column=6)
    flow.group("1. Subjects", [*ball, *star])
    flow.group("2. Model and prompt", [patched, positive, negative, latent])


WORKFLOWS = {
    "freecustom_shapeland": shapeland,
    "freecustom_sd15": partial(stable_diffusion, file=SD15, size=512, steps=50, cfg=7.5),
    "freecustom_sdxl": partial(stable_diffusion, file=SDXL, size=1024, steps=30, cfg=6.0),
}
