"""The routes of a replica with the Transformers engine: requests to its ``TransformersServing``."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayswift.serve.model_cards import model_cards
from rayswift.serve.openai_errors import ApiError, add_error_handlers
from rayswift.serve.replica import messages, responses
from rayswift.serve.replica.openai_requests import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from rayswift.serve.request_body import read_object


def make_app(serving: Any) -> ASGIApp:
    """The ASGI app of a ``TransformersServing``, with its routes."""
    app = FastAPI(title="RaySwift", docs_url=None, redoc_url=None, redirect_slashes=False)
    created = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        body.check()
        found = serving.find(body.model)
        return await serving.answer(request, body, found, [await serving.chat_prompt(found[2], body)])

    async def count(body: ChatRequest) -> int:
        _, _, encoder = serving.find(body.model)
        return len((await serving.chat_prompt(encoder, body)).ids)

    responses.add_routes(app, chat)
    messages.add_routes(app, chat, count)

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Response:
        body.check()
        found = serving.find(body.model)
        prompts = [await serving.plain_prompt(body, prompt) for prompt in body.prompts]
        return await serving.answer(request, body, found, prompts)

    @app.get("/v1/models")
    async def models() -> Any:
        cards = model_cards(
            serving.name, [name for name in serving.names() if name != serving.name], created=created,
            owned_by="rayswift", max_model_len=serving.context_length,
        )  # fmt: skip
        return {"object": "list", "data": cards}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Any:
        _, _, encoder = serving.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "tokenize: give either prompt or messages", param="prompt")
        if body.prompt is None:
            ids = (await serving.chat_prompt(encoder, body)).ids
        else:
            ids = (await serving.plain_prompt(body, body.prompt)).ids
        texts = encoder.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        limit = serving.engine.context_length
        return {"count": len(ids), "max_model_len": limit, "tokens": ids, "token_strs": texts}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Any:
        serving.find(body.model)
        return {"prompt": await asyncio.to_thread(serving.engine.encoder.tokenizer.decode, body.tokens)}

    @app.get("/health")
    async def health() -> Any:
        await serving.check_health()
        return {"status": "ok"}

    add_error_handlers(app, "the engine failed; its log says why")
    return _checked(app)


def _checked(app: ASGIApp) -> ASGIApp:
    """``app``, which gets bodies only when they are within their limits."""

    async def checking(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await app(scope, receive, send)
            return
        try:
            raw, _ = await read_object(scope, receive)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        read = [{"type": "http.request", "body": raw, "more_body": False}]

        async def reading() -> Message:
            return read.pop() if read else await receive()

        await app(scope, reading, send)

    return checking
