"""Parts that several workflows have: models, drawn subjects, samplings, and the row of pictures at the end."""

from __future__ import annotations

from dataclasses import dataclass

from workflow_builder import Input, Node, Output, Subgraph, Workflow
from workflow_format import PREVIEW_HEIGHT

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
SHAPELAND = "shapeland.safetensors"
SIDE = 64
SHAPELAND_WEIGHT = 0.3
"""Of a subject in self-attention, where Stable Diffusion has 3."""
SHAPELAND_BLOCKS = "all from the second on (published code)"
"""Plug-and-Play's blocks for Shapeland, where the paper's do not keep shapes."""
YOUR_PHOTOS = (
    "**Your own photos** need a checkpoint that knows what they show: begin with template 21, for Stable Diffusion "
    "1.5. This model knows its drawn world alone: star, heart, fish, house, tree, mug, ball, moon."
)
SPACING = 4
"""Between pictures side by side."""
WIDE = 390
"""Width of the node that shows the row of pictures."""


@dataclass(frozen=True)
class Base:
    """A model's outputs; `vision` is None where it has no vision tower."""

    model: Output
    clip: Output
    vae: Output
    vision: Output | None = None


def shapeland_base(flow: Workflow) -> Base:
    """The model that ships with the pack."""
    node = flow.add("ConceptLoomLoadShapeland")
    return Base(node["MODEL"], node["CLIP"], node["VAE"], node["CLIP_VISION"])


def checkpoint(flow: Workflow, file: dict, title: str | None = None) -> Base:
    """A checkpoint from models/checkpoints."""
    node = flow.add("CheckpointLoaderSimple", {"ckpt_name": file["name"]}, models=[file], title=title)
    return Base(node["MODEL"], node["CLIP"], node["VAE"])


def drawn_subject(
    flow: Workflow, description: str, noun: str, identity: int, column: int = 1, weighted: bool = False
) -> Node:
    """A subject from a drawn picture; outputs `subject` and `image`. The weight is an input if `weighted`: it acts in
    self-attention alone."""

    def describe(inner: Subgraph) -> None:
        text = inner.input("description")
        weight = inner.input("weight", SHAPELAND_WEIGHT) if weighted else SHAPELAND_WEIGHT
        drawing = inner.add(
            "ConceptLoomDrawScene", {"description": text, "seed": 3, "identity_seed": inner.input("identity_seed")}
        )
        subject = inner.add(
            "ConceptLoomReferenceSubject",
            {
                "image": drawing[0],
                "mask": drawing[1],
                "noun": inner.input("noun"),
                "prompt": text,
                "weight": weight,
            },
            column=1,
        )
        inner.output("subject", subject[0])
        inner.output("image", drawing[0])

    given = {"description": description, "noun": noun, "identity_seed": identity}
    return flow.place(flow.subgraph("Drawn Subject", describe), given, column, title=f"Drawn subject: {noun}")


def photo_subject(
    flow: Workflow, description: str, noun: str, identity: int, size: int, weight: float, prompt: str = ""
) -> Node:
    """A subject of a picture that is drawn in place of a photo, in columns 1 and 2."""
    drawing = flow.add(
        "ConceptLoomDrawScene",
        {"description": description, "seed": 3, "identity_seed": identity, "size": size},
        column=1,
        title=f"Your photo: {noun}",
    )
    return flow.add(
        "ConceptLoomReferenceSubject",
        {"image": drawing[0], "mask": drawing[1], "noun": noun, "prompt": prompt or description, "weight": weight},
        column=2,
    )


def text(flow: Workflow, clip: Output, words: str, title: str, column: int) -> Output:
    """An encoded text."""
    return flow.add("CLIPTextEncode", {"clip": clip, "text": words}, column=column, title=title)[0]


def empty(flow: Workflow, side: int, column: int) -> Output:
    """An empty latent."""
    return flow.add("EmptyLatentImage", {"width": side, "height": side, "batch_size": 1}, column=column)[0]


