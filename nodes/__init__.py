"""Entry point of the pack. Its nodes are listed here in the order of the menu."""

from comfy_api.latest import ComfyExtension

from . import (
    composer,
    composing,
    compositions,
    concepts,
    fastcomposer,
    finetuning,
    freecustom,
    fusion_sampling,
    inversion,
    masks,
    palettes,
    prior,
    profusion,
    representations,
    routers,
    shapeland,
    subjects,
    training,
    weaver,
)
from .types import Node

NODES: list[type[Node]] = [
    node
    for module in (
        subjects,
        freecustom,
        fastcomposer,
        training,
        concepts,
        masks,
        inversion,
        weaver,
        profusion,
        finetuning,
        fusion_sampling,
        compositions,
        composing,
        composer,
        palettes,
        representations,
        routers,
        prior,
        shapeland,
    )
    for node in module.NODES
]


class ConceptLoomExtension(ComfyExtension):
    """Lists the pack's nodes for ComfyUI."""

    async def get_node_list(self) -> list[type[Node]]:
        return list(NODES)


async def comfy_entrypoint() -> ConceptLoomExtension:
    """Called by ComfyUI, whose loader finds it by name."""
    return ConceptLoomExtension()
