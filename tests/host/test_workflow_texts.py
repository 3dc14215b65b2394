"""What a sampler's prompt says, read from a workflow in API format."""

import pytest

OUTPUTS = {
    "CLIPTextEncode": ["CONDITIONING"],
    "CLIPTextEncodeFlux": ["CONDITIONING"],
    "ControlNetApplyAdvanced": ["CONDITIONING", "CONDITIONING"],
    "CFGGuider": ["GUIDER"],
    "ConceptLoomConceptPrompts": ["CONCEPTLOOM_CONCEPT_PROMPTS", "STRING"],
    "ConceptLoomMultiConceptFusion": ["MODEL", "CONDITIONING", "CONDITIONING"],
    "PrimitiveString": ["STRING"],
    "Loader": ["MODEL", ["a", "b"]],
}


def text(words):
    return {"class_type": "CLIPTextEncode", "inputs": {"text": words, "clip": ["loader", 0]}}


WORKFLOW = {
    "loader": {"class_type": "Loader", "inputs": {}},
    "dog": text("a dog"),
    "cat": text("a cat"),
    "blurry": text("blurry"),
    "computed": text(["string", 0]),
    "string": {"class_type": "PrimitiveString", "inputs": {"value": "a bird"}},
    "unknown": {"class_type": "CLIPTextEncodeFlux", "inputs": {"clip_l": "a dog", "t5xxl": "a dog"}},
    "control": {
        "class_type": "ControlNetApplyAdvanced",
        "inputs": {"positive": ["dog", 0], "negative": ["blurry", 0], "strength": 1.0},
    },
    "combined": {
        "class_type": "ConditioningCombine",
        "inputs": {"conditioning_1": ["control", 0], "conditioning_2": ["cat", 0]},
    },
    "half": {
        "class_type": "ConditioningCombine",
        "inputs": {"conditioning_1": ["computed", 0], "conditioning_2": ["cat", 0]},
    },
    "guider": {
        "class_type": "CFGGuider",
        "inputs": {"model": ["fused", 0], "positive": ["fused", 1], "negative": ["fused", 2]},
    },
    "fused": {"class_type": "ConceptLoomMultiConceptFusion", "inputs": {"prompts": ["prompts", 0]}},
    "prompts": {"class_type": "ConceptLoomConceptPrompts", "inputs": {"prompt": "a house", "negative_prompt": "ugly"}},
}


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"positive": ["dog", 0], "negative": ["blurry", 0], "name": ["loader", 1]}, {"a dog"}),
        ({"positive": ["combined", 0], "negative": ["blurry", 0]}, {"a dog", "a cat"}),
        ({"guider": ["guider", 0]}, {"a house"}),
        ({"positive": ["computed", 0]}, None),
        ({"positive": ["half", 0]}, None),
        ({"positive": ["unknown", 0]}, None),
        ({"model": ["loader", 0]}, None),
    ],
)
def test_the_positive_prompt_is_read_where_it_is_written(host, inputs, words):
    from conceptloom.host.workflow_texts import positive_prompt

    workflow = {**WORKFLOW, "sampler": {"class_type": "KSampler", "inputs": {**inputs, "seed": 1}}}
    kinds = {**OUTPUTS, "ConditioningCombine": ["CONDITIONING"]}
    said = positive_prompt(workflow.__getitem__, "sampler", lambda kind, output: kinds[kind][output])
    assert said == words if words is None else set(said.splitlines()) == words
