"""The workflow that trains a concept."""

from __future__ import annotations

from workflow_builder import Node, Output, Subgraph, Workflow

from .parts import SIDE, Base, empty, sampled, shapeland_base, show

CAPTIONS = "a {} on a white background\na {} on a gray background\na {} on a beige background"


def alone(flow: Workflow, column: int, base: Base, concept: Output, prompt: str) -> Node:
    """A concept in the whole picture; outputs `model`, `positive` and `negative`."""

    def describe(inner: Subgraph) -> None:
        everywhere = inner.add("SolidMask", {"value": 1.0, "width": SIDE, "height": SIDE})
        divided = inner.add("ConceptLoomConceptMasks", {"masks": [everywhere[0]], "dilation": 0.0}, column=1)
        prompts = inner.add(
            "ConceptLoomConceptPrompts",
            {
                "clip": inner.input("clip"),
                "concepts": inner.input("concept"),
                "prompt": inner.input("prompt"),
                "negative_prompt": "",
            },
            column=1,
        )
        fused = inner.add(
            "ConceptLoomMultiConceptFusion",
            {"model": inner.input("model"), "prompts": prompts[0], "partition": divided[0], "suppression": 0.0},
            column=2,
            title="Multi-Concept Fusion",
        )
        for name in ("model", "positive", "negative"):
            inner.output(name, fused[name])

    given = {"model": base.model, "clip": base.clip, "concept": concept, "prompt": prompt}
    return flow.place(flow.subgraph("One Concept Everywhere", describe), given, column)


def train_concept(flow: Workflow) -> None:
    """A concept from three drawn pictures, and a picture of it."""
    flow.note(
        "## START HERE: teach it a thing\n"
        "Press **Run**; nothing has to be downloaded. **Train Concept** learns one thing from a few pictures: what "
        "cross-attention makes of text, and a new word. The node shows previews while it learns; cancelling leaves "
        "the models as they were. 150 steps are few, done in a minute; the default is 400.\n\n"
        "**Your own pictures**: one **Load Image** each into **Batch Images**, your checkpoint in the place of **Load "
        "Shapeland**, **size** 512, your **class_word**, and **captions** of one line, such as *photo of a {}*. Write "
        "the prompt in *One Concept Everywhere* and set **Empty Latent Image** to 512. Photos of a person need that "
        "person's consent."
    )
    base = shapeland_base(flow)
    flow.note(
        "### How to choose\n"
        "- one caption for all pictures, or a line each that says what else they show: that is then not learned\n"
        "- too little alike: more **steps**. Everything looks like it: fewer, or more **class_pictures**\n"
        "- pictures in which size and place of the thing differ teach most\n"
        "- **rank** 8 to 32 for small files"
    )
    drawn = [
        flow.add(
            "ConceptLoomDrawScene",
            {"description": f"a star on a {ground} background", "seed": seed, "identity_seed": 41},
            column=1,
            title=f"Picture {seed} of it",
        )[0]
        for seed, ground in ((1, "white"), (2, "gray"), (3, "beige"))
    ]
    batch = flow.add("BatchImagesNode", {"images": drawn}, column=2)
    trained = flow.add(
        "ConceptLoomTrainConcept",
        {
            "model": base.model,
            "clip": base.clip,
            "vae": base.vae,
            "images": batch[0],
            "class_word": "star",
            "placeholder": "<mine>",
            "captions": CAPTIONS,
            "steps": 150,
            "class_pictures": 8,
            "size": SIDE,
            "preview_every": 50,
        },
        column=3,
    )
    flow.add("ConceptLoomSaveConcept", {"concept": trained[0], "filename": "my star", "rank": 8}, column=4)
    concept = alone(flow, 4, base, trained[0], "a star on a navy background")
    shared = {"positive": concept["positive"], "negative": concept["negative"], "latent_image": empty(flow, SIDE, 4)}
    pictures = {
        "picture": drawn[0],
        "any star": sampled(flow, 5, "Any star (same seed)", model=base.model, seed=3, **shared),
        "concept": sampled(flow, 5, "The concept", model=concept["model"], seed=3, **shared),
    }
    title = "Picture, any star, the concept"
    show(flow, 6, pictures, "conceptloom/train_concept", title, base.vae, references=1, plain=True, times=6.0)
    flow.group("Start", 0)
    flow.group("1. Pictures", 1)
    flow.group("2. Training", 2, 3)
    flow.group("3. Drawing it", 4, 5)
    flow.group("4. Result", 6, 7)


WORKFLOWS = {"06_Train_a_concept_no_download": train_concept}
