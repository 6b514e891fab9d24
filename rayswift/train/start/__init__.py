"""Fewer processes and warm workers for a run on one machine."""
