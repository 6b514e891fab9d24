"""Where a worker's time goes, and whether it still gets on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

#: What a worker does, one thing at a time: load the model, wait for rows, train, evaluate, save.
PHASES = ("start", "data", "step", "evaluation", "checkpoint")


class Clock:
    """Seconds by phase. ``ticks`` counts its signs of life, ``ticked`` is the time of the last one."""

    def __init__(self) -> None:
        self._seconds, self._phase = dict.fromkeys(PHASES, 0.0), PHASES[0]
        self._entered = self.ticked = time.monotonic()
        self.ticks = 0

    @property
    def phase(self) -> str:
        """What the worker does."""
        return self._phase

    def enter(self, phase: str) -> None:
        """From now on it does this."""
        self.tick()
        self._seconds[self._phase] += self.ticked - self._entered
        self._phase, self._entered = phase, self.ticked

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """The block does this."""
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def tick(self) -> None:
        """It gets on."""
        self.ticks, self.ticked = self.ticks + 1, time.monotonic()

    def read(self) -> dict[str, float]:
        """The seconds of each phase until now."""
        return self._seconds | {self._phase: self._seconds[self._phase] + time.monotonic() - self._entered}
