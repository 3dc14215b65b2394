"""The face of the pack: every node the host sees is listed here, in the order of its menu."""

from comfy_api.latest import ComfyExtension, io

from . import fastcomposer, freecustom, shapeland, subjects

NODES: list[type[io.ComfyNode]] = [*subjects.NODES, *freecustom.NODES, *fastcomposer.NODES, *shapeland.NODES]


class ConceptLoomExtension(ComfyExtension):
    """What the host asks for when it loads the pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)


async def comfy_entrypoint() -> ConceptLoomExtension:
    """Found by name by the host's loader."""
    return ConceptLoomExtension()
