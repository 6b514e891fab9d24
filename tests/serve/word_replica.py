"""A replica without an engine, for tests of what lies before it: real leases, real HTTP, an answer of ``WORDS``.

Its answers begin with the process that gives them, so that a test can end it.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from ray import serve

from rayswift.generate.model_spec import ModelSpec
from rayswift.serve.application import deployment_name
from rayswift.serve.lease import LeaseBook, current_notes
from rayswift.serve.node_address import keep_replica_ports_inside
from rayswift.serve.replica.adapters import AdapterKey
from rayswift.serve.replica.server import LLMServer

WORDS = [f"w{number} " for number in range(20)]


def build(args: dict[str, Any]) -> Any:
    """As `rayswift.serve.application.build_model`."""
    plan = ModelSpec(**args)
    options = {"num_replicas": plan.max_replicas, "max_ongoing_requests": plan.max_ongoing_requests,
               "max_queued_requests": plan.max_queued_requests,
               "ray_actor_options": {"num_cpus": plan.bundles[0]["CPU"]}}  # fmt: skip
    return serve.deployment(WordServer, name=deployment_name(plan), **options).bind(args)


class Words:
    """Stands for the engine: ``max_tokens`` words, one every ``seconds`` of the request's ``temperature``."""

    context_length = 2048

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}  # name → what it was loaded from

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"] or b"{}")
        stream = bool(body.get("stream"))
        kind = b"text/event-stream" if stream else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if not stream:
            text = json.dumps({"model": body.get("model"), "adapters": self.adapters, "pid": os.getpid()}).encode()
            await send({"type": "http.response.body", "body": text})
            return
        notes = current_notes.get()
        assert notes is not None
        for number in range(body["max_tokens"]):
            if number >= len(notes.resume):
                await asyncio.sleep(body["temperature"])
                notes.add([number])
            delta = {"content": WORDS[number]}
            chunk = {"id": str(os.getpid()), "choices": [{"index": 0, "delta": delta}]}
            event = f"data: {json.dumps(chunk)}\n\n".encode()
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def load_adapter(self, name: str, folder: str) -> str:
        if folder == "broken":
            raise ValueError("broken")
        return folder

    def answer_as(self, name: str, handle: str | None) -> None:
        self.adapters.pop(name, None)
        if handle is not None:
            self.adapters[name] = handle

    async def unload_adapter(self, handle: str) -> None:
        pass

    def metrics(self) -> str:
        return "# TYPE words gauge\nwords 20\n"

    async def check_health(self) -> None:
        pass


class WordServer(LLMServer):
    """`LLMServer` but for its engine."""

    async def __init__(self, plan: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        keep_replica_ports_inside()
        self.plan, self.serving = ModelSpec(**plan), Words()
        self.leases, self.encoders = LeaseBook(self.plan.max_ongoing_requests), {}
        await self._open("127.0.0.1")

    async def _fetch(self, key: AdapterKey) -> Any:
        return key.path, key
