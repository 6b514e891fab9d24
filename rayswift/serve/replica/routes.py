"""The routes of `transformers_app`, its errors in OpenAI's shape, and the limits of bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from rayswift.serve.lease import App, Receive, Scope, Send
from rayswift.serve.openai_errors import ApiError, error_body
from rayswift.serve.replica.openai_requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from rayswift.serve.request_body import read_object

if TYPE_CHECKING:
    from rayswift.serve.replica.transformers import TransformersServing


def make_app(serving: TransformersServing) -> App:
    """The ASGI app with its routes."""
    app = FastAPI(title="RaySwift", docs_url=None, redoc_url=None, redirect_slashes=False)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.check()
        _, _, encoder = serving.find(body.model)
        return await serving.answer(request, body, [await serving.chat_prompt(encoder, body)], echo=False)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        body.check()
        serving.find(body.model)
        prompts = [await serving.plain_prompt(prompt) for prompt in body.prompts]
        return await serving.answer(request, body, prompts, echo=bool(body.echo))

    @app.get("/v1/models")
    async def models() -> Any:
        card = {"object": "model", "owned_by": "rayswift", "max_model_len": serving.engine.context_length}
        parents = {name: None if name == serving.name else serving.name for name in serving.names()}
        return {
            "object": "list",
            "data": [{"id": name, **card, "parent": parent} for name, parent in parents.items()],
        }

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        _, _, encoder = serving.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "tokenize: give either prompt or messages", param="prompt")
        if body.prompt is None:
            ids = (await serving.chat_prompt(encoder, body)).ids
        else:
            special = body.add_special_tokens is not False
            ids = (await serving.plain_prompt(body.prompt, special_tokens=special)).ids
        texts = encoder.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        limit = serving.engine.context_length
        return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Any:
        serving.find(body.model)
        serving.check_ids(body.tokens, "tokens")
        return {"prompt": await asyncio.to_thread(serving.engine.encoder.tokenizer.decode, body.tokens)}

    @app.get("/health")
    async def health() -> Any:
        await serving.check_health()
        return {"status": "ok"}

    _add_error_handlers(app)
    return _Checked(app)


def _add_error_handlers(app: FastAPI) -> None:
    def respond(error: ApiError) -> Response:
        return Response(error.body(), error.status, error.headers, "application/json")

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][1:])[:200]
        return respond(ApiError(400, f"{where or 'body'}: {problem['msg']}", param=where or None))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return respond(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        return Response(error_body(500, "the engine failed; its log says why"), 500, media_type="application/json")


class _Checked:
    """Reads bodies within their limits before the app sees them."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        try:
            raw, _ = await read_object(scope, receive)
        except ApiError as error:
            response = Response(error.body(), error.status, error.headers, "application/json")
            await response(scope, receive, send)
            return
        await self.app(scope, _after(raw, receive), send)


def _after(raw: bytes, receive: Receive) -> Callable[[], Awaitable[Any]]:
    """``receive`` that starts with a body that has been read."""
    waiting = [{"type": "http.request", "body": raw, "more_body": False}]

    async def receiving() -> Any:
        return waiting.pop() if waiting else await receive()

    return receiving
