"""FreeCustom (arXiv 2405.13870) on the host."""
