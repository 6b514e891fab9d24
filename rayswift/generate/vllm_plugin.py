"""vLLM on CPUs: its processes sleep while they wait for each other, and its threads get every core.

vLLM 0.32 starts a worker process whose threads are bound to all cores but one, and its engine process polls the shared
memory between the two without a pause: that poll takes the core that was left out. Where the poll sleeps, the core is
free, and on a machine of few cores the engine is a third to a half faster with it.

A general plugin of vLLM (https://docs.vllm.ai/en/latest/design/plugin_system/), which vLLM loads in each of its
processes. It does nothing unless :data:`SWITCH` is set: a vLLM that RaySwift did not start is left alone.
"""

from __future__ import annotations

import os
import time
from typing import Any

from rayswift import private

#: Environment variable that RaySwift sets for its engines on CPUs.
SWITCH = "RAYSWIFT_CPU_ENGINE"
#: A pause is this share of the time that was waited already: what it can add to a step.
PAUSE_SHARE = 0.05
SHORTEST_PAUSE = 0.0001
LONGEST_PAUSE = 0.005
#: One that has waited long is woken by a message; it looks by itself after so many milliseconds.
IDLE_MS = 100
#: Up to so many cores the engine gets them all; on more, vLLM's choice (all but one for its other processes).
ALL_OF_CORES = 4


def register() -> None:
    """What vLLM calls."""
    if os.environ.get(SWITCH) != "1":
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= ALL_OF_CORES:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    condition = private.spin_condition()
    if condition is not None and not hasattr(condition, "began_waiting"):
        sleep_while_waiting(condition)


def sleep_while_waiting(condition: Any) -> None:
    """Have ``condition`` (the class with which vLLM waits for shared memory) pause between its looks."""
    wait_for_message, record_read = condition.wait, condition.record_read
    condition.began_waiting = None

    def wait(self: Any, timeout_ms: int | None = None) -> None:
        now = time.monotonic()
        if self.began_waiting is None:
            self.began_waiting = now
        waited = now - self.began_waiting
        if waited <= self.busy_loop_s:
            time.sleep(min(max(waited * PAUSE_SHARE, SHORTEST_PAUSE), LONGEST_PAUSE))
        else:
            wait_for_message(self, IDLE_MS if timeout_ms is None else min(timeout_ms, IDLE_MS))

    def read(self: Any) -> None:
        self.began_waiting = None
        record_read(self)

    condition.wait, condition.record_read = wait, read
