"""Keep a number of streams of a chat endpoint open and count their events, in a process of its own.

Nothing is parsed, so that the client takes little of the machine: it looks for the beginnings of events. Each stream is
a connection of its own. The processor time of other processes is taken over the same seconds.

    python sides/stream_load.py --port PORT --streams N --max_tokens N --warm_up S --seconds S --pids N … --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import psutil

EVENT = b"data: {"


class Stream(asyncio.Protocol):
    """One connection; ``counts``: events so far, of all, and what went wrong."""

    def __init__(self, request: bytes, counts: dict[str, int]) -> None:
        self._request, self._counts = request, counts

    def connection_made(self, transport: Any) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._counts["events"] += data.count(EVENT)
        if data.startswith(b"HTTP/1.1 "):
            self._counts["refused"] += not data.startswith(b"HTTP/1.1 200")

    def connection_lost(self, error: Exception | None) -> None:
        self._counts["lost"] += 1


def cpu_seconds(pids: list[int]) -> float:
    """Processor time that the processes have used."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(one.user + one.system for one in times)


async def load(
    port: int, streams: int, max_tokens: int, warm_up: float, seconds: float, pids: list[int]
) -> dict[str, Any]:
    """Open the streams and count for so many seconds after the warm-up."""
    body = json.dumps({"messages": [], "stream": True, "max_tokens": max_tokens}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n"
    request = head % len(body) + body
    counts = {"events": 0, "refused": 0, "lost": 0}
    loop = asyncio.get_running_loop()
    for number in range(streams):
        await loop.create_connection(lambda: Stream(request, counts), "127.0.0.1", port)
        if number % 16 == 15:
            await asyncio.sleep(0.02)  # as they would come: not all at the same moment
    await asyncio.sleep(warm_up)
    before, own, others, began = dict(counts), cpu_seconds([os.getpid()]), cpu_seconds(pids), time.perf_counter()
    await asyncio.sleep(seconds)
    took = time.perf_counter() - began
    return {
        "events": counts["events"] - before["events"],
        "wrong": counts["refused"] + counts["lost"],
        "seconds": took,
        "gateway_cpu_share": (cpu_seconds(pids) - others) / took,
        "client_cpu_share": (cpu_seconds([os.getpid()]) - own) / took,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("port", "streams", "max_tokens"):
        options.add_argument(f"--{name}", type=int, required=True)
    for name in ("warm_up", "seconds"):
        options.add_argument(f"--{name}", type=float, required=True)
    options.add_argument("--pids", type=int, nargs="+", required=True)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    result = asyncio.run(load(given.port, given.streams, given.max_tokens, given.warm_up, given.seconds, given.pids))
    given.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
