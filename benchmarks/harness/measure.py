"""Sides run in turn, each in a fresh process with a fresh cache; medians, spread and the closing line of JSON."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from harness.environments import CACHE
from harness.memory import Memory, MemoryWatch

SIDES = Path(__file__).resolve().parents[1] / "sides"


def cores() -> int:
    """Cores this process may use; what either side is told to use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for rows, caches and outputs below ``.cache/benchmarks``, gone at the end."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=CACHE))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def side_environ(cache: Path, gpu: bool = False) -> dict[str, str]:
    """The environment of a side: whatever it caches goes to ``cache``, no GPU unless asked, no hub, no questions."""
    cache.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "RAYSWIFT_CACHE": str(cache),
        "MODELSCOPE_CACHE": str(cache),
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@contextmanager
def started(
    command: Sequence[str | Path], environ: dict[str, str], log: IO[str], memory: list[Memory] | None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the benchmark: its output in ``log``, samples of its memory in ``memory``."""
    process = subprocess.Popen([*map(str, command)], env=environ, stdout=log, stderr=subprocess.STDOUT)
    try:
        with nullcontext() if memory is None else MemoryWatch(process.pid, memory):
            yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def run_side(
    name: str, command: Sequence[str | Path], cache: Path, memory: list[Memory] | None = None
) -> dict[str, Any]:
    """Run a side to its end and return the JSON it wrote to the file given to it as ``--out``.

    Args:
        name: for messages and the log.
        command: interpreter, program and its arguments, without ``--out``.
        cache: the side's cache folder; the same one again is a warm run.
        memory: filled with samples of the side's memory while it runs.

    Raises:
        SystemExit: the side failed; its last lines and the log's place are in the message.
    """
    log = CACHE / f"{name}.log"
    with tempfile.TemporaryDirectory(prefix="out-", dir=CACHE) as folder, log.open("w") as output:
        out = Path(folder) / "result.json"
        with started([*command, "--out", out], side_environ(cache), output, memory) as process:
            process.wait()
        if process.returncode or not out.is_file():
            fail(name, f"ended with status {process.returncode}", log)
        return json.loads(out.read_text())


def fail(name: str, what: str, log: Path) -> None:
    """End the benchmark with a side's last lines."""
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    sys.exit(f"{name} {what}; all of it is in {log}\n{tail}")


def in_turn(pairs: int, first: Callable[[int], Any], second: Callable[[int], Any]) -> tuple[list[Any], list[Any]]:
    """A-B-A-B: what the two returned, called with the number of the pair."""
    results: tuple[list[Any], list[Any]] = ([], [])
    for number in range(pairs):
        for which, run in enumerate((first, second)):
            results[which].append(run(number))
    return results


def compared(ours: Sequence[float], theirs: Sequence[float], unit: str, higher_is_better: bool) -> dict[str, Any]:
    """The fields of a comparison; ``ratio`` is how many times theirs ours is, in the unit itself.

    ``spread`` is (largest − smallest) / median of each side.
    """
    medians = statistics.median(ours), statistics.median(theirs)
    spreads = [(max(side) - min(side)) / middle for side, middle in zip((ours, theirs), medians, strict=True)]
    return {
        "ratio": round(medians[0] / medians[1], 3),
        "unit": unit,
        "better": "higher" if higher_is_better else "lower",
        "rayswift": round(medians[0], 3),
        "peer": round(medians[1], 3),
        "spread": {"rayswift": round(spreads[0], 3), "peer": round(spreads[1], 3)},
        "pairs": len(ours),
    }


def versions(*packages: str) -> dict[str, str]:
    """Versions of packages in this environment."""
    return {"python": sys.version.split()[0], **{name: metadata.version(name) for name in packages}}


def print_line(name: str, fields: Mapping[str, Any]) -> None:
    """The closing line of JSON."""
    print(json.dumps({"name": name, **fields, "cores": cores()}, ensure_ascii=False), flush=True)
