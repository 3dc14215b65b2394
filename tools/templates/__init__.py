"""Descriptions of the shipped workflows, one module per system; `tools/make_workflows.py` writes their files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from workflow_builder import Workflow

from . import composer, concept_training, concept_weaver, fastcomposer, freecustom, profusion, structure

WORKFLOWS: dict[str, Callable[[Workflow], None]] = {
    **freecustom.WORKFLOWS,
    **fastcomposer.WORKFLOWS,
    **concept_weaver.WORKFLOWS,
    **concept_training.WORKFLOWS,
    **structure.WORKFLOWS,
    **profusion.WORKFLOWS,
    **composer.WORKFLOWS,
}

FOR_SCRIPTS: dict[str, Callable[[Workflow], None]] = {**composer.FOR_SCRIPTS}
"""Workflows for scripts, which no person opens."""

STAND_INS = {"comfyui_ipadapter_plus": Path(__file__).parent / "ipadapter_nodes"}
"""Packs with the interface of other packs' nodes in a workflow, under the ids of those packs."""
