"""Ask a chat endpoint as fast as it answers over a number of connections, in a process of its own.

Nothing is parsed but the length of an answer. The processor time of other processes is taken over the same seconds.

    python sides/request_load.py --port PORT --connections N --max_tokens N --warm_up S --seconds S --pids N … \\
        --out FILE
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

from stream_load import cpu_seconds


class Asking(asyncio.Protocol):
    """One connection: the next question goes when an answer is there."""

    def __init__(self, request: bytes, counts: dict[str, int]) -> None:
        self._request, self._counts, self._received = request, counts, b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        if len(body) < int(length.partition(b":")[2]):
            return
        self._received = b""
        self._counts["answers" if head.startswith(b"HTTP/1.1 200") else "wrong"] += 1
        self._transport.write(self._request)

    def connection_lost(self, error: Exception | None) -> None:
        self._counts["wrong"] += 1


async def load(options: argparse.Namespace) -> dict[str, Any]:
    """Ask, and count for so many seconds after the warm-up."""
    question = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": options.max_tokens}
    body = json.dumps(question).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: %d\r\n\r\n"
    request = head % len(body) + body
    counts, loop = {"answers": 0, "wrong": 0}, asyncio.get_running_loop()
    for _ in range(options.connections):
        await loop.create_connection(lambda: Asking(request, counts), "127.0.0.1", options.port)
    await asyncio.sleep(options.warm_up)
    before, own, began = counts["answers"], cpu_seconds([os.getpid()]), time.perf_counter()
    used = [cpu_seconds([pid]) for pid in options.pids]
    await asyncio.sleep(options.seconds)
    took = time.perf_counter() - began
    return {
        "answers": counts["answers"] - before,
        "wrong": counts["wrong"],
        "seconds": took,
        "cpu_shares": [(cpu_seconds([pid]) - one) / took for pid, one in zip(options.pids, used, strict=True)],
        "client_cpu_share": (cpu_seconds([os.getpid()]) - own) / took,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("port", "connections", "max_tokens"):
        options.add_argument(f"--{name}", type=int, required=True)
    for name in ("warm_up", "seconds"):
        options.add_argument(f"--{name}", type=float, required=True)
    options.add_argument("--pids", type=int, nargs="+", required=True)
    options.add_argument("--out", type=Path, required=True)
    given = options.parse_args()
    given.out.write_text(json.dumps(asyncio.run(load(given))))


if __name__ == "__main__":
    main()
