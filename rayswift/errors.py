"""The exceptions that the command line prints in one line instead of a traceback, and errors as one line."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line that names the flag or ``file:line`` and the mend; the command line
    prints it without a traceback and exits with status 2."""


class RunFailedError(RuntimeError):
    """Work that began and could not be ended, for no fault of the command (a worker died once too often). The message
    says what failed, why, and how to go on; the command line exits with status 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, as clusters and ``kill`` send it: what runs ends as with Ctrl-C; the command line exits with 143."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of ``error`` on one line of at most ``limit`` characters; its class where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def telling_line(text: str, default: str = "no reason given") -> str:
    """The line of a traceback or log that says what went wrong: the last one with an error in it, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error" in line]
    return (telling or lines or [default])[-1]
