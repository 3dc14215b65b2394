"""What the client of a real server is told about bad input: one prompt per row, milliseconds each.

To add a row: `Row(node, changes, sentence)`. `node` is a node id without the prefix ConceptLoom, or a node of the host
that samples with what a node of ours made. `changes` are its inputs in API form, over those in GOOD and the defaults
of the schema; a link names a part of PARTS, which is added to the prompt with all that it is linked to. `sentence` is
the beginning of what the client gets, after the node's name where `node` is ours.
"""

from __future__ import annotations

import pickle
import time
from typing import Any, NamedTuple

import pytest
from environment import absent_weights
from hostserver import PromptError
from schema import live_fields

pytestmark = pytest.mark.skipif(bool(absent_weights()), reason="Shapeland's weights are incomplete")

PREFIX, NODE = "ConceptLoom", "node"


def tensor(shape: str, value: str = "1") -> tuple[str, dict]:
    return "ToyTensor", {"shape": shape, "value": value}


def solid(width: int = 64, height: int = 64, value: float = 1.0) -> tuple[str, dict]:
    return "SolidMask", {"width": width, "height": height, "value": value}


def text(words: str) -> tuple[str, dict]:
    return "CLIPTextEncode", {"clip": ["world", 1], "text": words}


def sampled(**changes: Any) -> tuple[str, dict]:
    inputs = {"model": ["world", 0], "positive": ["words", 0], "negative": ["words", 0], "latent_image": ["canvas", 0]}
    return "KSampler", {**inputs, "seed": 0, "steps": 1, "cfg": 1.0, **changes}


def subject(**changes: Any) -> tuple[str, dict]:
    return f"{PREFIX}ReferenceSubject", {"image": ["picture", 0], "noun": "star", **changes}


def encoded(*subjects: str) -> tuple[str, dict]:
    links = {f"subjects.subject{i}": [name, 0] for i, name in enumerate(subjects)}
    return f"{PREFIX}SubjectEncoder", {"clip_vision": ["world", 3], **links}


def concept(file: str, **changes: Any) -> tuple[str, dict]:
    return f"{PREFIX}LoadConcept", {"model": ["world", 0], "file": f"{file}.safetensors", **changes}


def inversion(latent: str) -> tuple[str, dict]:
    inputs = {"model": ["world", 0], "latent": [latent, 0], "conditioning": ["words", 0]}
    return f"{PREFIX}DDIMInversion", {**inputs, "steps": 1, "refinements": 0}


def plug(source: str) -> tuple[str, dict]:
    inputs = {"model": ["world", 0], "trajectory": [source, 1]}
    return f"{PREFIX}PlugAndPlayInjection", {**inputs, "residual_until": 1.0}


def fusion(partition: str) -> tuple[str, dict]:
    inputs = {"model": ["world", 0], "prompts": ["prompts", 0], "partition": [partition, 0]}
    return f"{PREFIX}MultiConceptFusion", inputs


def promptnet_encode(**changes: Any) -> dict:
    inputs = {"promptnet": ["promptnet", 1], "clip": ["world", 1], "vae": ["world", 2], "clip_vision": ["world", 3]}
    return {**inputs, "subjects.subject0": ["star", 0], "prompt": "a star", **changes}


def fine_tuning(**changes: Any) -> dict:
    inputs = {"model": ["promptnet", 0], "promptnet": ["promptnet", 1], "images": ["pictures", 0], "size": 64}
    models = {"clip": ["world", 1], "vae": ["world", 2], "clip_vision": ["world", 3]}
    return {**inputs, **models, "captions": "a {}", "steps": 1, "batch_size": 1, **changes}


def masks(*names: str, **changes: Any) -> tuple[str, dict]:
    return f"{PREFIX}ConceptMasks", {**{f"masks.mask{i}": [name, 0] for i, name in enumerate(names)}, **changes}


