"""Concept Weaver (arXiv 2404.03913) in ComfyUI: concepts, their training, and their fusion."""
