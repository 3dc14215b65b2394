"""Subgraphs that a person adds from the node library."""

from __future__ import annotations

from workflow_builder import Subgraph, Workflow


def photo_to_subject(flow: Workflow) -> dict:
    """A subject from a photo, whose mask is found by its noun."""

    def describe(inner: Subgraph) -> None:
        image, segmenter, noun = (inner.input(name) for name in ("image", "segmenter", "noun"))
        found = inner.add("ConceptLoomTextToMasks", {"segmenter": segmenter, "image": image, "nouns": noun})
        subject = inner.add(
            "ConceptLoomReferenceSubject",
            {
                "image": image,
                "mask": found["masks"],
                "noun": noun,
                "prompt": inner.input("prompt"),
                "weight": inner.input("weight"),
            },
            column=1,
        )
        inner.output("subject", subject[0])
        inner.output("mask", found["masks"])

    flow.place(flow.subgraph(flow.name, describe), open_sockets=True)
    return flow.blueprint(
        "ConceptLoom/Subjects",
        "A subject from a photo, without painting: connect Load Segmenter, which finds the mask by the noun.",
        ["photo", "reference", "mask by text", "person", "character", "face"],
    )


BLUEPRINTS = {"Photo to Subject": photo_to_subject}