PARTS: dict[str, tuple[str, dict]] = {
    "world": (f"{PREFIX}LoadShapeland", {}),
    "misfits": ("ToyMisfits", {}),
    "words": text("a star and a heart on a navy background"),
    "picture": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 1, "color": 255}),
    "pictures": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 3, "color": 255}),
    "blank picture": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 1, "color": 0xFFFFFF}),
    "not finite": tensor("1, 64, 64, 3", "nan"),
    "two masks": tensor("2, 64, 64"),
    "two wrong masks": tensor("2, 64, 96"),
    "two empty masks": tensor("2, 64, 64", "0"),
    "not finite masks": tensor("3, 64, 64", "nan"),
    "white": solid(),
    "left": ("CropMask", {"mask": ["white", 0], "x": 0, "y": 0, "width": 64, "height": 64}),
    "wide": solid(96),
    "black": solid(value=0.0),
    "soft": solid(value=0.3),
    "box": ("PrimitiveBoundingBox", {"x": 0, "y": 0, "width": 4, "height": 4}),
    "canvas": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "wide canvas": ("EmptyLatentImage", {"width": 96, "height": 64, "batch_size": 1}),
    "latent": ("VAEEncode", {"pixels": ["picture", 0], "vae": ["world", 2]}),
    "latents": ("VAEEncode", {"pixels": ["pictures", 0], "vae": ["world", 2]}),
    "blank": tensor("1, 8, 16, 16", "0"),
    "4 channels": tensor("1, 4, 16, 16"),
    "video": tensor("1, 8, 3, 16, 16"),
    "latent not finite": tensor("1, 8, 16, 16", "nan"),
    "masked latent": ("SetLatentNoiseMask", {"samples": ["latent", 0], "mask": ["white", 0]}),
    "three prompts": tensor("3, 77, 128"),
    "two conditionings": (
        "ConditioningCombine",
        {"conditioning_1": ["words", 0], "conditioning_2": ["words", 0]},
    ),
    "area": (
        "ConditioningSetArea",
        {"conditioning": ["words", 0], "width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0},
    ),
    "skipping clip": ("CLIPSetLastLayer", {"clip": ["world", 1], "stop_at_clip_layer": -2}),
    "star": subject(),
    "heart": subject(noun="heart"),
    "soft star": subject(mask=["soft", 0]),
    "free": (
        f"{PREFIX}MultiReferenceSelfAttention",
        {"model": ["world", 0], "clip": ["world", 1], "vae": ["world", 2], "subjects.subject1": ["star", 0]},
    ),
    "recorder": (f"{PREFIX}RecordAttentionShare", {"model": ["free", 0]}),
    "recorded": sampled(model=["recorder", 0]),
    "composer": (
        f"{PREFIX}LoadFastComposer",
        {
            "file": "shapeland.safetensors",
            "model": ["world", 0],
            "clip": ["world", 1],
            "clip_vision": ["world", 3],
        },
    ),
    "one embedded": encoded("star"),
    "two embedded": encoded("star", "star"),
    "star and heart embedded": encoded("star", "heart"),
    "delayed": (
        f"{PREFIX}DelayedSubjectConditioning",
        {"text_only": ["words", 0], "subject": ["words", 0], "alpha": 0.5},
    ),
    "star concept": concept("star"),
    "fish concept": concept("fish"),
    "bank": (
        f"{PREFIX}ConceptBank",
        {"concepts.concept1": ["star concept", 0], "concepts.concept2": ["fish concept", 0]},
    ),
    "prompts": (
        f"{PREFIX}ConceptPrompts",
        {"clip": ["world", 1], "concepts": ["star concept", 0], "prompt": "a star", "negative_prompt": ""},
    ),
    "partition": masks("left"),
    "wide partition": masks("wide"),
    "partition of two": masks("left", "black"),
    "judge": (f"{PREFIX}LoadSegmenter", {"kind": "Shapeland judge"}),
    "inversion": inversion("latent"),
    "inversions": inversion("latents"),
    "plug": plug("inversion"),
    "plugs": plug("inversions"),
    "fusion": fusion("partition"),
    "wide fusion": fusion("wide partition"),
    "dpm_fast": ("KSamplerSelect", {"sampler_name": "dpm_fast"}),
    "small canvas": ("EmptyLatentImage", {"width": 32, "height": 32, "batch_size": 1}),
    "promptnet": (f"{PREFIX}LoadPromptNet", {"model": ["world", 0], "file": "tiny.safetensors"}),
    "narrow promptnet": (f"{PREFIX}LoadPromptNet", {"model": ["world", 0], "file": "narrow.safetensors"}),
    "composition": (f"{PREFIX}DecomposeImage", {"image": ["picture", 0], "mask": ["left half", 0]}),
    "wide composition": (f"{PREFIX}DecomposeImage", {"image": ["wide picture", 0], "take_palette": False}),
    "wide picture": ("EmptyImage", {"width": 96, "height": 64, "batch_size": 1, "color": 255}),
    "narrow": solid(32),
    "left half": (
        "MaskComposite",
        {"destination": ["black", 0], "source": ["narrow", 0], "x": 0, "y": 0, "operation": "add"},
    ),
    "two pictures": ("EmptyImage", {"width": 64, "height": 64, "batch_size": 2, "color": 255}),
    "collage": (
        f"{PREFIX}ConceptCollage",
        {"context": ["picture", 0], "subjects.subject0": ["star", 0], "subjects.subject1": ["heart", 0]},
    ),
    "palette": (f"{PREFIX}Palette", {"image": ["picture", 0]}),
    "other palette": (f"{PREFIX}Palette", {"image": ["picture", 0], "table": "180 colors"}),
    "other composition": (
        f"{PREFIX}DecomposeImage",
        {"image": ["picture", 0], "palette": ["other palette", 0], "take_sketch": False, "take_intensity": False},
    ),
    "caption only": (f"{PREFIX}PickRepresentations", {"composition": ["composition", 0], "caption": True}),
    "adapter": (f"{PREFIX}LoadComposerAdapter", {"model": ["world", 0], "file": "tiny.safetensors"}),
    "composed": (
        f"{PREFIX}ComposerConditioning",
        {"adapter": ["adapter", 1], "clip": ["world", 1], "composition": ["composition", 0]},
    ),
    "prior": (f"{PREFIX}LoadCaptionPrior", {"file": "tiny.safetensors"}),
    "narrow prior": (f"{PREFIX}LoadCaptionPrior", {"file": "narrow.safetensors"}),
    "fuser": (f"{PREFIX}LoadCoAdapterFuser", {"file": "tiny_fuser.safetensors"}),
    "t2i": ("ControlNetLoader", {"control_net_name": "tiny_t2i.safetensors"}),
    "sketch hint": (
        f"{PREFIX}CoAdapterCondition",
        {"control_net": ["t2i", 0], "image": ["picture", 0], "kind": "sketch"},
    ),
    "promptnet words": (f"{PREFIX}PromptNetEncode", promptnet_encode()),
}
"""Nodes that rows link to, by name: class and inputs."""

