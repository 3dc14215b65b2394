"""FreeCustom (arXiv 2405.13870) in ComfyUI."""
