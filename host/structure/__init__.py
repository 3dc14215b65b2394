"""Keeps the structure of one picture in another: DDIM inversion and Plug-and-Play injection."""