GOOD: dict[str, dict] = {
    "ReferenceSubject": PARTS["star"][1],
    "ConceptCollage": PARTS["collage"][1],
    "MultiReferenceSelfAttention": PARTS["free"][1],
    "RecordAttentionShare": PARTS["recorder"][1],
    "AttentionShare": {"record": ["recorder", 1], "latent": ["recorded", 0], "image": ["picture", 0]},
    "ConvertFastComposer": {"file": "shapeland.safetensors"},
    "SubjectEncoder": PARTS["one embedded"][1],
    "FuseSubjects": {
        "clip": ["composer", 1],
        "fuser": ["composer", 4],
        "subjects.subject0": ["one embedded", 0],
        "prompt": "a star",
    },
    "DelayedSubjectConditioning": PARTS["delayed"][1],
    "LoadConcept": PARTS["star concept"][1],
    "ConceptBank": {},
    "SaveConcept": {"concept": ["star concept", 0]},
    "ConceptPrompts": PARTS["prompts"][1],
    "LoadSegmenter": {},
    "TextToMasks": {"segmenter": ["judge", 0], "image": ["picture", 0], "nouns": "star"},
    "ConceptMasks": {},
    "DDIMInversion": PARTS["inversion"][1],
    "RenewNoise": {"noise": ["inversion", 0], "partition": ["partition", 0]},
    "PlugAndPlayInjection": PARTS["plug"][1],
    "MultiConceptFusion": PARTS["fusion"][1],
    "TrainConcept": {
        "model": ["world", 0],
        "clip": ["world", 1],
        "vae": ["world", 2],
        "images": ["pictures", 0],
        "class_word": "star",
        "size": 64,
        "steps": 1,
    },
    "FusionGuider": {
        "model": ["world", 0],
        "text": ["words", 0],
        "negative": ["words", 0],
        "subjects.subject0": ["words", 0],
    },
    "FusionSampler": {},
    "LoadPromptNet": PARTS["promptnet"][1],
    "PromptNetEncode": promptnet_encode(),
    "AugmentSubject": {"image": ["picture", 0], "mask": ["white", 0], "size": 64},
    "FineTunePromptNet": fine_tuning(),
    "SavePromptNet": {"promptnet": ["promptnet", 1]},
    "DecomposeImage": {"image": ["picture", 0]},
    "DecomposeSubject": {"subject": ["star", 0]},
    "CompositionSubject": {"composition": ["composition", 0]},
    "PickRepresentations": {"composition": ["composition", 0], "sketch": True},
    "MergeCompositions": {"composition1": ["composition", 0], "composition2": ["composition", 0]},
    "AlignComposition": {"composition": ["composition", 0]},
    "InterpolateCompositions": {"composition1": ["composition", 0], "composition2": ["composition", 0]},
    "InspectComposition": {"composition": ["composition", 0]},
    "SaveComposition": {"composition": ["composition", 0]},
    "LoadComposition": {},
    "Palette": {"image": ["picture", 0]},
    "PaletteToImage": {"palette": ["palette", 0]},
    "Sketch": {"image": ["picture", 0]},
    "InstanceMap": {"masks": ["white", 0]},
    "Intensity": {"image": ["picture", 0]},
    "RegionMask": {"image": ["picture", 0], "mask": ["left half", 0]},
    "LumaMerge": {"light": ["picture", 0], "color": ["picture", 0]},
    "LoadComposerAdapter": PARTS["adapter"][1],
    "ComposerConditioning": PARTS["composed"][1],
    "ComposeGuidance": {
        "model": ["adapter", 0],
        "adapter": ["adapter", 1],
        "clip": ["world", 1],
        "composition1": ["composition", 0],
        "composition2": ["composition", 0],
    },
    "BidirectionalGuidance": {
        "model": ["world", 0],
        "latent": ["latent", 0],
        "source": ["words", 0],
        "target": ["words", 0],
        "negative": ["words", 0],
        "steps": 1,
    },
    "ApplyRepresentation": {
        "positive": ["words", 0],
        "negative": ["words", 0],
        "composition": ["composition", 0],
        "control_net": ["t2i", 0],
    },
    "CompositionSemantics": {"composition": ["composition", 0]},
    "LoadCoAdapterFuser": PARTS["fuser"][1],
    "CoAdapterCondition": PARTS["sketch hint"][1],
    "ApplyCoAdapter": {
        "positive": ["words", 0],
        "negative": ["words", 0],
        "fuser": ["fuser", 0],
        "conditions.condition0": ["sketch hint", 0],
    },
    "LoadCaptionPrior": PARTS["prior"][1],
    "CaptionPrior": {"prior": ["prior", 0], "clip": ["world", 1], "caption": "a star"},
    "DrawScene": {},
    "ReadPicture": {"image": ["picture", 0]},
    "KSampler": sampled()[1],
}
"""Inputs with which each node runs, but for the defaults."""

NOTHING_TO_REFUSE = {
    "LoadShapeland",
    "AlignComposition",
    "InspectComposition",
    "Intensity",
    "PaletteToImage",
    "CompositionImages",
}
"""Take nothing, or whatever the host lets through."""


class Row(NamedTuple):
    """See the module's text."""

    node: str
    changes: dict
    sentence: str


MRSA = "Multi-Reference Self-Attention (FreeCustom)"
FUSION = "Multi-Concept Fusion (Concept Weaver)"

