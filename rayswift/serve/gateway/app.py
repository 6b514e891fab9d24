"""The public door: a process that holds the port, checks keys, and forwards each request to a replica.

There may be several on one port, and on several nodes; what they have to know together is in `shared`. It is a Serve
deployment, so that Serve starts it again when it dies; but it listens by itself (``listen``), because a
request then takes one hop less, errors keep OpenAI's shape, and nothing answers without a key. Without ``listen`` it
answers through Serve's own proxy (KubeRay's RayService): the same app in both cases. What is about the server itself
is a FastAPI app; forwarded requests go past it, for its layers would cost every token two calls more.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import hmac
import json
import logging
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
from fastapi import Depends, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from ray import serve
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayswift import __version__
from rayswift.cluster.board import ServeBoard
from rayswift.serve.connections import admit
from rayswift.serve.gateway.adapters import AdapterRegistry
from rayswift.serve.gateway.cross_origin import allow_origins
from rayswift.serve.gateway.forwarding import Forwarder, GatewayRequest
from rayswift.serve.gateway.metrics import as_prometheus
from rayswift.serve.gateway.schema import AdapterRequest, public_schema
from rayswift.serve.gateway.shared import Counters, SharedState
from rayswift.serve.model_cards import model_cards
from rayswift.serve.node_address import keep_replica_ports_inside
from rayswift.serve.openai_errors import ApiError, Refusal, add_error_handlers
from rayswift.serve.ports import bind, run_http
from rayswift.serve.replica.adapters import AdapterKey
from rayswift.serve.request_body import aside, check_roles, client_left, read_object

logger = logging.getLogger("rayswift.serve.gateway.app")

#: Requests that a replica answers.
FORWARDED = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/embeddings", "/classify", "/v1/score", "/v1/rerank", "/v2/rerank", "/tokenize", "/detokenize",
)  # fmt: skip
#: What the last words to the replicas, which leases are given back, need to leave this process.
GOODBYE_SECONDS = 0.2
FAILURE = "the gateway failed; its log says why"


async def _read_body(request: Request) -> dict[str, Any]:
    return (await read_object(request.scope, request.receive))[1]


Body = Annotated[dict[str, Any], Depends(_read_body)]


@dataclass
class ServedModel:
    """A model behind the gateway: its name for clients, its replicas, its adapters."""

    name: str
    forwarder: Forwarder
    adapters: AdapterRegistry
    default_adapter: str | None
    owned_by: str
    created: int
    fingerprints: dict[str, str]
    may_sleep: bool


class Gateway:
    """The deployment class.

    Args:
        models: for each model ``{"name", "app", "deployment"}``, and optionally ``adapters``, ``default_adapter``,
            ``adapter_root``, ``max_queued_requests`` and ``may_sleep`` (no replica runs while nobody asks).
        listen: ``{"host", "port"}`` and optionally ``shared`` (other gateways listen there too), ``ssl_keyfile`` and
            ``ssl_certfile``; None: through Serve's proxy.
        api_keys: SHA-256 digests (hex) of the keys of which a client must send one; empty: none is needed.
        queue_timeout: seconds a request may wait for a replica.
        allowed_origins: web pages whose scripts may ask (``*`` for every one); the others are refused.
        shared: the application that keeps what several gateways share; None for a gateway that is alone.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        models: list[dict[str, Any]],
        listen: dict[str, Any] | None = None,
        api_keys: list[str] | None = None,
        queue_timeout: float = 300,
        owned_by: str = "rayswift",
        allowed_origins: list[str] | None = None,
        shared: str | None = None,
    ) -> None:
        keep_replica_ports_inside()
        self.counters = Counters()
        self._origins, self._host = allowed_origins or [], (listen or {}).get("host")
        self._keys = [bytes.fromhex(digest) for digest in api_keys or []]
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=False),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            read_bufsize=2**20,
        )
        self.shared = SharedState(shared, self.counters)
        started = await self.shared.ask("created", timeout=None)  # its actor may be starting still
        self.models = {
            model["name"]: ServedModel(
                model["name"],
                Forwarder(
                    serve.get_deployment_handle(model["deployment"], model["app"]),
                    self._session, queue_timeout, self.counters,
                    functools.partial(self.shared.place, model["name"], model.get("max_queued_requests", 2**31)),
                ),
                AdapterRegistry(
                    model["name"], model.get("adapters") or {}, model.get("adapter_root"), self.shared,
                    [one["name"] for one in models],
                ),
                model.get("default_adapter"),
                owned_by,
                started,
                model.get("fingerprints") or {},
                model.get("may_sleep", False),
            )
            for model in models
        }  # fmt: skip
        self._board = asyncio.ensure_future(ServeBoard(list(self.models)).follow(self.counters))
        self._own = self._make_own_app()
        self._schema: dict[str, Any] | None = None
        self._server = None
        if listen is not None:
            options = {key: listen[key] for key in ("ssl_keyfile", "ssl_certfile") if listen.get(key)}
            app = await self.__serve_build_asgi_app__()
            socket = bind(listen["host"], listen["port"], shared=listen.get("shared", False))
            self._server = await run_http(app, socket, **options)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        # A function: uvicorn takes a bound method for an app of ASGI's second version.
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                await self._answer(scope, receive, send)
            elif scope["type"] == "lifespan":
                await self._own(scope, receive, send)

        return allow_origins(app, self._origins, self._host)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, failed = 0, False

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self.counters.by_status[status] = self.counters.by_status.get(status, 0) + 1
            await send(message)

        self.counters.requests += 1
        self.counters.running += 1
        path, method = scope["path"].rstrip("/") or "/", scope["method"]
        try:
            self._check_key(scope)
            admit(scope)
            if method == "POST" and path in FORWARDED:
                await self._forward(path, scope, receive, counting)
            else:
                own = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}
                await self._own(own, receive, counting)
        except (ClientDisconnect, asyncio.CancelledError):
            raise
        except Exception as error:
            failed = True
            if not isinstance(error, ApiError):
                logger.exception("a request failed")
                error = ApiError(500, FAILURE)
            if not status:
                await error.response()(scope, receive, counting)
        finally:
            self.counters.running -= 1
            self.counters.errors += failed or status >= 400

    def _check_key(self, scope: Scope) -> None:
        """Raises ApiError (401) without one of the keys. Every key is compared, so that time tells nothing."""
        if not self._keys:
            return
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        key = key.strip() if scheme.lower() == b"bearer" else headers.get(b"api-key", headers.get(b"x-api-key", b""))
        digest = hashlib.sha256(key).digest()
        # An unset variable on either side is no key.
        if not key or not sum(hmac.compare_digest(digest, known) for known in self._keys):
            raise ApiError(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    # --- forwarded ----------------------------------------------------------------------------------------------

    async def _forward(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        raw, body = await read_object(scope, receive)
        await aside(len(raw), lambda: check_roles(body))
        model, adapter = await self._find(body.get("model"))
        wanted = adapter.name if adapter else model.name
        if body.get("model") != wanted:
            body["model"] = wanted
            raw = await aside(len(raw), lambda: json.dumps(body, ensure_ascii=True).encode())
        request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")[:100]
        request = GatewayRequest("POST", path, raw, body, str(adapter or ""), request_id)
        sending = asyncio.ensure_future(self._relay(model.forwarder, request, send))
        leaving = asyncio.ensure_future(client_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, Exception):
                    await task

    async def _relay(self, forwarder: Forwarder, request: GatewayRequest, send: Send) -> None:
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

    async def _find(self, name: Any) -> tuple[ServedModel, AdapterKey | None]:
        """The model and the adapter's key that a client's ``model`` means.

        ``NAME`` of a model, ``ADAPTER``, or ``NAME:ADAPTER``; without a name the only model. Raises ApiError (404).
        """
        if name is None and len(self.models) == 1:
            name = next(iter(self.models))
        if not isinstance(name, str):
            raise ApiError(400, "model: expected the name of a model", param="model")
        if model := self.models.get(name):
            return model, AdapterKey(model.default_adapter) if model.default_adapter else None
        for base in [base for base in self.models if name.startswith(f"{base}:")] or self.models:
            if key := await self.models[base].adapters.key_of(name.removeprefix(f"{base}:")):
                return self.models[base], key
        raise _no_model(name, f"; models: {', '.join(self.models)}")

    # --- about the server ---------------------------------------------------------------------------------------

    def _make_own_app(self) -> FastAPI:
        """The app of every path that is not forwarded."""
        app = FastAPI(
            title="RaySwift", version=__version__, openapi_url=None, redirect_slashes=False,
            responses={"4XX": {"model": Refusal}},
        )  # fmt: skip
        add_error_handlers(app, FAILURE)
        app.add_api_route("/v1/models", self.list_models)
        app.add_api_route("/v1/models/{model:path}", self.get_model)
        app.add_api_route("/v1/adapters", self.list_adapters)
        content = {"application/json": {"schema": AdapterRequest.model_json_schema()}}
        body = {"requestBody": {"required": True, "content": content}}
        app.add_api_route("/v1/load_lora_adapter", self.load_adapter, methods=["POST"], openapi_extra=body)
        app.add_api_route("/v1/unload_lora_adapter", self.unload_adapter, methods=["POST"], openapi_extra=body)
        app.add_api_route("/health", self.health, responses={"503": {"model": Refusal}})
        app.add_api_route("/livez", self.live)
        app.add_api_route("/metrics", self.metrics)
        app.add_api_route("/ping", self.health, methods=["GET", "POST"], include_in_schema=False)
        app.add_api_route("/openapi.json", self.openapi, include_in_schema=False)
        app.add_api_route("/docs", self.docs, include_in_schema=False)
        for path in FORWARDED:  # for their 405; `_answer` takes what they can do
            app.add_api_route(path, self.health, methods=["POST"], include_in_schema=False)
        return app

    async def list_models(self) -> Any:
        """Models and adapters, as OpenAI's model cards."""
        cards: list[dict[str, Any]] = []
        for model in self.models.values():
            adapters = [name for name in await model.adapters.names() if name != model.default_adapter]
            cards += model_cards(
                model.name, adapters, created=model.created, owned_by=model.owned_by,
                max_model_len=await model.forwarder.context_length(), fingerprints=model.fingerprints,
            )  # fmt: skip
        return {"object": "list", "data": cards}

    async def get_model(self, model: str) -> Any:
        """One model or adapter."""
        for card in (await self.list_models())["data"]:
            if card["id"] == model:
                return card
        raise _no_model(model)

    async def list_adapters(self) -> Any:
        """Adapters that can be asked for."""
        data = [
            {"id": name, "object": "adapter", "model": model.name}
            for model in self.models.values()
            for name in await model.adapters.names()
        ]
        return {"object": "list", "data": data}

    async def load_adapter(self, body: Body) -> Any:
        """Load an adapter (the fields are vLLM's). Until one replica has loaded it the name means what it did."""
        name, replace = body.get("lora_name"), body.get("load_inplace") or False
        if not isinstance(name, str):
            raise ApiError(400, "lora_name: expected the name of an adapter", param="lora_name")
        if not isinstance(replace, bool):
            raise ApiError(400, "load_inplace: expected true or false", param="load_inplace")
        model = self._owner(body)
        key = await model.adapters.candidate(name, body.get("lora_path"), replace=replace)
        await model.forwarder.prepare(str(key))
        await model.adapters.name(key, replace=replace)
        return {"id": name, "object": "adapter", "model": model.name}

    async def unload_adapter(self, body: Body) -> Any:
        """Unload an adapter from the running replicas; one of the server's own loads again when it is asked for."""
        name, model = body.get("lora_name"), self._owner(body)
        key = await model.adapters.key_of(name) if isinstance(name, str) else None
        if key is None:
            raise ApiError(404, f"adapter {str(name)[:200]}: not known", code="adapter_not_found", param="lora_name")
        version = await model.adapters.remove(key)
        replicas = await model.forwarder.broadcast("forget_adapter", key.name, version)
        return {"id": name, "object": "adapter", "unloaded": True, "replicas": len(replicas)}

    def _owner(self, body: dict[str, Any]) -> ServedModel:
        """The model of an adapter request; the first one where it names none."""
        name = body.get("model")
        if name is None:
            return next(iter(self.models.values()))
        if not isinstance(name, str) or name not in self.models:
            raise _no_model(name)
        return self.models[name]

    async def health(self) -> Any:
        """Whether requests are answered now: every model has a replica that says so, or starts one when asked."""
        able = await asyncio.gather(*(model.forwarder.can_answer(model.may_sleep) for model in self.models.values()))
        if missing := [name for name, answers in zip(self.models, able, strict=True) if not answers]:
            raise ApiError(503, f"no replica can answer for {', '.join(missing)}", code="not_ready", retry_after=5)
        return {"status": "ok", "models": list(self.models)}

    async def live(self) -> Any:
        """Whether this process answers; no replica is asked."""
        return {"status": "ok"}

    async def metrics(self) -> PlainTextResponse:
        """Metrics of the gateways and of each running replica's engine, for Prometheus."""
        texts: dict[str, dict[str, str]] = {}
        for name, model in self.models.items():
            with suppress(ApiError):  # a replica hangs: the rest is still true
                texts[name] = dict(await model.forwarder.broadcast("engine_metrics"))
        totals = await self.shared.totals()
        return PlainTextResponse(as_prometheus(totals, texts), media_type="text/plain; version=0.0.4")

    async def openapi(self) -> JSONResponse:
        """The schema of the public paths: this app's, and the engine's own for those that are forwarded."""
        if self._schema is not None:
            return JSONResponse(self._schema)
        forwarder, engine = next(iter(self.models.values())).forwarder, None
        if await forwarder.broadcast("check_health"):  # to read a schema is no reason to start a replica
            engine = json.loads(await forwarder.whole(GatewayRequest("GET", "/openapi.json")))
        schema = public_schema(self._own.openapi(), engine, FORWARDED)
        self._schema = schema if engine else None
        return JSONResponse(schema)

    async def docs(self) -> HTMLResponse:
        """A page to try the paths."""
        return get_swagger_ui_html(openapi_url="/openapi.json", title="RaySwift")

    # --- for Serve and for the driver -----------------------------------------------------------------------------

    def reconfigure(self, settings: dict[str, Any]) -> None:
        """Whose deployment this is (`application.gateways_on`): nothing here depends on it."""

    async def stats(self) -> dict[str, Any]:
        """The counters of all gateways, for the status line of ``rayswift deploy``."""
        return await self.shared.totals()

    async def __del__(self) -> None:
        self._board.cancel()
        if self._server is not None:
            self._server.should_exit = True
            await self._server.task  # requests that run finish; Serve waits for --drain_timeout
        for model in self.models.values():
            model.forwarder.close()
        self.shared.close()
        await self._session.close()
        await asyncio.sleep(GOODBYE_SECONDS)


def _no_model(name: Any, more: str = "") -> ApiError:
    message = f"The model `{str(name)[:200]}` does not exist{more}"
    return ApiError(404, message, code="model_not_found", param="model")