def sampled(flow: Workflow, column: int, title: str, **given) -> Output:
    """A latent by KSampler, on Shapeland if nothing else is given."""
    usual = {"seed": 0, "steps": 25, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "normal", "denoise": 1.0}
    return flow.add("KSampler", {**usual, **given}, column=column, title=title)[0]


def along(flow: Workflow, column: int, title: str, **given) -> Output:
    """A picture sampled along given sigmas, from a latent to which no noise is added: an inversion's, or one of an
    earlier part. Given are model, positive, negative, sigmas, latent and vae, and maybe cfg."""

    def describe(inner: Subgraph) -> None:
        names = ("model", "positive", "negative")
        guider = inner.add("CFGGuider", {**{name: inner.input(name) for name in names}, "cfg": inner.input("cfg", 4.0)})
        sampling = inner.add(
            "SamplerCustomAdvanced",
            {
                "noise": inner.add("DisableNoise")[0],
                "guider": guider[0],
                "sampler": inner.add("KSamplerSelect", {"sampler_name": "euler"})[0],
                "sigmas": inner.input("sigmas"),
                "latent_image": inner.input("latent"),
            },
            column=1,
        )
        decoded = inner.add("VAEDecode", {"samples": sampling["output"], "vae": inner.input("vae")}, column=2)
        inner.output("image", decoded[0])

    return flow.place(flow.subgraph("Sample along Sigmas", describe), given, column, title=title)[0]


def stitched(flow: Workflow, pictures: list[Output | Input], column: int, direction: str = "right") -> Output | Input:
    """One row of pictures, or pictures below one another, made in columns from `column` on."""
    row = pictures[0]
    for place, picture in enumerate(pictures[1:]):
        row = flow.add(
            "ImageStitch",
            {
                "image1": row,
                "image2": picture,
                "direction": direction,
                "match_image_size": True,
                "spacing_width": SPACING,
            },
            column=column + place,
        )[0]
    return row


def show(
    flow: Workflow,
    column: int,
    pictures: dict[str, Output],
    prefix: str,
    title: str,
    vae: Output | None = None,
    references: int = 0,
    plain: bool = False,
    times: float = 4.0,
    looks: dict[str, tuple[str, int]] | None = None,
    paste: tuple[Output, Output] | None = None,
) -> None:
    """All pictures in one, enlarged without blur and saved, made in one node: a row, or where there are several
    references, these in a row of their own above the others.

    Args:
        column: of the node that makes it; what shows it stands in the next.
        pictures: by their names; latents are decoded by `vae`.
        prefix: of the saved file.
        title: of the node that shows it.
        references: so many first pictures show a subject, with which the judge compares the last; 0 for no judge.
        plain: the last but one is a picture without the subjects.
        times: how much larger the pictures are shown.
        looks: further references, drawn in the same node as the first pictures: a description and an identity each.
        paste: a picture and a mask; the last picture counts inside the mask, and that one outside of it.
    """
    inner = Subgraph(flow.info, "Side by Side")
    images = []
    for description, identity in (looks or {}).values():
        drawing = {"description": description, "seed": 2, "identity_seed": identity}
        images.append(inner.add("ConceptLoomDrawScene", drawing)[0])
    # Not by what they show, which a person changes.
    names = {
        name: f"reference {i + 1}" if references > 1 and i < references else name for i, name in enumerate(pictures)
    }
    given = {names[name]: output for name, output in pictures.items()}
    for name, taken in {name: inner.input(names[name]) for name in pictures}.items():
        output = pictures[name]
        if output.node.info["output"][output.slot] == "LATENT":
            taken = inner.add("VAEDecode", {"samples": taken, "vae": inner.input("vae")})[0]
            given["vae"] = vae
        images.append(taken)
    if paste:
        given |= dict(zip(("around", "region"), paste, strict=True))
        images[-1] = inner.add(
            "ImageCompositeMasked",
            {
                "destination": inner.input("around"),
                "source": images[-1],
                "x": 0,
                "y": 0,
                "resize_source": False,
                "mask": inner.input("region"),
            },
            column=1,
        )[0]
    references += len(looks or {})
    rows = [images[:references], images[references:]] if references > 1 else [images]
    sheet = stitched(inner, [stitched(inner, row, 2) for row in rows], 2 + len(images), "down")
    across = len(rows[0])
    larger = inner.add(
        "ImageScaleToMaxDimension",
        {
            "image": sheet,
            "upscale_method": "nearest-exact",
            # Not by a factor: a person's photo in the place of a drawn picture may be large already.
            "largest_size": round(times * (SIDE * across + SPACING * (across - 1))),
        },
        column=4 + len(images),
    )
    inner.output("pictures", larger[0])
    if references:
        compared = {"image": images[-1], "references": images[:references], **({"plain": images[-2]} if plain else {})}
        judge = inner.add("ConceptLoomReadPicture", compared, column=1)
        inner.output("report", judge["report"])
    node = flow.place(inner, given, column, width=225)
    flow.add(
        "SaveImage",
        {"images": node["pictures"], "filename_prefix": prefix},
        column=column + 1,
        title=title,
        width=WIDE,
        picture=WIDE if len(rows) > 1 else PREVIEW_HEIGHT,
    )
    if references:
        flow.add("PreviewAny", {"source": node["report"]}, column=column + 1, title="What the judge sees", width=WIDE)