ROWS = [
    Row(
        "ReadPicture",
        {"references.reference0": ["blank picture", 0]},
        "references: expected pictures with a thing of Shapeland, got",
    ),
    Row("ReferenceSubject", {"image": ["pictures", 0]}, "image: expected one picture, got a batch of 3"),
    Row("ReferenceSubject", {"image": ["not finite", 0]}, "image: expected finite values"),
    Row("ReferenceSubject", {"noun": " "}, "noun: expected a word for the subject (such as dog), got an empty text"),
    Row("ReferenceSubject", {"mask": ["two masks", 1]}, "mask: expected one mask (height, width), got (2, 64, 64)"),
    Row("ReferenceSubject", {"mask": ["wide", 0]}, "mask: expected the shape of the picture (64x64), got 96x64"),
    Row(
        "ReferenceSubject",
        {"mask": ["black", 0]},
        "mask: expected white on the subject, got an empty mask (all black): paint the subject with the mask brush "
        "of Load Image's mask editor (its paint brush colors the picture), or remove the wire to use the whole picture",
    ),
    Row(
        "ReferenceSubject", {"target_mask": ["two masks", 1]}, "target_mask: expected one mask (height, width), got (2"
    ),
    Row(
        "ReferenceSubject",
        {"target_mask": ["black", 0]},
        "target_mask: expected white on the subject's place in the new picture, got an empty mask (all black): paint "
        "it, or remove the wire to let the subject appear anywhere",
    ),
    Row("ConceptCollage", {"context": ["pictures", 0]}, "context: expected one picture, got a batch of 3"),
    Row("ConceptCollage", {"placement": ["box", 0]}, "boxes: expected one per subject, got 1 for 2 subjects"),
    Row(
        "ConceptCollage", {"placement": ["two empty masks", 1]}, "mask: expected at least one pixel, got an empty mask"
    ),
    Row(
        "ConceptCollage",
        {"placement": ["two masks", 1], "feather": 0.0},
        'placement: expected a place where "star" is seen, got',
    ),
    Row(
        "ConceptCollage",
        {"subjects.subject0": None, "subjects.subject1": None},
        "subjects: expected at least one, got none",
    ),
    Row("MultiReferenceSelfAttention", {"subjects.subject1": None}, "subjects: expected at least one, got none"),
    Row(
        "MultiReferenceSelfAttention",
        {"model": ["misfits", 0]},
        "model: expected one of the families SD 1.x, SD 2.x, SDXL and Shapeland, got Identity",
    ),
    Row("MultiReferenceSelfAttention", {"vae": ["misfits", 3]}, "vae: expected one with 8 latent channels for this"),
    Row("MultiReferenceSelfAttention", {"vae": ["misfits", 2]}, "vae: expected the one of the model's checkpoint"),
    Row("MultiReferenceSelfAttention", {"clip": ["misfits", 1]}, "clip: expected the one of the model's checkpoint"),
    Row(
        "MultiReferenceSelfAttention",
        {"start_percent": 0.8, "end_percent": 0.2},
        "start_percent: expected at most end_percent (0.2), got 0.8",
    ),
    *(
        Row("MultiReferenceSelfAttention", {"blocks": "custom list", "blocks.numbers": numbers}, f"blocks: {sentence}")
        for numbers, sentence in (
            ("ten", 'expected numbers such as "10-15" or "3, 7-9", got \'ten\''),
            ("", "expected numbers such as"),
            ("15-10", "expected rising ranges, got '15-10'"),
            ("10-16", "expected numbers from 0 to 15 for this model, got 16"),
        )
    ),
    Row(
        "MultiReferenceSelfAttention",
        {"subjects.subject1": ["soft star", 0]},
        'mask_threshold: expected at most 0.3, the largest value in the mask of "star", got 0.5',
    ),
    Row("RecordAttentionShare", {"steps": "first"}, "steps: expected numbers such as"),
    Row(
        "RecordAttentionShare",
        {"blocks": "0-3"},
        "blocks: expected some of those where references are seen (10, 11, 12, 13, 14",
    ),
    Row(
        "AttentionShare",
        {"latent": ["canvas", 0]},
        "latent: expected the unchanged output of a sampler that uses the recorded",
    ),
    Row("AttentionShare", {"image": ["pictures", 0]}, "image: expected the 1 pictures of the latent, got 3"),
    Row("ConvertFastComposer", {"filename": "a/b"}, "filename: expected a name without folders or any of"),
    Row("ConvertFastComposer", {"filename": ""}, "filename: expected a name, got an empty text"),
    Row("SubjectEncoder", {"subjects.subject0": None}, "subjects: expected at least one, got none"),
    Row("FuseSubjects", {"subjects.subject0": None}, "subjects: expected at least one, got none"),
    Row(
        "FuseSubjects",
        {"subjects.subject0": ["star", 0]},
        "subjects: expected subjects from Subject Encoder (FastComposer), got",
    ),
    Row(
        "FuseSubjects",
        {"clip": ["skipping clip", 0]},
        "clip: expected its layer -1, as in training, got -2 (CLIP skip",
    ),
    *(
        Row("FuseSubjects", {"prompt": prompt, "subjects.subject0": [f"{who} embedded", 0]}, f"prompt: {sentence}")
        for who, prompt, sentence in (
            ("one", "@subject walks", "expected a word before the marker of subject 1, got the beginning"),
            ("one", "a star, @subject walks", "expected a word before the marker of subject 1, got ','"),
            ("two", "a star @subject @subject walks", "expected a word of its own for each subject, got 'star' for 1"),
            ("star and heart", "a star @subject walks", "expected one @subject per subject, got 1 for 2 subjects"),
            ("one", "a star @subject and a star @subject", "expected one @subject per subject, got 2 for 1 subjects"),
            ("one", "a house", "expected @subject after each subject's word, or the noun of each subject, got"),
            ("two", "a star walks", "expected @subject after each subject's word, or the noun of each subject, got"),
            ("one", "a star <|image|>", "expected @subject after each subject's word, got a <|image|>"),
        )
    ),
    *(
        Row("FuseSubjects", {"marker": mark}, "marker: expected a word without spaces, colons, parentheses")
        for mark in ("", "two words", "a:b", "(x)")
    ),
    Row(
        "DelayedSubjectConditioning",
        {"subject": ["delayed", 0]},
        "subject: expected a conditioning that does not switch yet, got a delayed one",
    ),
    Row(
        "DelayedSubjectConditioning",
        {"text_only": ["delayed", 0]},
        "text_only: expected a conditioning that does not switch yet",
    ),
    Row(
        "KSampler",
        {"positive": ["delayed", 0]},
        "Delayed Subject Conditioning: model: expected one from Load FastComposer",
    ),
    Row("LoadConcept", {"model": ["misfits", 0]}, "model: expected one of the families SD 1.x, SD 2.x, SDXL and"),
    Row(
        "LoadConcept",
        {"token_file": "fish.safetensors"},
        "token_file: expected none, for the file itself holds the token <star>",
    ),
    Row(
        "LoadConcept",
        {"placeholder": "two words"},
        "placeholder: expected a word without spaces, colons, parentheses or",
    ),
    Row("ConceptBank", {}, "concepts: expected at least one, got none"),
    Row(
        "ConceptBank",
        {"concepts.concept0": ["star concept", 0], "concepts.concept1": ["star concept", 0]},
        "concepts: expected a placeholder of its own for each",
    ),
    Row("SaveConcept", {"concept": ["bank", 0]}, "concept: expected one concept, got a bank of 2"),
    Row("SaveConcept", {"filename": "../a"}, "filename: expected a name without folders or any of"),
    Row("ConceptPrompts", {"texts": "a\nb"}, "texts: expected at most one line for each of the 1 concepts, got 2"),
    Row("ConceptPrompts", {"prompt": "a dog"}, "prompt: expected 'star' or <"),
    Row("ConceptPrompts", {"texts": "a star"}, "texts: expected <"),
    Row("ConceptPrompts", {"background": ["bank", 0]}, "background: expected one concept, got a bank of 2"),
    Row("ConceptPrompts", {"background": ["star concept", 0]}, "concepts: expected a placeholder of its own for each"),
    Row(
        "LoadSegmenter",
        {"kind": "SAM3", "kind.model": ["world", 0], "kind.clip": ["world", 1]},
        "model: expected SAM3 from Load Checkpoint, got",
    ),
    Row("TextToMasks", {"nouns": "horse"}, "nouns: expected things of Shapeland ("),
    Row("TextToMasks", {"nouns": " , "}, 'nouns: expected a list such as "dog, cat", got an empty text'),
    Row("TextToMasks", {"nouns": "star#0"}, "nouns: expected a noun, or one with #1, #2 ... or #all, got 'star#0'"),
    Row("TextToMasks", {"image": ["pictures", 0]}, "image: expected one picture, got a batch of 3"),
    Row("TextToMasks", {"nouns": "star#9"}, "image: expected something that looks like 'star#9', got a picture"),
    Row("ConceptMasks", {}, "masks: expected at least one, got none"),
    Row(
        "ConceptMasks",
        {"masks.mask0": ["white", 0], "masks.mask1": ["wide", 0]},
        "mask 1: expected the shape of the largest mask",
    ),
    Row(
        "ConceptMasks",
        {"masks.mask0": ["white", 0], "masks.mask1": ["left", 0]},
        "mask 2: expected a place of its own",
    ),
    Row(
        "ConceptMasks",
        {"masks.mask0": ["white", 0], "overlap": "higher score in front"},
        "detections: expected one per mask for 'higher score in front', got none for 1 masks",
    ),
    Row(
        "ConceptMasks",
        {"masks.mask0": ["white", 0], "image": ["pictures", 0]},
        "image: expected one picture, got a batch",
    ),
    Row("DDIMInversion", {"latent": ["blank", 2]}, "latent: expected an encoded or sampled picture, got an empty"),
    Row("DDIMInversion", {"latent": ["latent not finite", 2]}, "latent: expected finite values"),
    Row("DDIMInversion", {"latent": ["4 channels", 2]}, "latent: expected 8 channels for this model, got 4"),
    Row("DDIMInversion", {"latent": ["video", 2]}, "latent: expected pictures, got a video"),
    Row("DDIMInversion", {"latent": ["masked latent", 0]}, "latent: expected one without a noise mask"),
    Row(
        "DDIMInversion",
        {"conditioning": ["misfits", 4]},
        "conditioning: expected one prompt for the whole picture and all steps, got an empty one",
    ),
    Row(
        "DDIMInversion",
        {"conditioning": ["two conditionings", 0]},
        "conditioning: expected one prompt for the whole picture and all steps, got 2 that are combined",
    ),
    Row(
        "DDIMInversion",
        {"conditioning": ["three prompts", 3]},
        "conditioning: expected one prompt or as many as pictures (1), got 3",
    ),
    Row("RenewNoise", {"partition": ["wide partition", 0]}, "partition: expected the shape of the latent (16x16), got"),
    Row("RenewNoise", {"noise": ["video", 2]}, "noise: expected that of pictures, as DDIM Inversion gives it"),
    Row(
        "PlugAndPlayInjection",
        {"model": ["misfits", 0]},
        "model: expected one of the families SD 1.x, SD 2.x, SDXL",
    ),
    Row(
        "PlugAndPlayInjection",
        {"blocks": "custom list", "blocks.numbers": "1-4"},
        "blocks: expected decoder blocks with attention, of this model 3 to 11, got 1",
    ),
    Row("PlugAndPlayInjection", {"blocks": "custom list", "blocks.numbers": "ten"}, "blocks: expected numbers such as"),
    Row(
        "KSampler",
        {"model": ["plug", 0], "latent_image": ["wide canvas", 0]},
        "Plug-and-Play Injection: latent: expected the size and batch of the inversion (1, 8, 16, 16), got",
    ),
    Row(
        "KSampler",
        {"model": ["plugs", 0]},
        "Plug-and-Play Injection: latent: expected the size and batch of the inversion (3, 8",
    ),
    Row("MultiConceptFusion", {"model": ["misfits", 0]}, "model: expected one of the families SD 1.x, SD 2.x, SDXL"),
    Row(
        "MultiConceptFusion",
        {"partition": ["partition of two", 0]},
        "partition: expected one mask for each of the 1 concepts, got 2",
    ),
    Row(
        "MultiConceptFusion",
        {"start_percent": 0.5, "end_percent": 0.2},
        "start_percent: expected at most end_percent (0.2), got 0.5",
    ),
    Row(
        "MultiConceptFusion", {"mode": "scores", "end_percent": 0.5}, "mode: expected features where start_percent and"
    ),
    Row(
        "KSampler",
        {"model": ["wide fusion", 0]},
        f"{FUSION}: partition: expected the shape of the latent (16x16), got",
    ),
    Row(
        "KSampler",
        {"model": ["fusion", 0], "positive": ["two conditionings", 0]},
        f"{FUSION}: positive: expected one conditioning for the whole picture, got 2 of them",
    ),
    Row(
        "KSampler",
        {"model": ["fusion", 0], "positive": ["area", 0]},
        f"{FUSION}: positive: expected one conditioning for the whole picture, got one with area",
    ),
    Row("TrainConcept", {"class_word": ""}, "class_word: expected what kind of thing the concept is (such as dog)"),
    Row("TrainConcept", {"placeholder": "a b"}, "placeholder: expected a word without spaces, colons, parentheses or"),
    Row(
        "TrainConcept", {"captions": "a {}\na {}"}, "captions: expected one line, or one for each of 3 pictures, got 2"
    ),
    Row(
        "TrainConcept",
        {"captions": "a star"},
        "captions: expected {} exactly once, in the place of its word, got",
    ),
    Row("TrainConcept", {"masks": ["two masks", 1]}, "masks: expected one for each of 3 pictures, got 2"),
    Row(
        "TrainConcept",
        {"masks": ["wide", 0], "images": ["picture", 0]},
        "masks: mask 1: expected the shape of the picture (64x64",
    ),
    Row(
        "TrainConcept",
        {"masks": ["black", 0], "images": ["picture", 0]},
        "masks: mask 1: expected white on what is learned, got an empty one",
    ),
    Row("TrainConcept", {"masks": ["not finite masks", 1]}, "masks: mask 1: expected finite values"),
    Row("FusionGuider", {"subjects.subject0": None}, "subjects: expected at least one, got none; connect the prompt"),
    Row(
        "FusionGuider",
        {"subject_scale": 0.0, "text_scale": 0.0},
        "subject_scale: expected more than 0 here or in text_scale, got 0 in both",
    ),
    Row(
        "FusionSampler",
        {"start_percent": 0.8, "end_percent": 0.2},
        "start_percent: expected at most end_percent (0.2), got 0.8",
    ),
    Row(
        "FusionSampler",
        {"sampler": ["dpm_fast", 0]},
        "sampler: expected one that can run a single step, such as euler or heun, got dpm_fast",
    ),
    Row("PromptNetEncode", {"subjects.subject0": None}, "subjects: expected at least one, got none"),
    Row("PromptNetEncode", {"prompt": "a house"}, "prompt: expected @subject after each subject's word, or the noun"),
    Row(
        "PromptNetEncode",
        {"prompt": "a star @subject and a heart @subject"},
        "prompt: expected one @subject per subject, got 2 for 1 subjects",
    ),
    Row("PromptNetEncode", {"marker": "a:b"}, "marker: expected a word without spaces, colons, parentheses"),
    Row(
        "PromptNetEncode",
        {"promptnet": ["narrow promptnet", 1]},
        "clip: expected the text encoder of width 64 of this PromptNet, got one of width 128",
    ),
    Row(
        "KSampler",
        {"positive": ["promptnet words", 1]},
        "PromptNet Encode: model: expected one from Load PromptNet in the sampler, which makes the subject's word, got "
        "another (connect yours to Load PromptNet's input)",
    ),
    Row(
        "KSampler",
        {
            "model": ["promptnet", 0],
            "positive": ["promptnet words", 1],
            "latent_image": ["small canvas", 0],
        },
        "PromptNet Encode: latent: expected at least 64 pixels on each side for this PromptNet, got 32 x 32",
    ),
    Row("AugmentSubject", {"image": ["pictures", 0]}, "image: expected one picture, got a batch of 3"),
    Row("AugmentSubject", {"mask": ["wide", 0]}, "mask: expected the picture's size 64 x 64, got 96 x 64"),
    Row("AugmentSubject", {"mask": ["black", 0]}, "mask: expected white on the subject in the middle square"),
    Row("AugmentSubject", {"smallest": 1.5}, "smallest: expected a scale from 0 to largest (1), without 0, got 1.5"),
    Row("FineTunePromptNet", {"size": 512 - 64 + 1}, "size: expected a multiple of 32, at least 64, got 449"),
    Row(
        "FineTunePromptNet",
        {"captions": "a star"},
        "captions: expected {} exactly once, in the place of its word, got",
    ),
    Row("FineTunePromptNet", {"captions": ""}, "captions: expected one line, or one for each of 3 pictures, got 0"),
    Row("FineTunePromptNet", {"masks": ["two masks", 1]}, "masks: expected one for each of 3 pictures, got 2"),
    Row(
        "FineTunePromptNet",
        {"masks": ["two empty masks", 1], "images": ["picture", 0]},
        "masks: expected one for each of 1 pictures, got 2",
    ),
    Row(
        "FineTunePromptNet",
        {"promptnet": ["narrow promptnet", 1]},
        "clip: expected the text encoder of width 64 of this PromptNet, got one of width 128",
    ),
    Row("SavePromptNet", {"filename": "a/b"}, "filename: expected a name without folders or any of"),
    Row("DecomposeImage", {"image": ["pictures", 0]}, "image: expected one picture, got a batch of 3"),
    Row("DecomposeImage", {"image": ["not finite", 0]}, "image: expected finite values, got NaN or infinity"),
    Row(
        "DecomposeImage",
        {"sketch": ["wide picture", 0]},
        "sketch: expected the shape of the picture (64x64), got 96x64",
    ),
    Row("DecomposeImage", {"mask": ["white", 0]}, "mask: expected white on a part of the picture, got one that covers"),
    Row("DecomposeSubject", {"subject": ["collage", 2]}, "subject: expected one subject, got 2"),
    Row(
        "CompositionSubject",
        {},
        "composition: expected one with instances, got one without; connect Decompose Image with them",
    ),
    Row(
        "PickRepresentations", {"start_percent": 0.8, "end_percent": 0.2}, "start_percent: expected at most end_percent"
    ),
    Row("MergeCompositions", {}, "composition2: expected representations that composition1 does not have, got palette"),
    Row(
        "MergeCompositions",
        {"composition2": ["wide composition", 0], "policy": "first"},
        "composition2: expected the canvas of composition1, 64 x 64, got 96 x 64; connect Align Composition",
    ),
    Row("InterpolateCompositions", {"shares": "half"}, "shares: expected numbers from 0 to 1 such as 0.5, got 'half'"),
    Row("InterpolateCompositions", {"shares": "0, 2"}, "shares: expected numbers from 0 to 1 such as 0.5, got '0, 2'"),
    Row(
        "InterpolateCompositions",
        {"composition2": ["other composition", 0]},
        "palette: expected one over the same table and sigma (156 colors, 10), got 180 colors, 10",
    ),
    Row("SaveComposition", {"filename": ""}, "filename: expected a name, got an empty text"),
    Row("Palette", {"image": None}, "image: expected a picture, or colors such as #ff8000, got neither"),
    Row("Palette", {"colors": "#ff8000, blue"}, "colors: expected entries such as #ff8000 or #ff8000 3, got 'blue'"),
    Row("Palette", {"mask": ["black", 0]}, "mask: expected white on some pixels that are not transparent, got none"),
    Row("Palette", {"mask": ["wide", 0]}, "mask: expected the shape of the picture (64x64), got 96x64, which would"),
    Row("Sketch", {"image": ["pictures", 0]}, "image: expected one picture, got a batch of 3"),
    Row("InstanceMap", {"nouns": "star, heart"}, "nouns: expected one for each of 1 masks, got 2"),
    Row(
        "InstanceMap", {"masks": ["two empty masks", 1]}, "masks: expected white on each thing, got an empty mask for 1"
    ),
    Row(
        "RegionMask",
        {"mask": ["black", 0]},
        "mask: expected white on a part of the picture, got one that covers nothing",
    ),
    Row("RegionMask", {"mask": ["wide", 0]}, "mask: expected the shape of the picture (64x64), got 96x64, which would"),
    Row(
        "DecomposeImage", {"depth": ["picture", 0]}, "depth: expected a picture with near and far, got one that is the"
    ),
    Row(
        "DecomposeImage",
        {"sketch": ["picture", 0]},
        "sketch: expected a picture with strokes, got one that is the same",
    ),
    Row("LumaMerge", {"color": ["wide picture", 0]}, "color: expected the size of light, 64 x 64, got 96 x 64"),
    Row(
        "LumaMerge", {"light": ["pictures", 0], "color": ["two pictures", 0]}, "color: expected one picture or 3, as in"
    ),
    Row(
        "LoadComposerAdapter",
        {"file": "other.safetensors"},
        "model: expected one for this adapter (a test), got a model",
    ),
    Row(
        "ComposerConditioning",
        {"composition": ["other composition", 0]},
        "composition: expected a palette of 156 colors for this adapter, got one of 180 colors",
    ),
    Row(
        "ComposeGuidance",
        {"composition1": ["other composition", 0]},
        "composition: expected a palette of 156 colors for this adapter, got one of 180 colors",
    ),
    Row(
        "KSampler",
        {"positive": ["composed", 0]},
        "Composer Conditioning: model: expected one from Load Composer Adapter in the sampler, got another (connect "
        "yours to Load Composer Adapter's input)",
    ),
    Row("BidirectionalGuidance", {"latent": ["video", 2]}, "latent: expected"),
    Row(
        "ApplyRepresentation",
        {"representation": "depth"},
        "composition: expected one with depth, got one with palette",
    ),
    Row("CompositionSemantics", {}, "composition: expected one with semantics, got one with palette"),
    Row("CoAdapterCondition", {"image": ["pictures", 0]}, "image: expected one picture, got a batch of 3"),
    Row("ApplyCoAdapter", {"conditions.condition0": None}, "conditions: expected at least one, got none"),
    Row(
        "ApplyCoAdapter",
        {"conditions.condition1": ["sketch hint", 0]},
        "conditions: expected one of each kind, got two of sketch",
    ),
    Row("CaptionPrior", {"caption": " "}, "caption: expected what the picture is to show, got an empty text"),
    Row(
        "CaptionPrior",
        {"prior": ["narrow prior", 0]},
        "clip: expected a text encoder of width 64 for this prior, got one",
    ),
    Row("DrawScene", {"description": "a red unicorn"}, "description - Shapeland does not know the word 'unicorn'"),
]


