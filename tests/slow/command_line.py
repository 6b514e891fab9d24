"""Run ``rayswift`` as a user does, and read what a run left behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

#: What every run of these tests shares: short rows, so that a step takes a second on two cores.
QUICK = [
    "--max_length", "64", "--gradient_accumulation_steps", "1", "--logging_steps", "1",
    "--gradient_checkpointing", "false", "--report_to", "none",
]  # fmt: skip


_WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "sun", "moon", "rain"]


def distinct_rows(path: Path, count: int) -> Path:
    """That many rows, each another text: a step with other rows has another loss."""
    chance = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            text = " ".join(chance.choices(_WORDS, k=chance.randint(1, 20)))
            messages = [{"role": "user", "content": f"{number}?"}, {"role": "assistant", "content": text}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def start(*arguments: str, log: Path, **environment: str) -> subprocess.Popen[str]:
    """Start ``rayswift …`` in a process group of its own, its output in ``log``."""
    file = log.open("w")
    command = [sys.executable, "-m", "rayswift", *arguments]
    env = {**os.environ, **environment}
    return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, text=True, env=env, start_new_session=True)


def run(*arguments: str, log: Path, timeout: float = 540, **environment: str) -> str:
    """Run ``rayswift …`` to its end; its output. Fails with the output when the exit status is not 0."""
    process = start(*arguments, log=log, **environment)
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert status == 0, log.read_text()[-4000:]
    return log.read_text()


def run_directory(output_dir: Path) -> Path:
    """The only run directory below ``output_dir``."""
    (found,) = output_dir.glob("v*-*")
    return found


def losses(run: Path) -> dict[int, float]:
    """The training loss of each step in logging.jsonl."""
    rows = read_rows(run)
    return {int(row["global_step/max_steps"].split("/")[0]): row["loss"] for row in rows if "loss" in row}


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The complete rows of logging.jsonl."""
    path = run / "logging.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition: Any, timeout: float, what: str) -> Any:
    """Poll until ``condition()`` is true; its value."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.2)
    raise AssertionError(f"{what} did not happen within {timeout} s")


def train_workers(driver: int) -> list[psutil.Process]:
    """The Ray Train workers of the embedded cluster that a driver started, or of a raylet."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            found += [child] if "TrainWorker" in " ".join(child.cmdline()[:1]) else []
    return found
