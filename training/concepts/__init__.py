"""Training of concepts for Concept Weaver: Custom Diffusion (arXiv 2212.04488), in whole matrices or in factors."""
