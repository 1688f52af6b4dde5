"""Measurements, one script a subject; each docstring opens with its command."""
