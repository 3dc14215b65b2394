"""Workflows of FreeCustom."""

from __future__ import annotations

from functools import partial

from workflow_builder import Workflow

from .parts import (
    NEGATIVE,
    SD15,
    SDXL,
    SIDE,
    YOUR_PHOTOS,
    checkpoint,
    drawn_subject,
    empty,
    photo_subject,
    sampled,
    shapeland_base,
    show,
    text,
)


def shapeland(flow: Workflow) -> None:
    """Two drawn subjects, the same seed without them, and what the judge says."""
    flow.note(
        "## START HERE: two subjects, one picture\n"
        "Press **Run**; nothing has to be downloaded. Each **Drawn subject** is a picture of one thing, in its own "
        "colors and pattern. While the new picture is sampled, **Multi-Reference Self-Attention** lets it attend to "
        "both.\n\n"
        "The picture at the end shows both references and, below them, the same prompt and seed without and with them. "
        "The judge, a small network that reads such pictures, says how alike each thing is: 1 is the same look, 0 or "
        "less another one.\n\n" + YOUR_PHOTOS
    )
    base = shapeland_base(flow)
    flow.note(
        "### Things to try\n"
        "- change **identity_seed** of a subject: it gets other colors, and so does the new picture\n"
        "- change **weight** of a subject: 0 switches it off\n"
        "- change **seed** in both samplers, to the same number: this run is faster, because the references are kept\n"
        "- **blocks**: *last decoder stage* keeps more of the prompt, *all blocks* copies more"
    )
    heart = drawn_subject(flow, "a heart on a white background", "heart", 30, weighted=True)
    star = drawn_subject(flow, "a star on a gray background", "star", 8, weighted=True)
    patched = flow.add(
        "ConceptLoomMultiReferenceSelfAttention",
        {"model": base.model, "clip": base.clip, "vae": base.vae, "subjects": [heart["subject"], star["subject"]]},
        column=2,
        title="Multi-Reference Self-Attention",
    )
    shared = {
        "positive": text(flow, base.clip, "a heart and a star on a navy background", "Prompt", 2),
        "negative": text(flow, base.clip, "", "Negative prompt (empty)", 2),
        "latent_image": empty(flow, SIDE, 2),
        "seed": 4,
    }
    pictures = {
        "heart": heart["image"],
        "star": star["image"],
        "without": sampled(flow, 3, "Without (same seed)", model=base.model, **shared),
        "with": sampled(flow, 3, "With the subjects", model=patched[0], **shared),
    }
    show(flow, 4, pictures, "conceptloom/freecustom", "References, without, with", base.vae, references=2, plain=True)
    flow.group("Start", 0)
    flow.group("1. Subjects", 1)
    flow.group("2. Model and prompt", 2)
    flow.group("3. Drawing", 3)
    flow.group("4. Result", 4, 5)


def stable_diffusion(flow: Workflow, file: dict, size: int, steps: int, cfg: float, nouns: tuple[str, str]) -> None:
    """Two subjects on a downloaded checkpoint."""
    flow.note(
        "## START HERE: your own subjects\n"
        "Needs the checkpoint in **Load Checkpoint**; ComfyUI offers to download it. The nodes *Your photo* draw "
        "stand-ins until you put photos there.\n\n"
        "For each photo of yours\n"
        "1. put **Load Image** in the place of *Your photo*: connect IMAGE and MASK to **Reference Subject**;\n"
        "2. upload the photo, right-click it, open the mask editor, paint over the subject and save;\n"
        "3. in **Reference Subject**, write the subject's **noun**, and describe the photo in **prompt**;\n"
        "4. put the noun into the text of *Prompt*, in the place of the drawn one.\n\n"
        "**Only one photo**: bypass the other **Reference Subject** and take its noun out of *Prompt*.\n\n"
        "**Without painting**: double-click the canvas and add the blueprint **Photo to Subject**. It finds the mask "
        "by the noun, with **Load Segmenter** and a SAM3 checkpoint.\n\n"
        "References work best when they show the thing in use: a hat that is worn, a cup that is held. **Concept "
        "Collage** pastes a subject into such a picture.",
        width=300,
    )
    base = checkpoint(flow, file)
    flow.note(
        "### When it does not work\n"
        "- The subject is weak: raise its **weight** from 3 to 4, and describe its whole reference in **prompt**\n"
        "- The picture falls apart: lower the weights, or set **end_percent** to 0.7\n"
        "- Subjects mix: give each a **target_mask**\n"
        "- Try other seeds: not every one works, and a new one costs hardly more than without references"
    )
    first = photo_subject(flow, f"a {nouns[0]} on a white background", nouns[0], 2, size, 3.0)
    second = photo_subject(flow, f"a {nouns[1]} on a gray background", nouns[1], 5, size, 3.0)
    patched = flow.add(
        "ConceptLoomMultiReferenceSelfAttention",
        {"model": base.model, "clip": base.clip, "vae": base.vae, "subjects": [first[0], second[0]]},
        column=3,
        title="Multi-Reference Self-Attention",
    )
    latent = sampled(
        flow,
        4,
        "With the subjects",
        model=patched[0],
        positive=text(
            flow, base.clip, f"a photo of a {nouns[0]} and a {nouns[1]} on a wooden table, soft light", "Prompt", 3
        ),
        negative=text(flow, base.clip, NEGATIVE, "Negative prompt", 3),
        latent_image=empty(flow, size, 3),
        seed=2,
        steps=steps,
        cfg=cfg,
        sampler_name="ddim",
        scheduler="ddim_uniform",
    )
    decoded = flow.add("VAEDecode", {"samples": latent, "vae": base.vae}, column=5)
    flow.add("SaveImage", {"images": decoded[0], "filename_prefix": "conceptloom/freecustom"}, column=6)
    flow.group("Start", 0)
    flow.group("1. Subjects", 1, 2)
    flow.group("2. Model and prompt", 3)
    flow.group("3. Drawing", 4)
    flow.group("4. Result", 5, 6)


WORKFLOWS = {
    "01_Two_subjects_FreeCustom_no_download": shapeland,
    "21_Two_subjects_FreeCustom_needs_SD15": partial(
        stable_diffusion, file=SD15, size=512, steps=50, cfg=7.5, nouns=("ball", "star")
    ),
    "22_Two_subjects_FreeCustom_needs_SDXL": partial(
        stable_diffusion, file=SDXL, size=1024, steps=30, cfg=6.0, nouns=("mug", "fish")
    ),
}
