"""Descriptions of the shipped workflows, one module per system; `tools/make_workflows.py` writes their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workflow_builder import Workflow

from . import (
    blueprints,
    composer,
    composer_sd15,
    concept_training,
    concept_weaver,
    fastcomposer,
    freecustom,
    profusion,
    structure,
)

WORKFLOWS: dict[str, Callable[[Workflow], None]] = {
    name: describe
    for module in (
        freecustom,
        fastcomposer,
        concept_weaver,
        concept_training,
        structure,
        profusion,
        composer,
        composer_sd15,
    )
    for name, describe in module.WORKFLOWS.items()
}

FOR_SCRIPTS: dict[str, Callable[[Workflow], None]] = {**composer.FOR_SCRIPTS}
"""Workflows for scripts, which no person opens."""

BLUEPRINTS: dict[str, Callable[[Workflow], dict]] = blueprints.BLUEPRINTS
"""Subgraphs that the node library offers."""

STAND_INS = {"comfyui_ipadapter_plus": Path(__file__).parent / "ipadapter_nodes"}
"""Packs with the interface of other packs' nodes in a workflow, under the ids of those packs."""
