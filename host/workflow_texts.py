"""Reads the text of a sampler's prompt from the workflow that is being run.

A conditioning contains tensors, but no text. The workflow contains the text if it is in a text encoder's own widget.
Text that other nodes compute is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

# The inputs that each text encoder encodes unchanged. How other encoders use their text is not known.
_ENCODERS = {
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("text_g", "text_l"),
    "ConceptLoomFuseSubjects": ("prompt",),
    "ConceptLoomConceptPrompts": ("prompt",),
}
# A tuple and not a set, because the type of an output may be a list, which is not hashable.
_CARRIERS = ("CONDITIONING", "GUIDER", "CONCEPTLOOM_CONCEPT_PROMPTS")


def executing_prompt() -> str | None:
    """The positive prompt of the sampler that ComfyUI is executing; None if it cannot be read."""
    context = get_executing_context()
    if context is None:
        return None
    from nodes import NODE_CLASS_MAPPINGS  # ComfyUI's module, which exists only while ComfyUI runs

    workflow = get_progress_state().dynprompt
    return positive_prompt(
        workflow.get_node, context.node_id, lambda kind, output: NODE_CLASS_MAPPINGS[kind].RETURN_TYPES[output]
    )


def positive_prompt(node_of: Callable[[str], Mapping], sampler: str, type_of: Callable[[str, int], str]) -> str | None:
    """All texts that a sampler's positive conditioning is made from, one per line.

    Args:
        node_of: returns a node of a workflow in API format by its id.
        sampler: id of the sampler.
        type_of: returns the type of an output by the node's class and the index of the output.

    Returns:
        None if there is no text, or if a text is not written in the workflow.
    """
    texts: list[str] = []
    waiting, seen = [sampler], set()
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        node = node_of(number)
        kind, inputs = node["class_type"], node["inputs"]
        if kind in _ENCODERS:
            found = [inputs.get(name) for name in _ENCODERS[kind]]
            if not all(isinstance(text, str) for text in found):
                return None
            texts += found
            continue
        links = {name: value for name, value in inputs.items() if isinstance(value, list) and name != "negative"}
        before = [
            source for source, output in links.values() if type_of(node_of(source)["class_type"], output) in _CARRIERS
        ]
        if not before:
            return None
        waiting += before
    return "\n".join(texts) or None
