"""A replica: one engine, its OpenAI app on a private port, and the leases that let the gateway in.

Ray Serve owns it: starts, scales, health-checks, drains and replaces it. Nothing heavy is imported before it starts, so
that building the application costs nothing in the process that deploys.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ray import serve

from rayswift import private
from rayswift.generate.model_spec import ModelSpec, hub_token
from rayswift.serve.connections import MAX_REPLICA_HEAD_BYTES
from rayswift.serve.lease import LeaseBook, LeaseMiddleware
from rayswift.serve.node_address import keep_replica_ports_inside, node_ip
from rayswift.serve.ports import bind, run_http
from rayswift.serve.replica.adapter_book import AdapterBook
from rayswift.serve.replica.adapters import AdapterKey, AdapterLoader, AdapterRefused

if TYPE_CHECKING:
    from rayswift.data.tokens.encoder import Encoder

logger = logging.getLogger("rayswift.serve.replica.server")


class LLMServer:
    """The deployment class. ``plan`` is :class:`ModelSpec` as a dictionary."""

    async def __init__(self, plan: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        keep_replica_ports_inside()
        logging.getLogger("rayswift").setLevel(logging.INFO)  # vLLM's start leaves the root logger at ERROR
        self.plan = ModelSpec(**plan)
        self.loader = AdapterLoader(self.plan)
        self.leases = LeaseBook(self.plan.max_ongoing_requests)
        token = None if self.plan.local else private.kept_secret(hub_token(serve.get_replica_context().app_name))
        model_dir = await asyncio.to_thread(self.plan.resolve_model, token)
        self.loader.read_base(model_dir)
        self.encoders = self.plan.encoders(model_dir)
        self.serving: Any
        if self.plan.engine == "vllm":
            from rayswift.serve.replica.vllm import VllmServing

            self.serving = VllmServing(self.plan.llm_config(model_dir), self.encoders)
        elif self.plan.task_type != "causal_lm":
            from rayswift.serve.replica.pooling import PoolingServing

            self.serving = PoolingServing.from_plan(self.plan, self.encoders[""])
        else:
            from rayswift.serve.replica.transformers import TransformersServing

            self.serving = TransformersServing.from_plan(self.plan, self.encoders)
        await self.serving.start()
        await self._open("127.0.0.1" if self.plan.local else node_ip())

    async def _open(self, host: str) -> None:
        """Let requests in."""

        async def note(key: str) -> str:  # a function: Serve sets attributes on it
            return key

        self._note = serve.multiplexed(max_num_models_per_replica=self.plan.max_adapters)(note)
        self.adapters = AdapterBook(self.serving, self._fetch, self.encoders, self.plan.max_adapters)
        self._socket = bind(host)
        self.url = "http://{}:{}".format(*self._socket.getsockname()[:2])
        app = LeaseMiddleware(self.serving.app, self.leases)
        self._http = await run_http(app, self._socket, max_head_bytes=MAX_REPLICA_HEAD_BYTES)

    async def lease(self, only_prepare: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Where requests go and the token of a new lease; then nothing until the lease has ended.

        A request for an adapter (Serve's multiplexed model id) finds it loaded. One that cannot be used gives
        ``{"status", "message"}`` instead. ``only_prepare``: no lease, the adapter is just loaded.
        """
        asked = serve.get_multiplexed_model_id()
        key = AdapterKey.parse(asked) if asked else None
        try:
            if key:
                await self._note(asked)
            if key and only_prepare:
                await self.adapters.prepare(key)
                yield {"url": self.url, "token": ""}
                return
            async with self.adapters.using(key) if key else nullcontext():
                token = self.leases.open()
                yield {"url": self.url, "token": token}
                await self.leases.ended(token)
        except AdapterRefused as error:
            yield {"status": error.status, "message": str(error)}

    async def _fetch(self, key: AdapterKey) -> tuple[str, Encoder]:
        return await asyncio.to_thread(self.loader.load, key, self.encoders[""])

    async def forget_adapter(self, name: str, version: int) -> bool:
        """Unload the adapters of a name up to this version; whether there were any."""
        return self.adapters.forget(name, version)

    async def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self.serving.context_length)

    async def engine_metrics(self) -> tuple[str, str]:
        """Name of the replica and the Prometheus text of its engine."""
        return serve.get_replica_context().replica_id.unique_id, await asyncio.to_thread(self.serving.metrics)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await self.serving.check_health()
