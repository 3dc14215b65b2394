"""Compositions: a picture taken apart into eight representations, and what is done with them (Composer)."""
