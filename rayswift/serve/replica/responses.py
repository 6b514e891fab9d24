"""OpenAI's Responses (``/v1/responses``) over the chat path: the fields, the limits and the events of vLLM's.

Nothing is stored: a conversation is sent whole, as with vLLM as it is started here.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import ConfigDict, Field

from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.conversion import Body, Chat, Delta, answer, deltas, finish_of
from rayswift.serve.replica.trained_template import as_function

LOGPROBS = "message.output_text.logprobs"
#: Fields that a chat request has under the same name and with the same meaning.
_SAME = (
    "model", "stream", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "include_stop_str_in_output", "structured_outputs", "parallel_tool_calls", "chat_template_kwargs",
)  # fmt: skip
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")


class Reasoning(Body):
    """How much the model thinks first."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Body):
    """``POST /v1/responses``. Fields of `_SAME` are checked as those of a chat."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    metadata: dict[str, str] | None = None
    previous_response_id: str | None = None
    prompt: dict[str, Any] | None = None
    background: bool | None = None
    reasoning: Reasoning | None = None
    include: list[str] | None = None
    include_reasoning: bool = True
    top_logprobs: int | None = Field(None, ge=0)
    store: bool | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] = "auto"
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None
    user: str | None = None

    def to_chat(self) -> dict[str, Any]:
        """The same as a chat request."""
        if self.previous_response_id is not None:
            message = f"Response with id '{self.previous_response_id[:100]}' not found: this server stores none"
            raise ApiError(404, message, code="response_not_found", param="previous_response_id")
        for name, why in (("background", "nothing is stored"), ("prompt", "there are no prompt templates")):
            if getattr(self, name):
                raise ApiError(400, f"{name} is not available: {why}", param=name)
        given = {**(self.model_extra or {}), **{name: getattr(self, name) for name in type(self).model_fields}}
        chat = {name: given[name] for name in _SAME if given.get(name) is not None}
        chat |= {"messages": self._messages(), "max_completion_tokens": self.max_output_tokens}
        if self.tools:
            chat["tools"] = [_function(tool, place) for place, tool in enumerate(self.tools)]
            choice = self.tool_choice
            if isinstance(choice, dict):
                choice = {"type": "function", "function": {"name": choice.get("name")}}
            chat["tool_choice"] = choice
        if self.reasoning is not None and self.reasoning.effort is not None:
            chat["reasoning_effort"] = self.reasoning.effort
        if LOGPROBS in (self.include or ()):
            chat |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        if self.stream:
            chat["stream_options"] = {"include_usage": True}
        layout = (self.text or {}).get("format") or {}
        if layout.get("type", "text") != "text":
            schema = {key: value for key, value in layout.items() if key != "type"}
            chat["response_format"] = {"type": layout["type"]} | ({"json_schema": schema} if schema else {})
        return chat

    def _messages(self) -> list[dict[str, Any]]:
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for place, item in enumerate(self.input):
            role, said = _said(item, place)
            last = messages[-1] if messages else {}
            if role == last.get("role") == "assistant" and (calls := said.get("tool_calls")) and "tool_calls" in last:
                last["tool_calls"] += calls
            elif role == last.get("role") == "assistant" and not said.keys() & last.keys():
                last |= said  # thoughts, text and calls of one turn come as items of their own
            else:
                messages.append({"role": role, **said})
        return messages


def _said(item: dict[str, Any], place: int) -> tuple[str, dict[str, Any]]:
    """Who says an item of the input, and what. Raises ApiError (400)."""
    kind = item.get("type", "message")
    if kind == "message" and isinstance(item.get("role"), str):
        return item["role"], {"content": _content(item.get("content"))}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return "assistant", {"tool_calls": [call]}
    if kind == "function_call_output":
        return "tool", {"tool_call_id": item.get("call_id"), "content": _content(item.get("output"))}
    if kind == "reasoning":
        texts = item.get("content") or item.get("summary") or [{}]
        return "assistant", {"reasoning": str(texts[0].get("text", ""))}
    raise ApiError(400, f"input[{place}]: items of type {str(kind)[:80]!r} are not taken", param="input")


def _content(content: Any) -> Any:
    """Text as it is; parts as a chat has them, so that it refuses what it cannot take."""
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in _TEXT_PARTS:
            parts.append({"type": "text", "text": part.get("text", part.get("refusal"))})
        else:
            parts.append(part)
    return parts[0]["text"] if len(parts) == 1 and isinstance(parts[0], dict) and "text" in parts[0] else parts


def _function(tool: dict[str, Any], place: int) -> dict[str, Any]:
    function = as_function(tool) if tool.get("type") == "function" else None
    if function is None:
        raise ApiError(400, f"tools[{place}]: only functions with a name are called here", param="tools")
    return function


# --- answers ------------------------------------------------------------------------------------------------------


class ResponsesWriter:
    """A response, whole or as events: one item of the output after the other, each added, filled and done."""

    def __init__(self, request: ResponsesRequest) -> None:
        self._request = request
        self._head = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        self._items: list[dict[str, Any]] = []
        self._at: tuple[str, int] | None = None  # kind of the last item, and number of a tool call
        self._number = 0
        self._usage: dict[str, Any] | None = None
        self._finish: str | None = None
        self._model = ""

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The response."""
        for _ in self._pieces(answer):
            pass
        for item in self._items:
            item["status"] = "completed"
        self._model, self._usage, self._finish = answer["model"], answer.get("usage"), finish_of(answer)[0]
        return self._response()

    def take(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a chunk of a chat stream."""
        self._usage = chunk.get("usage") or self._usage
        self._finish = finish_of(chunk)[0] or self._finish
        if not self._model:
            self._model = chunk["model"]
            for kind in ("response.created", "response.in_progress"):
                yield self._numbered({"type": kind, "response": self._response(status="in_progress")})
        yield from map(self._numbered, self._pieces(chunk))

    def end(self) -> Iterator[dict[str, Any]]:
        """What closes the response. As with vLLM it is ``completed`` also where tokens ran out: its status says so."""
        yield from map(self._numbered, self._end_item())
        yield self._numbered({"type": "response.completed", "response": self._response()})

    def _pieces(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for piece in deltas(chunk):
            if piece.kind == "reasoning" and not self._request.include_reasoning:
                continue
            if (piece.kind, piece.number) != self._at:
                yield from self._end_item()
                self._at = (piece.kind, piece.number)
                yield from self._new_item(piece)
            if not piece.text:
                continue
            item = self._items[-1]
            if piece.kind == "tool":
                item["arguments"] += piece.text
                yield self._inside("response.function_call_arguments.delta", delta=piece.text)
                continue
            part = item["content"][0]
            part["text"] += piece.text
            more = {}
            if piece.kind == "text":
                part["logprobs"] += piece.logprobs
                more["logprobs"] = list(piece.logprobs)
            yield self._inside(f"response.{part['type']}.delta", content_index=0, delta=piece.text, **more)

    def _new_item(self, piece: Delta) -> Iterator[dict[str, Any]]:
        name = uuid.uuid4().hex
        item: dict[str, Any]
        part: dict[str, Any] | None = None
        if piece.kind == "tool":
            item = {
                "id": f"fc_{name}", "type": "function_call", "status": "in_progress", "arguments": "",
                "call_id": piece.call_id or f"call_{name}", "name": piece.name,
            }  # fmt: skip
        elif piece.kind == "reasoning":
            item = {"id": f"rs_{name}", "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": f"msg_{name}", "type": "message", "status": "in_progress", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._items.append(item)
        yield self._outer("response.output_item.added", item=_copy(item))
        if part is not None:
            item["content"].append(part)
            yield self._inside("response.content_part.added", content_index=0, part=_copy(part))

    def _end_item(self) -> Iterator[dict[str, Any]]:
        if not self._items:
            return
        item = self._items[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            told = {key: item[key] for key in ("name", "arguments")}
            yield self._inside("response.function_call_arguments.done", **told)
        else:
            part = item["content"][0]
            same = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._inside(f"response.{part['type']}.done", content_index=0, text=part["text"], **same)
            yield self._inside("response.content_part.done", content_index=0, part=_copy(part))
        yield self._outer("response.output_item.done", item=_copy(item))

    def _outer(self, kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "output_index": len(self._items) - 1, **fields}

    def _inside(self, kind: str, **fields: Any) -> dict[str, Any]:
        return self._outer(kind, item_id=self._items[-1]["id"], **fields)

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        self._number += 1
        return {**event, "sequence_number": self._number - 1}

    def _response(self, status: str | None = None) -> dict[str, Any]:
        asked, cut = self._request, self._finish == "length"
        same = (
            "instructions", "max_output_tokens", "metadata", "previous_response_id", "temperature", "top_p", "tools",
            "tool_choice", "user",
        )  # fmt: skip
        return {
            **self._head,
            "status": status or ("incomplete" if cut else "completed"),
            "model": self._model,
            "output": [] if status else [_copy(item) for item in self._items],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut and not status else None,
            "usage": None if status else _usage(self._usage or {}),
            **{name: getattr(asked, name) for name in same},
            "background": False,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "reasoning": asked.reasoning.model_dump() if asked.reasoning else None,
            "store": False,
            "text": asked.text or {"format": {"type": "text"}},
            "top_logprobs": asked.top_logprobs,
            "truncation": asked.truncation or "disabled",
        }


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return {key: [dict(part) for part in value] if isinstance(value, list) else value for key, value in item.items()}


def _usage(usage: dict[str, Any]) -> dict[str, Any]:
    read, wrote = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    return {
        "input_tokens": read, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": wrote, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": read + wrote,
    }  # fmt: skip


def add_routes(app: FastAPI, chat: Chat) -> None:
    """Have ``app`` answer Responses by its chat path."""

    @app.post("/v1/responses")
    async def create(body: ResponsesRequest, request: Request) -> Response:
        return await answer(chat, body, ResponsesWriter(body), request)
