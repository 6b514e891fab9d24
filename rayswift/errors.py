"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line that names the flag or ``file:line`` and the mend; the command line
    prints it without a traceback and exits with status 2."""
