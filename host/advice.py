"""Advice that a person must see: one call logs it and shows it on the node that it is about.

The host can show a text on any node while a workflow runs, and the frontend keeps it there afterwards. What a model
finds out while a sampler runs is shown on the node that patched the model, where it can be mended.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

log = logging.getLogger("conceptloom")

NO_ADVICE = "No warnings."
"""Replaces advice that no longer holds: the frontend ignores an empty text."""

_shown: dict[tuple[str, str], tuple[str, list[str]]] = {}
"""By a node's id and class what is shown on it: the run that said it, and its sentences. Another workflow's node of the
same id is mostly of another class."""


def executing_node() -> str | None:
    """Id of the node that the host executes now; None outside of a workflow."""
    context = get_executing_context()
    return None if context is None else context.node_id


def advise(name: str, sentence: str, node: str | None = None) -> None:
    """Logs a warning and shows it on a node, once per run of a workflow, after what was said before.

    Args:
        name: of the node, as the menu shows it, for the log.
        sentence: begins with a small letter and ends without a full stop.
        node: id of the node to show it on; None means the one that is executed.
    """
    context = get_executing_context()
    if context is None:
        log.warning("%s: %s", name, sentence)
        return
    node = _present(node, context.node_id)
    _forget_earlier(node, context.prompt_id)
    _, sentences = _shown.setdefault(_key(node), (context.prompt_id, []))
    if sentence not in sentences:
        log.warning("%s: %s", name, sentence)
        sentences.append(sentence)
        _show(_written(sentences), node)


def inform(name: str, sentence: str, node: str | None = None) -> None:
    """Logs what is good to know and shows it on a node, after the run's advice there.

    Args:
        name, sentence, node: as for `advise`.
    """
    log.info("%s: %s", name, sentence)
    context = get_executing_context()
    if context is not None:
        node = _present(node, context.node_id)
        run, sentences = _shown.get(_key(node), (None, []))
        _show(_written([*(sentences if run == context.prompt_id else []), sentence]), node)


def withdraw_earlier(node: str | None = None) -> None:
    """Takes advice of earlier runs off a node; None means the one that is executed."""
    context = get_executing_context()
    if context is not None:
        node = _present(node, context.node_id)
        if _forget_earlier(node, context.prompt_id):
            _show(NO_ADVICE, node)


def _present(node: str | None, executing: str) -> str:
    """The node, or the executed one if the workflow has no such node, as where a MODEL was kept from another."""
    return node if node is not None and get_progress_state().dynprompt.has_node(node) else executing


def _forget_earlier(node: str, run: str) -> bool:
    """Whether there was advice of another run, which is now forgotten."""
    key = _key(node)
    return key in _shown and _shown[key][0] != run and _shown.pop(key) is not None


def _key(node: str) -> tuple[str, str]:
    return node, get_progress_state().dynprompt.get_node(node)["class_type"]


def _written(sentences: Sequence[str]) -> str:
    return "\n".join(f"{one[0].upper()}{one[1:]}." for one in sentences)


def _show(text: str, node: str) -> None:
    from server import PromptServer  # only a running server executes nodes

    server = PromptServer.instance
    if server.client_id is not None:
        server.send_progress_text(text, node, server.client_id)
