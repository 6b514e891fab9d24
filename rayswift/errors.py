"""The two exceptions that the command line prints in one line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line that names the flag or ``file:line`` and the mend; the command line
    prints it without a traceback and exits with status 2."""


class RunFailedError(RuntimeError):
    """Work that began and could not be ended, for no fault of the command (a worker died once too often). The message
    says what failed, why, and how to go on; the command line exits with status 1."""
