"""How anything gets into a model: sites, patches, forward passes of our own."""
