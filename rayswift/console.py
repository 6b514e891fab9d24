"""Lines for the person at the terminal, who may be reading a pipe: each is there as soon as it is said.

Much of what is said was written by others: rows, names, models' answers. None of it steers the terminal.
"""

from __future__ import annotations

import re
import sys

from rayswift.redaction import mask_known

#: Control characters but for line ends and tabs, and those that turn the direction of text.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text whose control characters are spelled out, but for line ends and tabs."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def say(line: object, end: str = "\n") -> None:
    """Print a line now: without control characters and known secrets, on a terminal that lacks a character its code."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = mask_known(printable(str(line)))
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
