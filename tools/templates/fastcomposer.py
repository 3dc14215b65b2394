"""Workflows of FastComposer."""

from __future__ import annotations

from workflow_builder import Node, Workflow

from .freecustom import NEGATIVE, SD15, reference

PUBLISHED = {
    "name": "pytorch_model.bin",
    "url": "https://huggingface.co/mit-han-lab/fastcomposer/resolve/main/pytorch_model.bin",
    "directory": "fastcomposer",
}
SHAPELAND = "shapeland.safetensors"


def fuse(flow: Workflow, parts: Node, clip, subjects: list, prompt: str, alpha: float, **encoder) -> list[Node]:
    """Subjects encoded, fused into a prompt and delayed: the three nodes between loader and sampler."""
    encoded = flow.add(
        "ConceptLoomSubjectEncoder",
        {"clip_vision": parts["CLIP_VISION"], "subjects": subjects, **encoder},
        column=3,
    )
    fused = flow.add(
        "ConceptLoomFuseSubjects",
        {"clip": clip, "fuser": parts["fuser"], "subjects": [encoded[0]], "prompt": prompt},
        column=3,
    )
    delayed = flow.add(
        "ConceptLoomDelayedSubjectConditioning",
        {"text_only": fused["text_only"], "subject": fused["subject"], "alpha": alpha},
        column=3,
    )
    return [encoded, fused, delayed]


def load(flow: Workflow) -> tuple[Node, Node]:
    """Shapeland's model, and FastComposer's weights on top of it."""
    base = flow.add("ConceptLoomLoadShapeland", column=0)
    parts = flow.add(
        "ConceptLoomLoadFastComposer",
        {"file": SHAPELAND, "model": base["MODEL"], "clip": base["CLIP"], "clip_vision": base["CLIP_VISION"]},
        column=0,
    )
    return base, parts


def sampling(**changes) -> dict:
    """KSampler's inputs on Shapeland."""
    return {
        "steps": 25,
        "cfg": 4.0,
        "sampler_name": "dpmpp_2m",
        "scheduler": "normal",
        "denoise": 1.0,
        **changes,
    }


