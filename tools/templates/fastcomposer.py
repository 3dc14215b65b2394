"""Workflows of FastComposer."""

from __future__ import annotations

from workflow_builder import Node, Output, Subgraph, Workflow

from .parts import (
    NEGATIVE,
    SD15,
    SHAPELAND,
    SIDE,
    WIDE,
    YOUR_PHOTOS,
    Base,
    checkpoint,
    drawn_subject,
    empty,
    photo_subject,
    sampled,
    shapeland_base,
    show,
    text,
)

PUBLISHED = {
    "name": "pytorch_model.bin",
    "url": "https://huggingface.co/mit-han-lab/fastcomposer/resolve/main/pytorch_model.bin",
    "directory": "fastcomposer",
}


def load(flow: Workflow) -> tuple[Base, Node]:
    """Shapeland's model, and FastComposer's weights on top of it in column 1."""
    base = shapeland_base(flow)
    parts = flow.add(
        "ConceptLoomLoadFastComposer",
        {"file": SHAPELAND, "model": base.model, "clip": base.clip, "clip_vision": base.vision},
        column=1,
    )
    return base, parts


def in_words(flow: Workflow, column: int, parts: Node, subjects: list[Output], prompt: str, **encoder) -> Node:
    """Subjects written into the words of a prompt; outputs `text_only`, `subject`, `subjects` and `report`."""

    def describe(inner: Subgraph) -> None:
        encoded = inner.add(
            "ConceptLoomSubjectEncoder",
            {
                "clip_vision": inner.input("clip_vision"),
                "subjects": [inner.input(f"subject {i + 1}") for i in range(len(subjects))],
                **encoder,
            },
        )
        fused = inner.add(
            "ConceptLoomFuseSubjects",
            {
                "clip": inner.input("clip"),
                "fuser": inner.input("fuser"),
                "subjects": [encoded[0]],
                "prompt": inner.input("prompt"),
            },
            column=1,
        )
        for name in ("text_only", "subject"):
            inner.output(name, fused[name])
        inner.output("subjects", encoded[0])
        inner.output("report", fused["report"])

    given = {"clip_vision": parts["CLIP_VISION"], "clip": parts["CLIP"], "fuser": parts["fuser"], "prompt": prompt}
    given |= {f"subject {i + 1}": subject for i, subject in enumerate(subjects)}
    return flow.place(flow.subgraph("Subjects in Words", describe), given, column)


def two_drawn(flow: Workflow, *things: tuple[str, int], weighted: bool = False) -> tuple[list[Node], str]:
    """Drawn subjects, each a noun and an identity, and a prompt for both; see `drawn_subject`."""
    grounds = ("white", "gray")
    subjects = [
        drawn_subject(flow, f"a {noun} on a {ground} background", noun, identity, weighted=weighted)
        for (noun, identity), ground in zip(things, grounds, strict=True)
    ]
    return subjects, " and ".join(f"a {noun} @subject" for noun, _ in things) + " on a navy background"


def delayed(flow: Workflow, column: int, words: Node, alpha: float) -> Output:
    """The prompt with the subjects from a step on."""
    given = {"text_only": words["text_only"], "subject": words["subject"], "alpha": alpha}
    return flow.add("ConceptLoomDelayedSubjectConditioning", given, column=column)[0]


def shapeland(flow: Workflow) -> None:
    """Two drawn subjects written into the words of a prompt, and the same seed as plain text."""
    flow.note(
        "## START HERE: subjects in words\n"
        "Press **Run**; nothing has to be downloaded. **Subjects in Words** looks at each reference once and writes "
        "what it saw into the word before **@subject**: the first input into the first such word, and so on. **Delayed "
        "Subject Conditioning** leaves the first steps, which lay the picture out, to the plain text. The picture "
        "takes as long as one without subjects.\n\n"
        "The picture at the end shows both references and, below them, the same prompt and seed without and with "
        "them.\n\n" + YOUR_PHOTOS
    )
    base, parts = load(flow)
    flow.note(
        "### Things to try\n"
        "- **alpha** of **Delayed Subject Conditioning**: 0 is plain text, 1 gives the subjects every step\n"
        "- **@subject** after another word in the prompt\n"
        "- change **identity_seed** of a subject: it gets other colors, and so does the new picture"
    )
    (house, star), prompt = two_drawn(flow, ("house", 12), ("star", 5))
    words = in_words(flow, 2, parts, [house["subject"], star["subject"]], prompt, background="noise", crop=True)
    fused = delayed(flow, 3, words, 0.8)
    shared = {
        "model": parts["MODEL"],
        "negative": text(flow, parts["CLIP"], "", "Negative prompt (empty)", 2),
        "latent_image": empty(flow, SIDE, 3),
    }
    pictures = {
        "house": house["image"],
        "star": star["image"],
        "without": sampled(flow, 4, "Without (same seed)", positive=words["text_only"], **shared),
        "with": sampled(flow, 4, "With the subjects", positive=fused, **shared),
    }
    show(flow, 5, pictures, "conceptloom/fastcomposer", "References, without, with", base.vae, references=2, plain=True)
    _grouped(flow)


