"""Runs of a training command, timed by the rows of its log: neither start nor first data counts."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from harness.environments import CACHE
from harness.measure import fail, side_environ
from harness.memory import Memory, MemoryWatch


@dataclass(frozen=True)
class Training:
    """Seconds between the first and the last step's row, tokens of a row, the steps' losses, peak memory in MiB (of the
    card, where one trains)."""

    seconds: float
    tokens_per_row: float
    losses: list[float]
    peak: float


def train(
    name: str, command: list[str | Path], place: Path, steps: int, cache: Path | None = None, gpu: bool = False
) -> Training:
    """Run a training command to its end, noting when the log in ``place``/output has its rows. ``cache``: of both
    sides; without it each has its own. ``gpu``: it may use one.

    Raises:
        SystemExit: it failed, or made fewer steps.
    """
    log, times, memory = CACHE / f"{name}_sft.log", {}, list[Memory]()
    with log.open("w") as terminal:
        process = subprocess.Popen(
            [*map(str, command), "--output_dir", str(place / "output")],
            env=side_environ(cache or place / "cache", gpu), stdout=terminal, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with MemoryWatch(process.pid, memory, gpu=gpu):
            while process.poll() is None:
                for row in _rows(place):
                    times.setdefault(row["step"], time.monotonic())
                time.sleep(0.02)
    rows = _rows(place)
    if process.returncode or len(rows) != steps:
        fail(name, f"ended with status {process.returncode} after {len(rows)} steps", log)
    found = re.search(r"Dataset Token Length: ([\d.]+)", log.read_text(errors="replace"))
    return Training(
        times[steps] - times[1],
        float(found[1]) if found else 0.0,
        [row["loss"] for row in rows],
        max(one.card if gpu else one.held for one in memory),
    )


def _rows(place: Path) -> list[dict[str, float]]:
    """Step and loss of the whole rows of a run's log."""
    rows = []
    for path in (place / "output").rglob("logging.jsonl"):
        for line in path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
            row = json.loads(line)
            if "loss" in row and "global_step/max_steps" in row:
                rows.append({"step": int(row["global_step/max_steps"].split("/")[0]), "loss": float(row["loss"])})
    return rows
