"""A picture's structure, taken from one and kept in another: inversion and Plug-and-Play."""
