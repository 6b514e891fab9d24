"""``--step_timeout``: a worker that does not get on says where it is; the driver ends the run and names it.

In each worker a thread looks at the clock that training ticks. Workers wait for each other, so all of them report when
one hangs; that one is told by its stack, which is in no collective operation, by how far it came, or by its silence.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayswift.train.clock import Clock
    from rayswift.train.loader import Rank

#: What a thread that waits for other workers is in; on GPUs, whose operations run behind it, it waits for the device.
_WAITING = (
    "torch/distributed/", "torch/autograd/graph.py", "deepspeed/comm/", "train/stopping.py",
    "trainers/checked_steps.py:_get_grad_norm", "trainers/step.py:_all_reduce",
)  # fmt: skip
#: Frames of an operation's own library, which say less than who called it.
_LIBRARIES = ("site-packages", "dist-packages", "/lib/python")


def watch(clock: Clock, rank: Rank, timeout: float, push: Callable[[dict[str, Any]], None]) -> None:
    """Watch the calling thread, from its first step on."""
    watched = threading.get_ident()

    def look() -> None:
        while True:
            left = timeout - (time.monotonic() - clock.ticked)
            if left > 0 or clock.phase == "start":
                time.sleep(min(max(left, 0.1), 1.0))
                continue
            stack = traceback.extract_stack(sys._current_frames().get(watched))
            frames = [(frame.filename, frame.lineno or 0, frame.name) for frame in stack]
            push({"event": "hang", "rank": rank.rank, "workers": rank.world_size, "ticks": clock.ticks,
                  "phase": clock.phase, "frames": frames})  # fmt: skip
            return

    threading.Thread(target=look, name="rayswift-watch", daemon=True).start()


def is_waiting(frames: list[tuple[str, int, str]]) -> bool:
    """Whether a stack, innermost frame last, is one that waits for other workers."""
    inner = [f"{file.replace(os.sep, '/')}:{name}" for file, _, name in frames[-3:]]
    return any(part in one for one in inner for part in _WAITING)


def blame(reports: dict[int, dict[str, Any]], workers: int) -> list[int]:
    """The workers that the others wait for: those that say nothing; else those that wait for nobody; else those that
    came least far."""
    if silent := [rank for rank in range(workers) if rank not in reports]:
        return silent
    busy = [rank for rank, report in reports.items() if not is_waiting(report["frames"])]
    ticks = min(report["ticks"] for report in reports.values())
    return sorted(busy or [rank for rank, report in reports.items() if report["ticks"] == ticks])


def hang_line(reports: dict[int, dict[str, Any]], workers: int, timeout: float) -> str:
    """Which workers hang, and where, in one line."""
    found = []
    for rank in blame(reports, workers):
        if rank in reports:
            found.append(f"worker {rank} hangs in {where(reports[rank]['frames'])} ({reports[rank]['phase']})")
        else:
            found.append(f"worker {rank} does not answer at all")
    return f"nothing got on for {timeout:g} s (--step_timeout): {'; '.join(found)}"


def where(frames: list[tuple[str, int, str]]) -> str:
    """The innermost frame, and the innermost one that is no library's."""
    inner = _frame(frames[-1]) if frames else "nothing"
    own = next((frame for frame in reversed(frames) if not any(part in frame[0] for part in _LIBRARIES)), None)
    return inner if own is None or own == frames[-1] else f"{inner}, called from {_frame(own)}"


def _frame(frame: tuple[str, int, str]) -> str:
    return f"{frame[0]}:{frame[1]} {frame[2]}"


def stacks_text(reports: dict[int, dict[str, Any]]) -> str:
    """The stack of every worker that told it."""
    parts = [f"worker {rank}, {reports[rank]['phase']}:\n" + "\n".join(f"  {_frame(one)}" for one in
             reports[rank]["frames"]) for rank in sorted(reports)]  # fmt: skip
    return "\n\n".join(parts) + "\n"