def workflow_of(kind: str, inputs: dict, info: dict) -> dict:
    """A node under the id NODE as a workflow in API format, with all that it is linked to and one that shows it.

    What is not in `inputs` has the schema's default; None takes an input away.
    """
    workflow: dict[str, dict] = {}

    def add(name: str, kind: str, given: dict) -> None:
        given = {key: value for key, value in given.items() if value is not None}
        fields = live_fields(info[kind], given)
        defaults = {field.name: field.default for field in fields if field.is_widget and field.required}
        workflow[name] = {"class_type": kind, "inputs": {**defaults, **given}}
        for value in given.values():
            if isinstance(value, list) and value[0] not in workflow:
                add(value[0], *PARTS[value[0]])

    add(NODE, kind, inputs)
    workflow["shown"] = {"class_type": "PreviewAny", "inputs": {"source": [NODE, 0]}}
    return workflow


def told(server, workflow: dict) -> str:
    """What the client of a workflow is told: the server's refusal, or the id and message of the node that failed."""
    try:
        number = server.submit(workflow)
    except PromptError as refused:
        return str(refused)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        entry = server.get(f"/history/{number}").get(number)
        if entry is not None:
            errors = [detail for kind, detail in entry["status"]["messages"] if kind == "execution_error"]
            return "\n".join(f"{detail['node_id']}: {detail['exception_message'].strip()}" for detail in errors)
        time.sleep(0.01)
    raise TimeoutError(f"{number} did not end")


