"""Training of the models that ship with ConceptLoom, and of its users' own models."""
