"""Finds objects in a picture by nouns, and returns their masks."""
