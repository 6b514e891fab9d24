"""Memory of a process and all its descendants, shared pages counted once (Linux: ``/proc/PID/smaps_rollup``), and
of a card."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_MIB = 1024  # smaps_rollup counts in KiB


@dataclass(frozen=True)
class Memory:
    """What a process tree held at one moment (``at``, ``time.time()``), MiB.

    Every number is a sum of proportional shares (PSS). ``held`` is what only ending a process gives back: anonymous
    and shared memory, Ray's object store among it. ``mapped`` is pages of files, which the kernel drops when it needs
    room. ``card`` is what is taken of the first GPU, by whomever; 0 where that is not looked at.
    """

    at: float
    held: float
    mapped: float
    card: float = 0.0


class MemoryWatch:
    """Samples a process tree on a thread while it runs; use as a context manager around it.

    Args:
        pid: the tree's root.
        samples: filled while the watch is on.
        every: seconds between samples.
        gpu: look at the first GPU, too.
    """

    def __init__(self, pid: int, samples: list[Memory], every: float = 1.0, gpu: bool = False) -> None:
        self.samples, self._gpu = samples, gpu
        self._root, self._every = psutil.Process(pid), every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="memory", daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                tree = [self._root, *self._root.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            shares = [_shares(process.pid) for process in tree]
            held, mapped = (sum(column) / _MIB for column in zip(*shares, strict=True))
            self.samples.append(Memory(time.time(), held, mapped, _of_card() if self._gpu else 0.0))
            self._stop.wait(self._every)


def _shares(pid: int) -> tuple[int, int]:
    """(held, mapped) in KiB; zeros for a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0, 0
    found = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}
    return found.get("Pss_Anon", 0) + found.get("Pss_Shmem", 0), found.get("Pss_File", 0)


def _of_card() -> float:
    """MiB taken of the first GPU."""
    query = ["nvidia-smi", "--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
