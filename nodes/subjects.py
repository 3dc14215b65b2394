"""Nodes that create subjects: Reference Subject and Concept Collage."""

from __future__ import annotations

from comfy_api.latest import io

from ..subjects.collage import place
from ..subjects.masks import spotlight
from ..subjects.subject import DEFAULT_WEIGHT, MAX_WEIGHT, Subject
from .types import Node, SubjectSocket, gather_subjects, one_picture, preview, subject_inputs


class ReferenceSubject(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomReferenceSubject",
            display_name="Reference Subject",
            category="ConceptLoom/Subjects",
            description="Start here: makes a subject of a picture, the mask of the thing in it, and its noun. For "
            "FreeCustom, FastComposer, ProFusion and Composer; Concept Weaver has Load Concept instead.",
            search_aliases=[
                "subject",
                "concept",
                "reference image",
                "identity",
                "multi subject",
                "personalization",
                "consistent character",
                "two characters",
                "face",
                "person",
            ],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip="One picture that shows the subject, best in use: a hat that is worn, a cup that is held.",
                ),
                io.String.Input(
                    "noun", default="", tooltip='What the subject is called in your prompt, such as "dog" or "hat".'
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip='Describes the whole reference picture. Empty means "a" and the noun.',
                ),
                io.Float.Input(
                    "weight",
                    default=DEFAULT_WEIGHT,
                    min=0.0,
                    max=MAX_WEIGHT,
                    step=0.1,
                    tooltip="How strongly the new picture attends to the subject. 3, the published value, suits Stable "
                    "Diffusion, and 0.3 Shapeland. 0 switches the subject off. For FastComposer and PromptNet, which "
                    "put the subject into a word, only zero or not zero matters.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White on the subject, with the picture's aspect ratio. Without a wire the whole picture "
                    "is the subject, background included; an empty mask is refused.",
                ),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="White where the subject may appear in the new picture, with that picture's aspect "
                    "ratio, which keeps subjects from mixing. For FreeCustom; FastComposer and PromptNet do not use "
                    "it. Without a wire the subject may appear anywhere; an empty mask is refused.",
                ),
            ],
            outputs=[SubjectSocket.Output("subject", tooltip="The subject, for any SUBJECT input.")],
        )

    @classmethod
    def execute(cls, image, noun, prompt, weight, mask=None, target_mask=None) -> io.NodeOutput:
        subject = Subject(one_picture(image), noun, mask, prompt, weight, target_mask)
        return io.NodeOutput(subject, ui=preview(cls, spotlight(subject.image, subject.mask)))


class ConceptCollage(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomConceptCollage",
            display_name="Concept Collage",
            category="ConceptLoom/Subjects",
            description="Pastes subjects onto a context picture (context interaction): references that show a subject "
            "in use work far better than isolated ones, and subjects of one collage share one reference pass.",
            search_aliases=["context interaction", "paste", "composite", "cut out", "FreeCustom"],
            has_intermediate_output=True,
            inputs=[
                io.Image.Input("context", tooltip="The picture to paste onto, such as a person for a hat."),
                subject_inputs("The subjects to paste, from back to front."),
                io.MultiType.Input(
                    "placement",
                    [io.Mask, io.BoundingBox, io.BoundingBoxes],
                    optional=True,
                    tooltip="Where they go: a batch of masks with the context's aspect ratio (their outlines' boxes "
                    "count) or boxes in pixels, one per subject. Without it they stand side by side.",
                ),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip='Describes the collage, such as "a man who wears a hat". Empty joins the nouns.',
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.05,
                    max=4.0,
                    step=0.05,
                    tooltip="Size of the subjects; 1 fills their boxes as far as their proportions allow.",
                ),
                io.Boolean.Input("flip", default=False, tooltip="Mirrors the subjects left to right."),
                io.Float.Input(
                    "feather",
                    default=2.0,
                    min=0.0,
                    max=64.0,
                    step=0.5,
                    tooltip="Width of the soft edge in pixels of the context.",
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Mask value from which a pixel of a subject belongs to it.",
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The collage."),
                io.Mask.Output("masks", tooltip="What is seen of each subject, one mask per subject."),
                SubjectSocket.Output("subject", tooltip="All pasted subjects, now with the collage as their picture."),
            ],
        )

    @classmethod
    def execute(cls, context, subjects, prompt, scale, flip, feather, mask_threshold, placement=None) -> io.NodeOutput:
        picture, masks, placed = place(
            one_picture(context, "context")[..., :3],
            gather_subjects(subjects),
            placement,
            prompt,
            scale=scale,
            flip=flip,
            feather_radius=feather,
            threshold=mask_threshold,
        )
        return io.NodeOutput(picture[None], masks, placed, ui=preview(cls, picture))


NODES: list[type[Node]] = [ReferenceSubject, ConceptCollage]
