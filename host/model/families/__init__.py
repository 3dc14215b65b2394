"""What a kind of model calls its parts, a file per kind."""
