"""What ``scale_serve.py`` puts in place of replicas: addresses that answer at once, many in each of few processes.

The gateway before them is the product's, and so are its leases and Serve's routing among the processes. A lease names
the next address of its process, each a listening socket of its own, so that the gateway has as many replicas to talk to
as there are addresses. An answer is a whole chat completion. What asks for more than 99 tokens (``max_tokens``) is told
that the replica is full, so that its lease is not kept and the next request takes one through Serve.

    python sides/many_replicas.py --port PORT --processes P --addresses N
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from gateway_upstream import MODEL, deploy_with
from ray import serve

_CHOICE = {"index": 0, "message": {"role": "assistant", "content": "Hello."}, "finish_reason": "stop"}
_USAGE = {"prompt_tokens": 8, "completion_tokens": 2, "total_tokens": 10}
_BODY = json.dumps({"id": "chatcmpl-0", "object": "chat.completion", "created": 1700000000, "model": MODEL,
                    "choices": [_CHOICE], "usage": _USAGE}).encode()  # fmt: skip
_HEAD = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%s\r\n"
_KEPT, _FULL = ((_HEAD % (len(_BODY), more)).encode() + _BODY for more in ("", "x-rayswift-full: 1\r\n"))


class Answering(asyncio.Protocol):
    """One connection: requests one after the other."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not end or len(body) < (length := int(lengths[0].partition(b":")[2]) if lengths else 0):
            return
        self._received = body[length:]
        self.transport.write(_FULL if json.loads(body[:length])["max_tokens"] > 99 else _KEPT)


class Replicas:
    """The deployment class, in place of ``LLMServer``."""

    async def __init__(self, addresses: int) -> None:  # type: ignore[misc]  # Serve awaits it
        loop = asyncio.get_running_loop()
        self._servers = [await loop.create_server(Answering, "127.0.0.1", 0, backlog=512) for _ in range(addresses)]
        self._ports = [server.sockets[0].getsockname()[1] for server in self._servers]
        self._next = 0

    async def lease(self, only_prepare: bool = False) -> AsyncIterator[dict[str, Any]]:
        """As ``LLMServer.lease``; it ends when the gateway gives it back."""
        self._next = (self._next + 1) % len(self._ports)
        yield {"url": f"http://127.0.0.1:{self._ports[self._next]}", "token": secrets.token_urlsafe(18)}
        await asyncio.sleep(3600)

    async def check_health(self) -> None:
        """As ``LLMServer.check_health``."""

    async def context_length(self) -> int:
        """As ``LLMServer.context_length``."""
        return 2048

    async def engine_metrics(self) -> tuple[str, str]:
        """As ``LLMServer.engine_metrics``."""
        return serve.get_replica_context().replica_id.unique_id, ""


def build(args: dict[str, Any]) -> Any:
    """The application. ``args``: the name of its deployment, the number of its processes and of all addresses."""
    options = {
        "name": args["deployment"], "num_replicas": args["processes"], "max_ongoing_requests": 100_000,
        "ray_actor_options": {"num_cpus": 0}, "health_check_period_s": 5,
    }  # fmt: skip
    return serve.deployment(Replicas, **options).bind(-(-args["addresses"] // args["processes"]))


def main() -> None:
    """Deploy and stay until SIGTERM."""
    options = argparse.ArgumentParser(description=__doc__)
    for name in ("port", "processes", "addresses"):
        options.add_argument(f"--{name}", type=int, required=True)
    given = options.parse_args()
    deploy_with(f"{Path(__file__).stem}:build", given.port, 1, processes=given.processes, addresses=given.addresses)


if __name__ == "__main__":
    main()
