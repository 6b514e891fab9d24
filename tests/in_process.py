"""Run ``rayswift`` commands in this process: what a new one would add is the seconds of its imports."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from dataclasses import dataclass
from unittest import mock


@dataclass(frozen=True)
class Done:
    """What a shell would see of a command."""

    returncode: int
    stdout: str
    stderr: str


def rayswift(*words: str, stdin: str = "") -> Done:
    """The command with its streams replaced; logging is set up anew, as in a process that has just begun."""
    from rayswift.cli.main import main

    root, own = logging.getLogger(), logging.getLogger("rayswift")
    handlers, levels = root.handlers[:], (root.level, own.level)
    root.handlers[:] = []
    out, err = io.StringIO(), io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        ):
            status = main(words)
    finally:
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        own.setLevel(levels[1])
    return Done(status, out.getvalue(), err.getvalue())
