"""Sampling loops and schedules as pure functions."""
