"""Whether a system works and what it costs."""
