"""What ``gateway_limit.py`` puts in place of an engine: a replica whose HTTP server gives events at an even pace.

It is deployed with the gateways of ``rayswift deploy`` before it (their configuration, their leases), by this program:

    python sides/gateway_upstream.py --port PORT --gateways N

An answer has as many events as the request's ``max_tokens``, one every :data:`PACE` seconds, each as vLLM writes a
piece of a chat, with its token's id before it as RaySwift's replicas have it. One timer writes the next event of every
answer: a few microseconds each, so that the gateway is what the machine spends its time on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

#: Seconds between two events of an answer.
PACE = 0.02
MODEL = "upstream"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"


def event(number: int) -> bytes:
    """A piece of an answer as a chunk of HTTP."""
    choice = {"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}
    piece = {"id": "chatcmpl-0123456789abcdef", "object": "chat.completion.chunk", "created": 1700000000,
             "model": MODEL, "choices": [choice]}  # fmt: skip
    return chunk(f": {number}\n\ndata: {json.dumps(piece, separators=(',', ':'))}\n\n".encode())


def chunk(body: bytes) -> bytes:
    """A chunk of HTTP."""
    return b"%x\r\n%b\r\n" % (len(body), body)


_EVENT, _END = event(12345), chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Answering(asyncio.Protocol):
    """One connection: requests one after the other, each answered by the common timer."""

    def __init__(self, running: dict[Answering, int]) -> None:
        self._running, self._received = running, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._running.pop(self, None)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        if not end or len(body) < (length := int(lengths[0].partition(b":")[2]) if lengths else 0):
            return
        self._received = body[length:]
        self._running[self] = int(json.loads(body[:length])["max_tokens"])
        self.transport.write(_HEAD)


async def tick(running: dict[Answering, int]) -> None:
    """Write the next event of every answer, again and again."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    while True:
        due = max(due + PACE, loop.time())
        await asyncio.sleep(due - loop.time())
        for answer, left in list(running.items()):
            if left:
                running[answer] = left - 1
                answer.transport.write(_EVENT)
            else:
                del running[answer]
                answer.transport.write(_END)


class Upstream:
    """The deployment class, in place of ``LLMServer``."""

    async def __init__(self) -> None:  # type: ignore[misc]  # Serve awaits it
        running: dict[Answering, int] = {}
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Answering(running), "127.0.0.1", 0, backlog=4096)
        self._url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._ticking = asyncio.ensure_future(tick(running))

    async def lease(self, only_prepare: bool = False) -> AsyncIterator[dict[str, Any]]:
        """As ``LLMServer.lease``; it ends when the gateway gives it back."""
        yield {"url": self._url, "token": secrets.token_urlsafe(18)}
        await asyncio.sleep(3600)


def build(args: dict[str, Any]) -> Any:
    """The application of the upstream. ``args``: the plan of the model that it stands for."""
    from ray import serve

    options = {"name": args["deployment"], "max_ongoing_requests": 100_000, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(Upstream, **options).bind()


def deploy_with(build: str, port: int, gateways: int, **options: Any) -> None:
    """Deploy and stay until SIGTERM.

    Args:
        build: ``module:function`` that makes the application in place of a model's; the module lies beside this one.
        port: of the gateways.
        gateways: their number.
        options: what the function is given beside the deployment's name.
    """
    import rayswift

    os.chdir(Path(rayswift.__file__).parents[1])  # Ray's workers look there first
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])

    from rayswift.arguments import make_arguments
    from rayswift.generate.model_spec import ModelSpec
    from rayswift.serve import application, deploy

    plan = ModelSpec(MODEL, MODEL, "transformers", max_ongoing_requests=100_000, max_queued_requests=100_000)
    several = {"num_gateways": gateways} if gateways > 1 else {}
    args = make_arguments("deploy", model=MODEL, port=port, use_gpu=False, **several)
    real = application.serve_config

    def config(*arguments: Any, **keywords: Any) -> dict[str, Any]:
        made = real(*arguments, **keywords)
        for app in made["applications"]:
            if app["import_path"].endswith(":build_model"):
                app |= {"import_path": build}
                app["args"] = {"deployment": application.deployment_name(plan), **options}
        return made

    for module in list(sys.modules.values()):
        if getattr(module, "serve_config", None) is real:
            module.serve_config = config
    with deploy.deployment(args, [plan]) as started:
        arguments = (args, [plan], started) if started is not None else (args, [plan])
        deploy.watch(*arguments)


def main() -> None:
    """Deploy what gives events."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--port", type=int, required=True)
    options.add_argument("--gateways", type=int, required=True)
    given = options.parse_args()
    deploy_with(f"{Path(__file__).stem}:build", given.port, given.gateways)


if __name__ == "__main__":
    main()
