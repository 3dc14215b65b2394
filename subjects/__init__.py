"""What a subject is: its mask, its place in a collage or a partition, and which of several things is meant."""