@pytest.fixture(scope="module")
def promptnets(server):
    """Small PromptNets with random weights, one of them of another width than Shapeland's text."""
    from conceptloom.encoders.promptnet import PromptNet, PromptNetConfig, save

    folder = server.base / "models" / "promptnet"
    folder.mkdir(parents=True, exist_ok=True)
    for name, width in (("tiny", 128), ("narrow", 64)):
        config = PromptNetConfig(
            (32,) * 4, (2,) * 4, latent_channels=8, vision_width=128, context_width=width, region=2
        )
        save(PromptNet(config), folder / f"{name}.safetensors")


@pytest.fixture(scope="module")
def composers(server, host):
    """Small files of Composer with random weights: adapters for Shapeland and for another model, priors, a fuser and a
    T2I-Adapter."""
    import comfy.t2i_adapter.adapter as t2i
    from conceptloom.encoders import composer_adapter
    from conceptloom.encoders.caption_prior import CaptionPrior, PriorConfig
    from conceptloom.encoders.coadapter import CoAdapterFuser
    from safetensors.torch import save_file

    def place(folder: str, name: str):
        path = server.base / "models" / folder
        path.mkdir(parents=True, exist_ok=True)
        return path / f"{name}.safetensors"

    config = {"sentence_width": 128, "semantics_width": 128, "local_width": 4, "body": (4,) * 4}
    for name, changes in {
        "tiny": {"levels": (64, 128, 128, 128), "context_width": 128},
        "other": {"base": "a test", "levels": (32, 64, 64, 64), "context_width": 128},
    }.items():
        net = composer_adapter.ComposerAdapter(composer_adapter.ComposerAdapterConfig(**config, **changes))
        composer_adapter.save(net, place("composer_adapters", name))
    for name, width in (("tiny", 128), ("narrow", 64)):
        save_file(CaptionPrior(PriorConfig(width, 64, 1, 1)).state_dict(), place("caption_priors", name))
    save_file(CoAdapterFuser((8, 16, 32, 32), 128, 8, 1).state_dict(), place("controlnet", "tiny_fuser"))
    net = t2i.Adapter([8, 16, 32, 32], 2, 192, 1, sk=True, use_conv=False, xl=False)
    save_file(net.state_dict(), place("controlnet", "tiny_t2i"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.node}-{row.sentence[:40]}")
def test_the_client_gets_the_sentence(row, server, promptnets, composers, object_info):
    ours = PREFIX + row.node
    node = object_info.get(ours)
    inputs = {**GOOD[row.node], **row.changes}
    message = told(server, workflow_of(row.node if node is None else ours, inputs, object_info))
    if node is None or row.node in REFUSED_BEFORE_THEY_RUN:
        assert row.sentence in message
    else:
        assert message.startswith(f"{NODE}: {node['display_name']}: {row.sentence}"), message
    assert "\n" not in message


BROKEN = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer: fetch the file itself"),
    "page": (b"<!DOCTYPE html><html></html>", "a web page: fetch the file itself, not the page about it"),
    "empty": (b"", "empty: fetch it again"),
    "pickle": (pickle.dumps({"a": [1.0] * 9}), "a pickle that torch did not write, which could run code"),
}


