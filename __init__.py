"""ConceptLoom: many chosen subjects in one picture, as ComfyUI nodes."""

import sys

WEB_DIRECTORY = "./nodes/web"

# pytest imports this file too, as it does every directory's above a test, and has no host around it.
if "folder_paths" in sys.modules:
    from .nodes import comfy_entrypoint  # noqa: F401 (the host looks it up by name)
