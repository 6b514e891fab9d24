"""Lines for the person at the terminal, who may be reading a pipe: each is there as soon as it is said."""

from __future__ import annotations


def say(line: str) -> None:
    """Print a line now."""
    print(line, flush=True)
