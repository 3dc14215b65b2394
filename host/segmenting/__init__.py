"""What finds things in a picture by their nouns."""
