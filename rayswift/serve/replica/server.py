"""A replica: one engine, its OpenAI app on a private port, and the leases that let the gateway in.

Ray Serve owns it: starts, scales, health-checks, drains and replaces it. Nothing heavy is imported before it starts, so
that building the application costs nothing in the process that deploys.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from rayswift.generate.model_spec import ModelSpec
from rayswift.serve.connections import MAX_REPLICA_HEAD_BYTES
from rayswift.serve.lease import LeaseBook, LeaseMiddleware
from rayswift.serve.node_address import keep_replica_ports_inside, node_ip
from rayswift.serve.ports import bind, run_http
from rayswift.serve.replica.adapters import AdapterLoader, AdapterRefused, split_key

logger = logging.getLogger("rayswift.serve.replica.server")


class LoadedAdapter:
    """An adapter in the cache of Serve's multiplexing, which awaits ``__del__`` when it drops one."""

    def __init__(self, name: str, serving: Any) -> None:
        self.name, self._serving = name, serving

    async def __del__(self) -> None:
        await self._serving.unload_adapter(self.name)


class LLMServer:
    """The deployment class. ``plan`` is :class:`ModelSpec` as a dictionary."""

    async def __init__(self, plan: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        keep_replica_ports_inside()
        logging.getLogger("rayswift").setLevel(logging.INFO)  # vLLM's start leaves the root logger at ERROR
        self.plan = ModelSpec(**plan)
        self.adapters = AdapterLoader(self.plan)
        self.leases = LeaseBook(self.plan.max_ongoing_requests)
        model_dir = await asyncio.to_thread(self.plan.resolve_model)
        self.adapters.read_base(model_dir)
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

        async def load(key: str) -> LoadedAdapter:  # a function: Serve sets attributes on it
            return await self._load_adapter(key)

        self._load = serve.multiplexed(max_num_models_per_replica=self.plan.max_adapters)(load)
        self._socket = bind("127.0.0.1" if self.plan.local else node_ip())
        self.url = "http://{}:{}".format(*self._socket.getsockname()[:2])
        app = LeaseMiddleware(self.serving.app, self.leases)
        self._http = await run_http(app, self._socket, max_head_bytes=MAX_REPLICA_HEAD_BYTES)

    async def lease(self) -> AsyncIterator[dict[str, Any]]:
        """Where requests go and the token of a new lease; then nothing until the lease has ended.

        A request for an adapter (Serve's multiplexed model id) finds it loaded. One that cannot be used gives
        ``{"status", "message"}`` instead.
        """
        try:
            if name := serve.get_multiplexed_model_id():
                await self._load(name)
        except AdapterRefused as error:
            yield {"status": error.status, "message": str(error)}
            return
        token = self.leases.open()
        yield {"url": self.url, "token": token}
        await self.leases.ended(token)

    async def _load_adapter(self, key: str) -> LoadedAdapter:
        name, _ = split_key(key)
        folder = await asyncio.to_thread(self.adapters.fetch, key)
        await asyncio.to_thread(self.adapters.check, key, folder)
        self.encoders[name] = self.plan.adapter_encoder(folder, self.encoders[""])
        try:
            await self.serving.load_adapter(name, folder)
        except ValueError as error:
            raise AdapterRefused(422, f"adapter {name}: the engine refuses it ({error})") from None
        return LoadedAdapter(name, self.serving)

    async def forget_adapter(self, key: str) -> None:
        """Unload an adapter now (it loads again when somebody asks for it)."""
        await self.serving.unload_adapter(split_key(key)[0])

    async def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return int(self.serving.context_length)

    async def engine_metrics(self) -> tuple[str, str]:
        """Name of the replica and the Prometheus text of its engine."""
        return serve.get_replica_context().replica_id.unique_id, await asyncio.to_thread(self.serving.metrics)

    async def check_health(self) -> None:
        """Serve replaces the replica when this raises."""
        await self.serving.check_health()
