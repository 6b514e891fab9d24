"""Failures of a run: what is said of them, and which are worth another try."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rayswift.errors import RunFailedError, UserError, one_line

#: Characters of a message that the line which ends a run may have.
LIMIT = 4000
#: How workers say that another one is gone: no fault of theirs, and not always said in the same way.
_OF_OTHERS = re.compile(r"(?i)gloo|nccl|closed by peer|connection (reset|refused|closed)|broken pipe")


_OF_CODE = (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError, ImportError)


class StepFailedError(RunFailedError):
    """Training failed in a worker. The message says behind which step, and what: the same again is the same failure."""


def at_step(error: Exception, step: int, has_begun: bool) -> RunFailedError:
    """An error of the trainer with the step that it came after. ``has_begun``: this start of the workers has trained a
    step; what stands in the way of the first is no accident where it is of a kind that only code raises."""
    kind = StepFailedError if has_begun or not isinstance(error, _OF_CODE) else RunFailedError
    return kind(f"after step {step}: {type(error).__name__}: {one_line(error, LIMIT)}")


class Failures:
    """Those of one run, one after the other."""

    def __init__(self) -> None:
        self._before: set[str] = set()

    def is_final(self, failures: Mapping[int, BaseException]) -> bool:
        """Whether trying again would end in the same way: a fault of the input, one that a worker calls final, or what
        failed in the same way at the same step before. ``failures``: errors by rank; that a worker died is none of it.
        """
        errors = list(failures.values())
        if any(isinstance(error, (UserError, RunFailedError)) and not isinstance(error, StepFailedError)
               for error in errors):  # fmt: skip
            return True
        said = {str(error) for error in errors if isinstance(error, StepFailedError)}
        repeated = said & self._before
        self._before = {line for line in said if not _OF_OTHERS.search(line)}
        return bool(repeated) and all(isinstance(error, StepFailedError) for error in errors)


def ended_by(failures: Mapping[int, BaseException], error: BaseException) -> Exception:
    """What a command ends with when its training failed: one line with the worker and the whole message. ``error`` is
    that of Ray Train, ``failures`` those of its workers."""
    rank, cause = min(failures.items(), key=lambda item: _importance(item[1]), default=(None, error))
    if isinstance(cause, UserError):
        return cause
    where = f"worker {rank}" if rank is not None else "the training controller"
    return RunFailedError(f"training failed in {where}{_told(cause)}")


def _importance(error: BaseException) -> int:
    """What others only follow from comes first."""
    if isinstance(error, UserError):
        return 0
    if isinstance(error, RunFailedError):
        return 3 if _OF_OTHERS.search(str(error)) else 1
    return 2


def _told(error: Any) -> str:
    from ray.exceptions import RayError

    if isinstance(error, RunFailedError):
        return f" {one_line(error, LIMIT)}"
    if isinstance(error, RayError):  # many lines about the process, the last of which says how it ended
        error = (str(error).strip().splitlines() or [""])[-1]
        return f": {one_line(RuntimeError(error), LIMIT)}"
    return f": {type(error).__name__}: {one_line(error, LIMIT)}"
