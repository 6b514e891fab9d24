"""A server with OpenAI's interface that says what a test wants, and keeps what it was asked."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

#: What is said to a request: the deltas of the answer, ``{"content": …}`` and others; ``finish_reason`` in one of them
#: is the choice's.
Say = Callable[[dict[str, Any]], list[dict[str, Any]]]


@contextlib.contextmanager
def fake_endpoint(
    say: Say, model: str = "fake", card: dict[str, Any] | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of such a server (``http://…/v1``), and the chat requests it gets. ``card``: what it says of its
    model, read at each request."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    asked: list[dict[str, Any]] = []

    def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", **(card or {})}]})

    async def chat(request: Request) -> Response:
        body = await request.json()
        asked.append(body)
        deltas = [dict(delta) for delta in say(body)]
        reason = next((delta.pop("finish_reason") for delta in deltas if "finish_reason" in delta), "stop")
        if body.get("stream"):
            last = {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
            chunks = [*({"choices": [{"index": 0, "delta": delta}]} for delta in deltas), last, "[DONE]"]
            texts = (chunk if isinstance(chunk, str) else json.dumps(chunk) for chunk in chunks)
            return StreamingResponse((f"data: {text}\n\n" for text in texts), media_type="text/event-stream")
        names = dict.fromkeys(name for delta in deltas for name in delta)
        said = {name: [delta[name] for delta in deltas if name in delta] for name in names}
        message = {name: "".join(said[name]) if isinstance(said[name][0], str) else said[name][0] for name in names}
        choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": reason}
        return JSONResponse({"choices": [choice] * body.get("n", 1)})

    app = Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", chat, methods=["POST"])])
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", asked
    finally:
        server.should_exit = True
        thread.join(20)