def two_subjects(flow: Workflow, parts: Node) -> tuple[list[Node], list[Node], list[Node]]:
    """A house and a star, and the prompt that both are fused into: the subjects' nodes, the prompt's (encoder, fuse,
    delay), and what any sampler needs besides (negative prompt, latent)."""
    house = reference(flow, "a house on a white background", "house", 12, 64, 1.0)
    star = reference(flow, "a star on a gray background", "star", 5, 64, 1.0)
    text = "a house @subject and a star @subject on a navy background"
    nodes = fuse(flow, parts, parts["CLIP"], [house[1][0], star[1][0]], text, 0.8, background="noise", crop=True)
    negative = flow.add(
        "CLIPTextEncode", {"clip": parts["CLIP"], "text": ""}, column=3, title="Negative prompt (empty)"
    )
    latent = flow.add("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}, column=3)
    return [*house, *star], nodes, [negative, latent]


def compared(flow: Workflow, vae, plans: dict, rest: list[Node], seed: int) -> list:
    """Pictures from one seed, by title, each from a model and a positive conditioning."""
    negative, latent = rest
    pictures = []
    for title, (model, positive) in plans.items():
        sampled = flow.add(
            "KSampler",
            {
                "model": model,
                "positive": positive,
                "negative": negative[0],
                "latent_image": latent[0],
                **sampling(seed=seed),
            },
            column=4,
            title=title,
        )
        pictures.append(flow.add("VAEDecode", {"samples": sampled[0], "vae": vae}, column=5)[0])
    return pictures


def show(flow: Workflow, pictures: list, prefix: str) -> None:
    """One row of pictures, enlarged, and the last of them alone."""
    row = pictures[0]
    for picture in pictures[1:]:
        row = flow.add(
            "ImageStitch",
            {"image1": row, "image2": picture, "direction": "right", "match_image_size": True, "spacing_width": 4},
            column=6,
        )[0]
    for title, image in (("References, without, with", row), ("With the subjects", pictures[-1])):
        larger = flow.add(
            "ImageScaleBy", {"image": image, "upscale_method": "nearest-exact", "scale_by": 6.0}, column=7
        )
        flow.add("SaveImage", {"images": larger[0], "filename_prefix": prefix}, column=8, title=title)


def shapeland(flow: Workflow) -> None:
    """Two drawn subjects written into the words of a prompt, and the same seed as plain text."""
    base, parts = load(flow)
    flow.note(
        "## Subjects in words\n"
        "**Subject Encoder** looks at each reference once. **Fuse Subjects** writes what it saw into the word of that "
        "subject. **Delayed Subject Conditioning** lets the plain text lay the picture out first.\n\n"
        "Press **Run**. It costs what plain sampling costs.",
        column=0,
    )
    flow.note(
        "### Things to try\n"
        "- `alpha` of the delay: 0 is plain text, 1 gives the subjects every step\n"
        "- a `@subject` after another word in the prompt\n"
        "- another `identity_seed` in a reference: the picture follows\n"
        "- `weight` 0 of a subject leaves its word as text",
        column=0,
    )
    subjects, nodes, rest = two_subjects(flow, parts)
    model, plain, fused = parts["MODEL"], nodes[1]["text_only"], nodes[2][0]
    plans = {"Without (same seed)": (model, plain), "With the subjects": (model, fused)}
    shown = [subjects[0][0], subjects[2][0], *compared(flow, base["VAE"], plans, rest, 0)]
    judged = flow.add("ConceptLoomReadPicture", {"image": shown[-1], "reference": subjects[0][0]}, column=5)
    flow.add("PreviewAny", {"source": judged[1]}, column=6, title="The judge: how much each thing looks like the house")
    flow.add("PreviewAny", {"source": nodes[1]["report"]}, column=6, title="Where the subjects landed")
    show(flow, shown, "conceptloom/fastcomposer")
    flow.group("1. Subjects", subjects)
    flow.group("2. Prompt with subjects", [*nodes, *rest])


def with_freecustom(flow: Workflow) -> None:
    """The same subjects in the words and in self-attention: FastComposer's identity, FreeCustom's texture."""
    base, parts = load(flow)
    flow.note(
        "## Two systems, one subject\n"
        "The subjects that Subject Encoder gives still fit every other SUBJECT input. Here they go into the words "
        "(FastComposer) and into self-attention (FreeCustom), which carries their texture.",
        column=0,
    )
    subjects, nodes, rest = two_subjects(flow, parts)
    patched = flow.add(
        "ConceptLoomMultiReferenceSelfAttention",
        {"model": parts["MODEL"], "clip": parts["CLIP"], "vae": base["VAE"], "subjects": [nodes[0][0]]},
        column=3,
    )
    model, fused = parts["MODEL"], nodes[2][0]
    plans = {"FastComposer alone": (model, fused), "With FreeCustom": (patched[0], fused)}
    shown = [subjects[0][0], subjects[2][0], *compared(flow, base["VAE"], plans, rest, 0)]
    show(flow, shown, "conceptloom/fastcomposer_freecustom")
    flow.group("1. Subjects", subjects)
    flow.group("2. Prompt and self-attention", [*nodes, patched, *rest])


def sd15(flow: Workflow) -> None:
    """Two subjects with the published checkpoint and its settings."""
    parts = flow.add("ConceptLoomLoadFastComposer", {"file": PUBLISHED["name"]}, column=0, models=[PUBLISHED])
    base = flow.add("CheckpointLoaderSimple", {"ckpt_name": SD15["name"]}, column=0, models=[SD15], title="Its VAE")
    flow.note(
        "## Your own people\n"
        "The two references are drawn here so that the workflow runs at once. FastComposer was trained on people: "
        "replace **Draw Scene** by **Load Image** with a photo of a face each, and the words in the prompt.\n\n"
        "Put `@subject` after the word of each subject. The first subject takes the first one.",
        column=0,
    )
    flow.note(
        "### When it does not work\n"
        "- The person is not alike: raise `alpha`, or give several photos (`pictures` of Subject Encoder)\n"
        "- The prompt is ignored: lower `alpha` to 0.5 to 0.6\n"
        "- A small face in a large photo: paint a mask and set `crop`",
        column=0,
    )
    ball = reference(flow, "a red striped ball on a white background", "ball", 2, 512, 3.0)
    star = reference(flow, "a star on a gray background", "star", 5, 512, 3.0)
    text = "a photo of a man @subject and a woman @subject reading a book together"
    nodes = fuse(flow, parts, parts["CLIP"], [ball[1][0], star[1][0]], text, 0.7)
    negative = flow.add("CLIPTextEncode", {"clip": parts["CLIP"], "text": NEGATIVE}, column=3, title="Negative prompt")
    latent = flow.add("EmptyLatentImage", {"width": 512, "height": 512, "batch_size": 1}, column=3)
    sampled = flow.add(
        "KSampler",
        {
            "model": parts["MODEL"],
            "positive": nodes[2][0],
            "negative": negative[0],
            "latent_image": latent[0],
            **sampling(seed=2, steps=50, cfg=5.0, sampler_name="ipndm", scheduler="ddim_uniform"),
        },
        column=4,
    )
    decoded = flow.add("VAEDecode", {"samples": sampled[0], "vae": base["VAE"]}, column=5)
    flow.add("SaveImage", {"images": decoded[0], "filename_prefix": "conceptloom/fastcomposer"}, column=6)
    flow.group("1. Subjects", [*ball, *star])
    flow.group("2. Prompt with subjects", [*nodes, negative, latent])


WORKFLOWS = {
    "fastcomposer_shapeland": shapeland,
    "fastcomposer_freecustom_shapeland": with_freecustom,
    "fastcomposer_sd15": sd15,
}
