"""The workflow that trains a concept."""

from __future__ import annotations

from workflow_builder import Workflow

from .concept_parts import enlarged, shapeland_base, stitched


def train_concept(flow: Workflow) -> None:
    """A concept from three drawn pictures, and a picture of it."""
    base = shapeland_base(flow)
    flow.note(
        "## Teach it a thing\n"
        "**Train Concept** learns one thing from a few pictures: what cross-attention makes of text, and a new word. "
        "The node shows previews while it learns; cancelling leaves the models as they were. 150 steps are few, to be "
        "done in a minute; the default is 400.\n\n"
        "For SD 1.5 replace the loader and the pictures, and set `size` to 512.",
        column=0,
    )
    flow.note(
        "### How to choose\n"
        "- one caption for all pictures, or a line each that says what else they show: that is then not learnt\n"
        "- too little alike: more `steps`. Everything looks like it: fewer, or more `class_pictures`\n"
        "- pictures in which size and place of the thing differ teach most; where all are framed alike, try another "
        "`augmentation`\n"
        "- `rank` 8 to 32 for small files",
        column=0,
    )
    drawn = [
        flow.add(
            "ConceptLoomDrawScene",
            {"description": f"a star on a {ground} background", "seed": seed, "identity_seed": 41},
            column=1,
            title="A picture of it",
        )
        for seed, ground in ((1, "white"), (2, "gray"), (3, "beige"))
    ]
    first = flow.add("ImageBatch", {"image1": drawn[0][0], "image2": drawn[1][0]}, column=1)
    batch = flow.add("ImageBatch", {"image1": first[0], "image2": drawn[2][0]}, column=1)
    trained = flow.add(
        "ConceptLoomTrainConcept",
        {
            "model": base.model,
            "clip": base.clip,
            "vae": base.vae,
            "images": batch[0],
            "class_word": "star",
            "placeholder": "<mine>",
            "captions": "a {} on a white background\na {} on a gray background\na {} on a beige background",
            "steps": 150,
            "class_pictures": 8,
            "size": 64,
            "preview_every": 50,
        },
        column=2,
    )
    saved = flow.add("ConceptLoomSaveConcept", {"concept": trained[0], "filename": "my star", "rank": 8}, column=3)
    everywhere = flow.add("SolidMask", {"value": 1.0, "width": 64, "height": 64}, column=3)
    divided = flow.add("ConceptLoomConceptMasks", {"masks": [everywhere[0]], "dilation": 0.0}, column=3)
    prompts = flow.add(
        "ConceptLoomConceptPrompts",
        {
            "clip": base.clip,
            "concepts": trained[0],
            "prompt": "a star on a navy background",
            "negative_prompt": "",
        },
        column=3,
    )
    fused = flow.add(
        "ConceptLoomMultiConceptFusion",
        {"model": base.model, "prompts": prompts[0], "partition": divided[0], "suppression": 0.0},
        column=4,
    )
    latent = flow.add("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}, column=4)
    pictures = [drawn[0][0]]
    for title, model, positive in (
        ("Any star (same seed)", base.model, fused["positive"]),
        ("The concept", fused["model"], fused["positive"]),
    ):
        sampled = flow.add(
            "KSampler",
            {
                "model": model,
                "positive": positive,
                "negative": fused["negative"],
                "latent_image": latent[0],
                "seed": 3,
                "steps": 25,
                "cfg": 4.0,
                "sampler_name": "dpmpp_2m",
                "scheduler": "normal",
                "denoise": 1.0,
            },
            column=5,
            title=title,
        )
        pictures.append(flow.add("VAEDecode", {"samples": sampled[0], "vae": base.vae}, column=6)[0])
    flow.add("PreviewImage", {"images": trained["loss"]}, column=3, title="Loss")
    enlarged(flow, stitched(flow, pictures), 4.0, "Picture, any star, the concept", "conceptloom/train_concept")
    enlarged(flow, pictures[-1], 6.0, "The concept", "conceptloom/train_concept")
    flow.group("1. Pictures", [*drawn, first, batch])
    flow.group("2. Training", [trained])
    flow.group("3. Drawing it", [saved, everywhere, divided, prompts, fused, latent])


WORKFLOWS = {"train_concept_shapeland": train_concept}