def with_freecustom(flow: Workflow) -> None:
    """The same subjects in the words and in self-attention: FastComposer's identity, FreeCustom's texture."""
    flow.note(
        "## START HERE: two systems, one subject\n"
        "Press **Run**; nothing has to be downloaded. The subjects that come out of **Subjects in Words** still fit "
        "every other SUBJECT input. Here they go into the words (FastComposer) and into self-attention (FreeCustom), "
        "which carries their texture.\n\n"
        "The picture at the end shows both references and, below them, the picture with one system and with both. The "
        "one under it shows where the new picture looked at each subject."
    )
    base, parts = load(flow)
    (mug, tree), prompt = two_drawn(flow, ("mug", 3), ("tree", 21), weighted=True)
    words = in_words(flow, 2, parts, [mug["subject"], tree["subject"]], prompt, background="noise", crop=True)
    fused = delayed(flow, 3, words, 0.8)
    patched = flow.add(
        "ConceptLoomMultiReferenceSelfAttention",
        {"model": parts["MODEL"], "clip": parts["CLIP"], "vae": base.vae, "subjects": [words["subjects"]]},
        column=3,
        title="Multi-Reference Self-Attention",
    )
    record = flow.add("ConceptLoomRecordAttentionShare", {"model": patched[0]}, column=4, width=225)
    shared = {
        "positive": fused,
        "negative": text(flow, parts["CLIP"], "", "Negative prompt (empty)", 2),
        "latent_image": empty(flow, SIDE, 2),
    }
    both = sampled(flow, 5, "With FreeCustom", model=record[0], **shared)
    pictures = {
        "mug": mug["image"],
        "tree": tree["image"],
        "words alone": sampled(flow, 5, "FastComposer alone", model=parts["MODEL"], **shared),
        "both": both,
    }
    title = "References, FastComposer, with FreeCustom"
    show(flow, 6, pictures, "conceptloom/fastcomposer_freecustom", title, base.vae, references=2)

    def describe(inner: Subgraph) -> None:
        latent = inner.input("latent")
        decoded = inner.add("VAEDecode", {"samples": latent, "vae": inner.input("vae")})
        given = {"record": inner.input("record"), "latent": latent, "image": decoded[0]}
        share = inner.add("ConceptLoomAttentionShare", given, column=1)
        larger = {"image": share[0], "upscale_method": "nearest-exact", "scale_by": 4.0}
        inner.output("image", inner.add("ImageScaleBy", larger, column=2)[0])

    given = {"record": record[1], "latent": both, "vae": base.vae}
    where = flow.place(flow.subgraph("Where It Looked", describe), given, 6, width=225)
    flow.add("PreviewImage", {"images": where[0]}, column=7, title="Attention share: mug, tree", width=WIDE)
    flow.group("Start", 0)
    flow.group("1. Model and subjects", 1)
    flow.group("2. Prompt with the subjects", 2, 3)
    flow.group("3. Drawing", 4, 5)
    flow.group("4. Result", 6, 7)


def sd15(flow: Workflow) -> None:
    """Two subjects with the published checkpoint and its settings."""
    flow.note(
        "## START HERE: your own people\n"
        "Needs two files. Download *pytorch_model.bin* (4.5 GB) from huggingface.co/mit-han-lab/fastcomposer into "
        "models/fastcomposer and press **R**; ComfyUI offers to download the checkpoint.\n\n"
        "FastComposer was trained on people: for each *Your photo*, add **Load Image** with a photo of a face and "
        "connect its IMAGE to **Reference Subject**. Paint the face in the mask editor (right click) and connect MASK, "
        "or disconnect the mask. Write your prompt with **@subject** after the word of each subject; the first "
        "subject takes the first one.\n\n"
        "A photo of a person needs that person's consent."
    )
    base = checkpoint(flow, SD15, title="Load Checkpoint (for the VAE)")
    flow.note(
        "### When it does not work\n"
        "- Too little likeness: raise **alpha**, or give several photos (**pictures** of Subject Encoder)\n"
        "- The prompt is ignored: lower **alpha** to 0.5 or 0.6\n"
        "- A small face in a large photo: paint a mask, open **Subjects in Words** and set **crop**"
    )
    parts = flow.add("ConceptLoomLoadFastComposer", {"file": PUBLISHED["name"]}, column=1, models=[PUBLISHED])
    man = photo_subject(flow, "a heart on a beige background", "man", 2, 512, 3.0, "a photo of a man")
    woman = photo_subject(flow, "a moon on a mint background", "woman", 5, 512, 3.0, "a photo of a woman")
    prompt = "a photo of a man @subject and a woman @subject reading a book together"
    words = in_words(flow, 3, parts, [man[0], woman[0]], prompt)
    latent = sampled(
        flow,
        5,
        "With the subjects",
        model=parts["MODEL"],
        positive=delayed(flow, 4, words, 0.7),
        negative=text(flow, parts["CLIP"], NEGATIVE, "Negative prompt", 3),
        latent_image=empty(flow, 512, 4),
        seed=2,
        steps=50,
        cfg=5.0,
        sampler_name="ipndm",
        scheduler="ddim_uniform",
    )
    decoded = flow.add("VAEDecode", {"samples": latent, "vae": base.vae}, column=6)
    flow.add("SaveImage", {"images": decoded[0], "filename_prefix": "conceptloom/fastcomposer"}, column=7)
    flow.group("Start", 0)
    flow.group("1. Model and subjects", 1, 2)
    flow.group("2. Prompt with the subjects", 3, 4)
    flow.group("3. Drawing", 5)
    flow.group("4. Result", 6, 7)


def _grouped(flow: Workflow) -> None:
    flow.group("Start", 0)
    flow.group("1. Model and subjects", 1)
    flow.group("2. Prompt with the subjects", 2, 3)
    flow.group("3. Drawing", 4)
    flow.group("4. Result", 5, 6)


WORKFLOWS = {
    "02_Two_subjects_FastComposer_no_download": shapeland,
    "08_Two_systems_together_FastComposer_FreeCustom_no_download": with_freecustom,
    "23_Two_people_FastComposer_needs_SD15": sd15,
}
