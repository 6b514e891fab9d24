"""The public door: one process that holds the port, checks keys, and forwards each request to a replica.

It is a Serve deployment, so that Serve starts it again when it dies; but it listens by itself (``listen``), because a
request then takes one hop less, errors keep OpenAI's shape, and nothing answers without a key. Without ``listen`` it
answers through Serve's own proxy (KubeRay's RayService): the same app in both cases.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ray import serve
from starlette.requests import ClientDisconnect

from rayswift.serve.adapters import AdapterBook, AdapterRefused, split_key
from rayswift.serve.gateway.forwarding import Forwarder, Request
from rayswift.serve.lease import App, Receive, Scope, Send, bind, run_http
from rayswift.serve.node_address import keep_replica_ports_inside
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.request_body import check_roles, read_object

logger = logging.getLogger("rayswift.serve.gateway.app")

#: Requests that a replica answers.
FORWARDED = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/score", "/tokenize", "/detokenize",
)  # fmt: skip


@dataclass
class Counters:
    """What the gateway has seen since it started; `running` and `waiting` are of this moment."""

    requests: int = 0
    errors: int = 0
    tokens: int = 0
    retries: int = 0
    resumed: int = 0
    running: int = 0
    waiting: int = 0
    by_status: dict[int, int] = field(default_factory=dict)


@dataclass
class ServedModel:
    """A model behind the gateway: its name for clients, its replicas, its adapters."""

    name: str
    forwarder: Forwarder
    book: AdapterBook
    default_adapter: str | None
    owned_by: str
    created: int


class _Sending:
    """ASGI ``send`` with helpers for whole answers; counts statuses."""

    def __init__(self, send: Send, counters: Counters) -> None:
        self._send, self._counters, self._started = send, counters, False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self._started = True
            status = message["status"]
            self._counters.by_status[status] = self._counters.by_status.get(status, 0) + 1
        await self._send(message)

    async def bytes(
        self, body: bytes, content_type: str, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        pairs = [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode())]
        pairs += [(key.encode(), value.encode()) for key, value in (headers or {}).items()]
        await self({"type": "http.response.start", "status": status, "headers": pairs})
        await self({"type": "http.response.body", "body": body})

    async def text(self, body: str, content_type: str) -> None:
        await self.bytes(body.encode(), content_type)

    async def json(self, value: Any) -> None:
        await self.bytes(json.dumps(value, ensure_ascii=True).encode(), "application/json")

    async def error(self, error: ApiError) -> None:
        """Answer with an error, unless an answer has begun."""
        self._counters.errors += 1
        if not self._started:
            await self.bytes(error.body(), "application/json", error.status, error.headers)


Handler = Callable[[Scope, Receive, _Sending], Awaitable[None]]


class Gateway:
    """The deployment class.

    Args:
        models: for each model ``{"name", "app", "deployment"}``, and optionally ``adapters``, ``default_adapter``
            and ``adapter_root``.
        listen: ``{"host", "port"}`` and optionally ``ssl_keyfile``, ``ssl_certfile``; None: through Serve's proxy.
        api_keys: SHA-256 digests (hex) of the keys of which a client must send one; empty: none is needed.
        queue_timeout: seconds a request may wait for a replica.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        models: list[dict[str, Any]],
        listen: dict[str, Any] | None = None,
        api_keys: list[str] | None = None,
        queue_timeout: float = 300,
        owned_by: str = "rayswift",
    ) -> None:
        keep_replica_ports_inside()
        self.counters = Counters()
        self._keys = [bytes.fromhex(digest) for digest in api_keys or []]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=False),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            read_bufsize=2**20,
        )
        started = int(time.time())
        self.models = {
            model["name"]: ServedModel(
                model["name"],
                Forwarder(
                    serve.get_deployment_handle(model["deployment"], model["app"]),
                    self._session, queue_timeout, self.counters,
                ),
                AdapterBook(model.get("adapters") or {}, model.get("adapter_root")),
                model.get("default_adapter"),
                owned_by,
                started,
            )
            for model in models
        }  # fmt: skip
        self.routes = self._routes()
        self._schema: bytes | None = None
        self._server = None
        if listen is not None:
            options = {key: listen[key] for key in ("ssl_keyfile", "ssl_certfile") if listen.get(key)}
            app = await self.__serve_build_asgi_app__()
            self._server = await run_http(app, bind(listen["host"], listen["port"]), **options)

    def _routes(self) -> dict[str, dict[str, Handler]]:
        """Path → method → handler."""
        routes: dict[str, dict[str, Handler]] = {path: {"POST": self._forward} for path in FORWARDED}
        routes |= {
            "/v1/models": {"GET": self._list_models},
            "/v1/adapters": {"GET": self._list_adapters},
            "/v1/load_lora_adapter": {"POST": self._load_adapter},
            "/v1/unload_lora_adapter": {"POST": self._unload_adapter},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/metrics": {"GET": self._metrics},
            "/openapi.json": {"GET": self._openapi},
            "/docs": {"GET": self._docs},
        }
        return routes

    # --- the app ------------------------------------------------------------------------------------------------

    async def __serve_build_asgi_app__(self) -> App:
        # A function: uvicorn takes a bound method for an app of ASGI's second version.
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._answer(scope, receive, send)

        return app

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        if scope["type"] != "http":
            return
        self.counters.requests += 1
        self.counters.running += 1
        sending = _Sending(send, self.counters)
        try:
            self._check_key(scope)
            await self._handler(scope)(scope, receive, sending)
        except ApiError as error:
            await sending.error(error)
        except AdapterRefused as error:
            await sending.error(ApiError(error.status, str(error), code="adapter_refused"))
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("a request failed")
            await sending.error(ApiError(500, "the gateway failed; its log says why"))
        finally:
            self.counters.running -= 1

    def _handler(self, scope: Scope) -> Handler:
        path, method = scope["path"].rstrip("/") or "/", scope["method"]
        if path.startswith("/v1/models/"):
            methods: dict[str, Handler] = {"GET": self._one_model}
        elif path in self.routes:
            methods = self.routes[path]
        else:
            raise ApiError(404, f"no such path: {path[:200]}", code="not_found")
        if method == "HEAD" and "GET" in methods:
            method = "GET"
        if method not in methods:
            raise ApiError(405, f"{path[:200]} takes {', '.join(methods)}", code="method_not_allowed")
        return methods[method]

    def _check_key(self, scope: Scope) -> None:
        """Raises ApiError (401) without one of the keys. Every key is compared, so that time tells nothing."""
        if not self._keys:
            return
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else headers.get(b"api-key", headers.get(b"x-api-key", b""))
        digest = hashlib.sha256(key).digest()
        if not sum(hmac.compare_digest(digest, known) for known in self._keys):
            raise ApiError(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    # --- forwarded ----------------------------------------------------------------------------------------------

    async def _forward(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        raw, body = await read_object(scope, receive)
        check_roles(body)
        model, adapter = self._find(body.get("model"))
        path = scope["path"].rstrip("/")
        wanted = split_key(adapter)[0] if adapter else model.name
        if body.get("model") != wanted:
            body["model"] = wanted
            raw = json.dumps(body, ensure_ascii=True).encode()
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")[:100]
        request = Request("POST", path, raw, body, adapter, request_id)
        sending = asyncio.ensure_future(self._relay(model.forwarder, request, send))
        leaving = asyncio.ensure_future(_client_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _relay(self, forwarder: Forwarder, request: Request, send: Send) -> None:
        async with aclosing(forwarder.send(request)) as responses:
            async for response in responses:
                headers = [(b"content-type", response.content_type.encode())]
                if response.length is not None:
                    headers.append((b"content-length", str(response.length).encode()))
                if response.content_type == "text/event-stream":
                    headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
                await send({"type": "http.response.start", "status": response.status, "headers": headers})
                async for piece in response.pieces:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _find(self, name: Any) -> tuple[ServedModel, str]:
        """The model and the adapter's key (``""`` for none) that a client's ``model`` means.

        ``NAME`` of a model, ``ADAPTER``, or ``NAME:ADAPTER``; without a name the only model. Raises ApiError (404).
        """
        if name is None and len(self.models) == 1:
            name = next(iter(self.models))
        if not isinstance(name, str):
            raise ApiError(400, "model: expected the name of a model", param="model")
        if model := self.models.get(name):
            return model, model.default_adapter or ""
        base, _, adapter = name.partition(":")
        candidates = [self.models[base]] if adapter and base in self.models else list(self.models.values())
        for model in candidates:
            if key := model.book.key_of(adapter if adapter and base in self.models else name):
                return model, key
        known = ", ".join(self.models)
        raise ApiError(
            404, f"The model `{name[:200]}` does not exist; models: {known}", code="model_not_found", param="model"
        )

    # --- about the server ---------------------------------------------------------------------------------------

    def cards(self) -> list[dict[str, Any]]:
        """The models and adapters as OpenAI's model cards."""
        cards = []
        for model in self.models.values():
            card = {"id": model.name, "object": "model", "created": model.created, "owned_by": model.owned_by}
            cards.append(card)
            adapters = [name for name in model.book.names() if name != model.default_adapter]
            cards += [{**card, "id": name, "root": model.name, "parent": model.name} for name in adapters]
        return cards

    async def _list_models(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        await send.json({"object": "list", "data": await asyncio.to_thread(self.cards)})

    async def _one_model(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        name = scope["path"].removeprefix("/v1/models/").rstrip("/")
        for card in await asyncio.to_thread(self.cards):
            if card["id"] == name:
                await send.json(card)
                return
        raise ApiError(404, f"The model `{name[:200]}` does not exist", code="model_not_found", param="model")

    async def _list_adapters(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        data = [
            {"id": name, "object": "adapter", "model": model.name}
            for model in self.models.values()
            for name in await asyncio.to_thread(model.book.names)
        ]
        await send.json({"object": "list", "data": data})

    async def _load_adapter(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        """vLLM's ``{"lora_name", "lora_path"}``; the path is below ``--adapter_root``."""
        _, body = await read_object(scope, receive)
        name, path = body.get("lora_name"), body.get("lora_path")
        if not isinstance(name, str):
            raise ApiError(400, "lora_name: expected the name of an adapter", param="lora_name")
        model = self._owner(body.get("model"))
        key = await asyncio.to_thread(model.book.add, name, name if path is None else path)
        try:
            await model.forwarder.touch(key)
        except ApiError:
            model.book.remove(name)
            raise
        await send.json({"id": name, "object": "adapter", "model": model.name})

    async def _unload_adapter(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        _, body = await read_object(scope, receive)
        name, model = body.get("lora_name"), self._owner(body.get("model"))
        key = model.book.key_of(name) if isinstance(name, str) else None
        if key is None:
            raise ApiError(404, f"adapter {str(name)[:200]}: not known", code="adapter_not_found", param="lora_name")
        model.book.remove(str(name))
        await _broadcast(model.forwarder.handle, "forget_adapter", key)
        await send.json({"id": name, "object": "adapter", "unloaded": True})

    def _owner(self, name: Any) -> ServedModel:
        if name is None:
            return next(iter(self.models.values()))
        if not isinstance(name, str) or name not in self.models:
            raise ApiError(404, f"The model `{str(name)[:200]}` does not exist", code="model_not_found", param="model")
        return self.models[name]

    async def _health(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        await send.json({"status": "ok", "models": list(self.models)})

    async def _metrics(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        from rayswift.serve.gateway.metrics import as_prometheus

        texts = {
            name: dict(await _broadcast(model.forwarder.handle, "engine_metrics"))
            for name, model in self.models.items()
        }
        await send.text(as_prometheus(self.counters, texts), "text/plain; version=0.0.4")

    async def _openapi(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        if self._schema is None:
            from rayswift.serve.gateway.api_schema import public_schema

            engine = await next(iter(self.models.values())).forwarder.get_json("/openapi.json")
            self._schema = json.dumps(public_schema(engine, FORWARDED)).encode()
        await send.bytes(self._schema, "application/json")

    async def _docs(self, scope: Scope, receive: Receive, send: _Sending) -> None:
        from fastapi.openapi.docs import get_swagger_ui_html

        page = get_swagger_ui_html(openapi_url="/openapi.json", title="RaySwift")
        await send.bytes(bytes(page.body), "text/html; charset=utf-8")

    # --- for Serve and for the driver -----------------------------------------------------------------------------

    async def stats(self) -> dict[str, Any]:
        """The counters, for the status line of ``rayswift deploy``."""
        return {name: value for name, value in vars(self.counters).items() if isinstance(value, int)}

    async def __del__(self) -> None:
        if self._server is not None:
            self._server.should_exit = True
        await self._session.close()


async def _broadcast(handle: Any, method: str, *args: Any) -> list[Any]:
    """What every running replica answers to a call."""
    return list(await handle.broadcast(method, *args).results_async())


async def _live(receive: Receive, send: Send) -> None:
    """ASGI's lifespan: Serve starts and ends apps with it."""
    while True:
        kind = (await receive())["type"]
        await send({"type": f"{kind}.complete"})
        if kind == "lifespan.shutdown":
            return


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
