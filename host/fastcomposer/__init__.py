"""FastComposer (arXiv 2305.10431) on the host."""
