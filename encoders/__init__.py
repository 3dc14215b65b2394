"""What turns pictures and words into conditions, and the formats of their files."""