def bank(flow: Workflow, base: Base, files: dict[str, str]) -> Output:
    """Concepts from files, each with its class word, on one wire, in columns 1 and 2."""
    loaded = [
        flow.add("ConceptLoomLoadConcept", {"model": base.model, "file": file, "class_word": word}, column=1)[0]
        for file, word in files.items()
    ]
    return flow.add("ConceptLoomConceptBank", {"concepts": loaded}, column=2)[0]


def places(flow: Workflow, column: int, image: Output, nouns: str, sam: Base | None = None) -> Node:
    """The masks of a picture's things, divided among the concepts; outputs `partition` and `masks`. The segmenter is
    SAM3, or else Shapeland's judge."""

    def describe(inner: Subgraph) -> None:
        chosen = {"kind": "Shapeland judge"}
        if sam:
            chosen = {"kind": "SAM3", "kind.model": inner.input("sam3"), "kind.clip": inner.input("sam3_clip")}
        picture = inner.input("image")
        found = inner.add(
            "ConceptLoomTextToMasks",
            {
                "segmenter": inner.add("ConceptLoomLoadSegmenter", chosen)[0],
                "image": picture,
                "nouns": inner.input("nouns"),
            },
            column=1,
        )
        divided = inner.add(
            "ConceptLoomConceptMasks",
            {"masks": [found["masks"]], "detections": found["detections"], "image": picture},
            column=2,
        )
        inner.output("partition", divided[0])
        inner.output("masks", found["masks"])

    given = {"image": image, "nouns": nouns}
    if sam:
        given |= {"sam3": sam.model, "sam3_clip": sam.clip}
    return flow.place(flow.subgraph("Places of Things", describe), given, column)


def inverted(flow: Workflow, column: int, base: Base, description: str, steps: int, **source: Output) -> Node:
    """The noise that makes a picture, `source` being its `latent` or its `image`; outputs `noise`, `trajectory`,
    `sigmas` and `error`."""

    def describe(inner: Subgraph) -> None:
        latent = inner.input("latent") if "latent" in source else None
        if latent is None:
            latent = inner.add("VAEEncode", {"pixels": inner.input("image"), "vae": inner.input("vae")})[0]
        shown = inner.add("CLIPTextEncode", {"clip": inner.input("clip"), "text": inner.input("picture_shows")})
        inversion = inner.add(
            "ConceptLoomDDIMInversion",
            {
                "model": inner.input("model"),
                "latent": latent,
                "conditioning": shown[0],
                "steps": inner.input("steps"),
                "refinements": inner.input("refinements"),
            },
            column=1,
        )
        for name, output in (("noise", 0), ("trajectory", "trajectory"), ("sigmas", "SIGMAS"), ("error", "error")):
            inner.output(name, inversion[output])

    given = {"model": base.model, "clip": base.clip, "picture_shows": description, "steps": steps, **source}
    if "image" in source:
        given["vae"] = base.vae
    return flow.place(flow.subgraph("Invert Picture", describe), given, column)
