"""Requests of other interfaces (Responses, Messages) answered by the chat path: there and back, streams included.

An interface is a request model that says the same as a chat request (`ChatForm`) and a writer of answers; both know
nothing of the engine, so what chat can do, they can.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.openai_requests import ChatRequest

Chat = Callable[[ChatRequest, Request], Awaitable[Response]]


class Body(BaseModel):
    """Fields that are not known are ignored, as vLLM does."""

    model_config = ConfigDict(protected_namespaces=(), populate_by_name=True)


class ChatForm(Protocol):
    """A request of another interface."""

    def to_chat(self) -> dict[str, Any]:
        """The same as a chat request. Raises ApiError for what a chat cannot do."""


class Writer(Protocol):
    """An answer of another interface, from what chat answers."""

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The whole answer."""

    def take(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a chunk; an event's name is its ``type``."""

    def end(self) -> Iterator[dict[str, Any]]:
        """The events after the last chunk."""


def chat_request(body: ChatForm) -> ChatRequest:
    """``body`` for the chat path. Raises RequestValidationError (a 400) for what that does not take."""
    try:
        return ChatRequest.model_validate({key: value for key, value in body.to_chat().items() if value is not None})
    except ValidationError as error:
        problems = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from None


async def answer(chat: Chat, body: ChatForm, writer: Writer, request: Request) -> Response:
    """What the chat path answers to ``body``, written by ``writer``."""
    response = await chat(chat_request(body), request)
    if isinstance(response, StreamingResponse):
        response.body_iterator = _events(response.body_iterator, writer)
    elif response.status_code == 200:
        response = JSONResponse(writer.whole(json.loads(bytes(response.body))))
    return response


async def _events(pieces: Any, writer: Writer) -> AsyncIterator[bytes]:
    async for piece in pieces:
        for event in filter(None, piece.split(b"\n\n")):
            data = event.removeprefix(b"data: ")
            chunk = {} if data == b"[DONE]" else json.loads(data)
            if "error" in chunk:
                error = chunk["error"]
                yield ApiError(500, error["message"], code=error.get("code")).named_event()
                return
            for value in writer.take(chunk) if chunk else writer.end():
                text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
                yield f"event: {value['type']}\ndata: {text}\n\n".encode()


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: of its thoughts, of its text, or of the arguments of tool call ``number``."""

    kind: str  # reasoning, text, tool
    text: str
    number: int = 0
    call_id: str = ""  # set, like the name, where a call begins
    name: str = ""
    logprobs: tuple[dict[str, Any], ...] = ()


def deltas(chunk: dict[str, Any]) -> Iterator[Delta]:
    """What a chunk of a chat stream, or the message of a whole answer, holds."""
    choice: dict[str, Any] = next(iter(chunk.get("choices") or []), {})
    message = choice.get("delta") or choice.get("message") or {}
    if thoughts := message.get("reasoning") or message.get("reasoning_content"):
        yield Delta("reasoning", thoughts)
    logprobs = tuple((choice.get("logprobs") or {}).get("content") or ())
    if text := message.get("content"):
        yield Delta("text", text, logprobs=logprobs)
    for place, call in enumerate(message.get("tool_calls") or []):
        function = call.get("function") or {}
        yield Delta(
            "tool", function.get("arguments") or "", call.get("index", place), call.get("id") or "",
            function.get("name") or "",
        )  # fmt: skip


def finish_of(chunk: dict[str, Any]) -> tuple[str | None, Any]:
    """Why the answer ended, where this chunk (or whole answer) says so, and the stop text that ended it."""
    choice: dict[str, Any] = next(iter(chunk.get("choices") or []), {})
    return choice.get("finish_reason"), choice.get("stop_reason")
