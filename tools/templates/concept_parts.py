"""Parts that several of Concept Weaver's workflows have."""

from __future__ import annotations

from dataclasses import dataclass

from workflow_builder import Node, Output, Workflow

SHAPELAND_BLOCKS = "all from the second on (published code)"
"""Plug-and-Play's blocks for Shapeland, where the paper's do not keep shapes."""


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


def sample(
    flow: Workflow, model, positive, negative, inverted: Node, title: str, cfg: float = 4.0, noise: Output | None = None
) -> Node:
    """Sampling from an inversion's noise, or another, along its schedule, with nothing random added."""
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
            "latent_image": noise or inverted["noise"],
        },
        column=5,
        title=title,
    )


def enlarged(flow: Workflow, image, times: float, title: str, prefix: str) -> None:
    """A small picture, shown large and saved."""
    larger = flow.add("ImageScaleBy", {"image": image, "upscale_method": "nearest-exact", "scale_by": times}, column=7)
    flow.add("SaveImage", {"images": larger[0], "filename_prefix": prefix}, column=8, title=title)


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


def places(flow: Workflow, segmenter: Node, image: Output, nouns: str) -> list[Node]:
    """Masks of the template's things, divided among the concepts."""
    found = flow.add("ConceptLoomTextToMasks", {"segmenter": segmenter[0], "image": image, "nouns": nouns}, column=2)
    divided = flow.add(
        "ConceptLoomConceptMasks",
        {"masks": [found["masks"]], "detections": found["detections"], "image": image},
        column=2,
    )
    return [found, divided]
