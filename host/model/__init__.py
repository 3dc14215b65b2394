"""Access to a diffusion model: sites, patches, layer hooks and extra forward passes."""
