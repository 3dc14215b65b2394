"""Concept Weaver (arXiv 2404.03913) on the host: concepts, their training, and their fusion."""
