"""Shapeland: a small drawn world whose every picture comes with its ground truth, and the tiny models trained on it."""
