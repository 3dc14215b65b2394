"""Advice to the user: one call logs it and shows it on the node that it is about.

ComfyUI can show a text on any node while a workflow runs, and the frontend keeps the text afterwards. Advice that comes
up during sampling is shown on the node that patched the model, because the user can change the cause there.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from comfy_execution.progress import get_progress_state
from comfy_execution.utils import get_executing_context

log = logging.getLogger("conceptloom")

NO_ADVICE = "No warnings."
"""Replaces advice that no longer applies, because the frontend ignores an empty text."""

_shown: dict[tuple[str, str], tuple[str, list[str]]] = {}
"""What each node shows, by the node's id and class: the run that gave the advice, and its sentences. A node with the
same id in another workflow usually has another class."""


def executing_node() -> str | None:
    """Id of the node that ComfyUI is executing; None outside of a workflow."""
    context = get_executing_context()
    return None if context is None else context.node_id


def advise(name: str, sentence: str, node: str | None = None) -> None:
    """Logs a warning and shows it on a node, once per run of a workflow, below earlier advice of the same run.

    Args:
        name: the node's name in the menu, for the log.
        sentence: starts with a lowercase letter, and has no period at the end.
        node: id of the node to show it on; None means the executing node.
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
    """Removes the advice of earlier runs from a node; None means the executing node."""
    context = get_executing_context()
    if context is not None:
        node = _present(node, context.node_id)
        if _forget_earlier(node, context.prompt_id):
            _show(NO_ADVICE, node)


def _present(node: str | None, executing: str) -> str:
    """`node` if the workflow has it, else `executing`. A cached MODEL may come from a workflow with other nodes."""
    return node if node is not None and get_progress_state().dynprompt.has_node(node) else executing


def _forget_earlier(node: str, run: str) -> bool:
    """Forgets advice of another run on a node, and returns whether there was any."""
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
