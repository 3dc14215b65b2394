"""FastComposer (arXiv 2305.10431) in ComfyUI."""
