"""The face of the pack: every node the host sees is listed here, in the order of its menu."""

from comfy_api.latest import ComfyExtension

from . import concepts, fastcomposer, freecustom, inversion, masks, shapeland, subjects, training, weaver
from .types import Node

NODES: list[type[Node]] = [
    node
    for module in (subjects, freecustom, fastcomposer, training, concepts, masks, inversion, weaver, shapeland)
    for node in module.NODES
]


class ConceptLoomExtension(ComfyExtension):
    """What the host asks for when it loads the pack."""

    async def get_node_list(self) -> list[type[Node]]:
        return list(NODES)


async def comfy_entrypoint() -> ConceptLoomExtension:
    """Found by name by the host's loader."""
    return ConceptLoomExtension()
