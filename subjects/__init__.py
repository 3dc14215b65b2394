"""Subjects: their masks, their places in a collage or a partition, and the choice between detected instances."""
