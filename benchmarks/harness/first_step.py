"""A training command from the moment it is typed to the first row of its ``logging.jsonl``."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.environments import CACHE
from harness.measure import fail, side_environ, started
from harness.memory import Memory

#: How often the log is looked for, seconds.
_POLL = 0.02
#: A command that has no step by then has failed, seconds.
_PATIENCE = 1800.0


@dataclass(frozen=True)
class FirstStep:
    """Seconds from start to the first optimiser step's row in the log, its loss, and seconds to the command's end."""

    seconds: float
    loss: float
    total: float


def run_to_first_step(
    name: str, command: Sequence[str | Path], cache: Path, output: Path, memory: list[Memory] | None = None
) -> FirstStep:
    """Run a training command to its end, watching for its first step.

    Args:
        name: for messages and the log.
        command: the command line, without ``--output_dir``.
        cache: its cache folder.
        output: its ``--output_dir``, empty before.
        memory: filled with samples of its memory while it runs.

    Raises:
        SystemExit: it failed, or made no step.
    """
    log = CACHE / f"{name}.log"
    with log.open("w") as terminal:
        began = time.perf_counter()
        with started([*command, "--output_dir", output], side_environ(cache), terminal, memory) as process:
            loss = _wait_for_loss(process, output)
            seconds = time.perf_counter() - began
            process.wait()
    if loss is None or process.returncode:
        fail(name, f"ended with status {process.returncode}, first loss {loss}", log)
    return FirstStep(seconds, loss, time.perf_counter() - began)


def _wait_for_loss(process: subprocess.Popen[bytes], output: Path) -> float | None:
    """The loss at step 1 as soon as the log has it; None when the command ends without."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        ended = process.poll() is not None
        for path in output.rglob("logging.jsonl"):
            first = path.read_text(encoding="utf-8").partition("\n")
            if first[1] and (row := json.loads(first[0])).get("global_step/max_steps", "").startswith("1/"):
                return float(row["loss"])
        if ended:
            return None
        time.sleep(_POLL)
    process.terminate()
    return None
