"""Training of the models that ConceptLoom ships and of those its users make."""
