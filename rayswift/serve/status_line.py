"""The status line of ``rayswift deploy``: replicas, requests and tokens per second, how many run and wait."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from rayswift.console import printable


@dataclass
class StatusLine:
    """Shows the difference between two looks at the gateway's counters. ``live``: one line that is written over."""

    stream: TextIO
    live: bool
    interval: float
    _last: dict[str, Any] = field(default_factory=dict)
    _time: float = 0.0

    def show(self, stats: dict[str, Any], replicas: dict[str, str]) -> None:
        """Write one look. ``replicas``: model → ``running/all``."""
        now = time.monotonic()
        seconds = max(1e-6, now - self._time) if self._last else float("inf")
        # What counted may have been started again, and counts from none.
        rates = {name: max(0, stats[name] - self._last.get(name, 0)) / seconds for name in ("requests", "tokens")}
        self._last, self._time = stats, now
        shown = "  ".join(f"{printable(model)} {count}" for model, count in replicas.items())
        text = (
            f"replicas {shown} | {rates['requests']:.1f} requests/s  {rates['tokens']:.0f} tokens/s | "
            f"{stats['running']} running  {stats['waiting']} waiting | {stats['requests']} requests  "
            f"{stats['errors']} errors  {stats['resumed']} resumed"
        )
        self.stream.write(f"\r\033[K{text}" if self.live else f"{text}\n")
        self.stream.flush()

    def end(self) -> None:
        """Leave the line."""
        if self.live:
            self.stream.write("\n")
            self.stream.flush()