LOADERS = {
    "LoadConcept": ("concepts", "file", {}),
    "LoadFastComposer": ("fastcomposer", "file", {}),
    "ConvertFastComposer": ("fastcomposer", "file", {}),
    "LoadCaptionPrior": ("caption_priors", "file", {}),
    "LoadCoAdapterFuser": ("controlnet", "file", {}),
    "LoadComposerAdapter": ("composer_adapters", "file", {}),
    "LoadComposition": ("compositions", "file", {}),
    "LoadPromptNet": ("promptnet", "file", {}),
    "LoadSegmenter": ("sams", "sam", {"kind": "boxes + SAM", "kind.boxes": ["box", 0]}),
}
"""Of each node that reads weights: the folder in models, the input that names the file, and other inputs."""


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_broken_file_is_told_by_what_it_seems_to_be(loader, kind, server, object_info):
    content, what = BROKEN[kind]
    place, field, more = LOADERS[loader]
    folder = server.base / "models" / place
    folder.mkdir(exist_ok=True, parents=True)
    names = [f"{kind}.{ending}" for ending in ("safetensors", "bin", "pt")]
    for name in names:
        (folder / name).write_bytes(content)
    key = "kind.sam" if field == "sam" else field
    for name in names:
        inputs = {**GOOD.get(loader, PARTS["composer"][1]), **more, key: name}
        message = told(server, workflow_of(PREFIX + loader, inputs, object_info))
        assert message.startswith(
            f"{NODE}: {object_info[PREFIX + loader]['display_name']}: {field}: expected a file of weights, got {name}, "
            f"which seems to be {what}"
        )
        assert "\n" not in message


REFUSED_BEFORE_THEY_RUN = {"DrawScene"}
"""By `validate_inputs`: the frontend marks the node, so the sentence does not name it."""


def test_every_node_is_refused_something(object_info):
    ours = {name.removeprefix(PREFIX) for name in object_info if name.startswith(PREFIX)}
    assert ours == {row.node for row in ROWS if PREFIX + row.node in object_info} | NOTHING_TO_REFUSE | set(LOADERS)
