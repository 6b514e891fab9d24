"""Anthropic's Messages (``/v1/messages``) over the chat path: the fields, the limits and the events of vLLM's."""

from __future__ import annotations

import json
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import AfterValidator, Field

from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.conversion import Body, Chat, Delta, answer, chat_request, deltas, finish_of
from rayswift.serve.replica.openai_requests import ChatRequest
from rayswift.serve.replica.trained_template import as_function

#: What Claude Code puts first: other for each request, it would only spoil shared prefixes. vLLM leaves it out too.
_BILLING = "x-anthropic-billing-header"
Count = Callable[[ChatRequest], Awaitable[int]]


class Block(Body):
    """A part of a message."""

    type: Literal["text", "image", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str | None = None
    source: dict[str, Any] | None = None
    id: str | None = None
    tool_use_id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    content: str | list[dict[str, Any]] | None = None
    thinking: str | None = None


class Message(Body):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Body):
    """A tool that the model may call."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any]


def _as_sent(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool that is one, with its fields in the order in which the model shall read them."""
    Tool.model_validate(tool)
    return tool


class ToolChoice(Body):
    """Whether a tool is called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model thinks first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1024)


class OutputFormat(Body):
    """The JSON schema of the answer."""

    type: Literal["json_schema"] = "json_schema"
    json_schema: dict[str, Any] | None = Field(None, alias="schema")


class OutputConfig(Body):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Body):
    """``POST /v1/messages/count_tokens``."""

    model: str | None = None
    messages: list[Message]
    system: str | list[Block] | None = None
    tools: list[Annotated[dict[str, Any], AfterValidator(_as_sent)]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_chat(self) -> dict[str, Any]:
        """The same as a chat request."""
        system = [*_texts(self.system or []), *(text for turn in self.messages if turn.role == "system"
                                                for text in _texts(turn.content))]  # fmt: skip
        messages: list[dict[str, Any]] = [{"role": "system", "content": "".join(system)}] if system else []
        for turn in self.messages:
            if turn.role != "system":
                messages += _turn(turn)
        chat: dict[str, Any] = {
            "model": self.model, "messages": messages, "chat_template_kwargs": self.chat_template_kwargs,
        }  # fmt: skip
        if self.tools is not None:
            chat["tools"] = [as_function(tool) for tool in self.tools]
            chat["tool_choice"] = "auto"
        if choice := self.tool_choice:
            chat["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
            chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
            if choice.type == "tool":
                if not choice.name:
                    raise ApiError(400, "tool_choice.name is required when type is 'tool'", param="tool_choice.name")
                chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        config = self.output_config or OutputConfig()
        chat["reasoning_effort"] = config.effort
        if config.format is not None and config.format.json_schema is not None:
            schema = {"name": "json_schema", "schema": config.format.json_schema}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self.thinking is not None and self.thinking.type == "disabled":
            chat["reasoning_effort"] = "none"
        return chat


class MessagesRequest(CountTokensRequest):
    """``POST /v1/messages``."""

    max_tokens: int = Field(ge=1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    def to_chat(self) -> dict[str, Any]:
        budget = self.thinking.budget_tokens if self.thinking else None
        if budget is not None and budget >= self.max_tokens:
            raise ApiError(400, "thinking.budget_tokens must be less than max_tokens", param="thinking.budget_tokens")
        if budget is not None:
            raise ApiError(
                400, "thinking.budget_tokens: this engine cannot end thoughts; ask with {\"type\": \"adaptive\"}",
                param="thinking.budget_tokens",
            )  # fmt: skip
        same = ("max_tokens", "stream", "temperature", "top_k", "top_p")
        chat = {**super().to_chat(), **{name: getattr(self, name) for name in same}, "stop": self.stop_sequences}
        if self.stream:
            chat["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return chat


def _texts(content: Any) -> list[str]:
    """The texts of a system prompt."""
    texts = [content] if isinstance(content, str) else [block.text or "" for block in content if block.type == "text"]
    return [text for text in texts if text and not text.startswith(_BILLING)]


def _turn(turn: Message) -> Iterator[dict[str, Any]]:
    """A turn as chat messages: results of tools are messages of their own, before the rest."""
    if isinstance(turn.content, str):
        yield {"role": turn.role, "content": turn.content}
        return
    parts, calls, thoughts = [], [], []
    for block in turn.content:
        if block.type == "tool_result":
            yield from _result(block)
        elif block.type == "text" and block.text:
            parts.append({"type": "text", "text": block.text})
        elif block.type == "image" and block.source:
            parts.append(_image(block.source))
        elif block.type == "thinking" and block.thinking:
            thoughts.append(block.thinking)
        elif block.type == "tool_use":
            function = {"name": block.name or "", "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
            calls.append({"id": block.id or "", "type": "function", "function": function})
    message: dict[str, Any] = {"role": turn.role}
    if parts:
        message["content"] = parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning"] = "".join(thoughts)
    if len(message) > 1:
        yield message


def _result(block: Block) -> Iterator[dict[str, Any]]:
    items: list[dict[str, Any]]
    items = [{"type": "text", "text": block.content}] if isinstance(block.content, str) else block.content or []
    text = "\n".join(str(item.get("text", "")) for item in items if item.get("type") == "text")
    yield {"role": "tool", "tool_call_id": block.tool_use_id or "", "content": text}
    if images := [_image(item.get("source") or {}) for item in items if item.get("type") == "image"]:
        yield {"role": "user", "content": images}


def _image(source: dict[str, Any]) -> dict[str, Any]:
    url = source.get("url") or f"data:{source.get('media_type', 'image/jpeg')};base64,{source.get('data', '')}"
    return {"type": "image_url", "image_url": {"url": url}}


# --- answers ------------------------------------------------------------------------------------------------------


class MessagesWriter:
    """A message, whole or as events: one block of content after the other, each begun, filled and ended."""

    def __init__(self, stop_sequences: list[str] | None = None) -> None:
        self._stops = stop_sequences or []
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks: list[tuple[str, int]] = []  # kind, and number of a tool call
        self._arguments = ""  # of the last call
        self._finish: tuple[str | None, Any] = (None, None)
        self._usage: dict[str, int] = {}
        self._model = ""

    def whole(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The message."""
        content: list[dict[str, Any]] = []
        for piece in deltas(answer):
            if piece.kind == "reasoning":
                content.append({"type": "thinking", "thinking": piece.text, "signature": uuid.uuid4().hex})
            elif piece.kind == "text":
                content.append({"type": "text", "text": piece.text})
            else:
                self._arguments = piece.text
                content.append(_use(piece, _object(piece.text)))
        kinds = {block["type"] for block in content}
        return {
            "id": self._id, "type": "message", "role": "assistant", "model": answer["model"],
            "content": content or [{"type": "text", "text": ""}], "usage": _usage(answer.get("usage")),
            **self._stop(finish_of(answer), "tool_use" in kinds),
        }  # fmt: skip

    def take(self, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a chunk of a chat stream."""
        self._usage = _usage(chunk["usage"]) if chunk.get("usage") else self._usage
        if not self._model:
            self._model = chunk["model"]
            message: dict[str, Any] = {
                "id": self._id, "type": "message", "role": "assistant", "model": self._model, "content": [],
                "stop_reason": None, "stop_sequence": None, "usage": self._usage or _usage(None),
            }  # fmt: skip
            yield {"type": "message_start", "message": message}
        for piece in deltas(chunk):
            if (piece.kind, piece.number) not in self._blocks[-1:]:
                yield from self._end_block()
                self._blocks.append((piece.kind, piece.number))
                self._arguments = ""
                begun = {"reasoning": {"type": "thinking", "thinking": "", "signature": ""},
                         "text": {"type": "text", "text": ""}}.get(piece.kind) or _use(piece, {})  # fmt: skip
                yield {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": begun}
            kind, key = {"reasoning": ("thinking_delta", "thinking"), "text": ("text_delta", "text")}.get(
                piece.kind, ("input_json_delta", "partial_json")
            )
            if piece.kind == "tool":
                self._arguments += piece.text
            if piece.text:
                yield self._delta({"type": kind, key: piece.text})
        if finish_of(chunk)[0]:
            self._finish = finish_of(chunk)

    def end(self) -> Iterator[dict[str, Any]]:
        """What closes the message."""
        yield from self._end_block()
        used = any(kind == "tool" for kind, _ in self._blocks)
        yield {"type": "message_delta", "delta": self._stop(self._finish, used), "usage": self._usage or _usage(None)}
        yield {"type": "message_stop"}

    def _end_block(self) -> Iterator[dict[str, Any]]:
        if not self._blocks:
            return
        if self._blocks[-1][0] == "reasoning":
            yield self._delta({"type": "signature_delta", "signature": uuid.uuid4().hex})
        yield {"type": "content_block_stop", "index": len(self._blocks) - 1}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _stop(self, finish: tuple[str | None, Any], used: bool) -> dict[str, Any]:
        """Why the message ended: a call that a stop text cut short must not run."""
        reason, stop = finish
        if reason == "length":
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        if stop in self._stops and not (used and _is_json(self._arguments)):
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        return {"stop_reason": "tool_use" if used else "end_turn", "stop_sequence": None}


def _use(piece: Delta, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": arguments}


def _object(text: str) -> dict[str, Any]:
    """The arguments of a call; none of one that was cut short, as the reason of stopping says then."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_json(text: str) -> bool:
    try:
        return json.loads(text) is not None
    except ValueError:
        return False


def _usage(usage: dict[str, Any] | None) -> dict[str, int]:
    usage = usage or {}
    return {"input_tokens": usage.get("prompt_tokens") or 0, "output_tokens": usage.get("completion_tokens") or 0}


def add_routes(app: FastAPI, chat: Chat, count: Count) -> None:
    """Have ``app`` answer Messages. ``chat``: the chat path; ``count``: tokens of a chat request's prompt."""

    @app.post("/v1/messages")
    async def create(body: MessagesRequest, request: Request) -> Response:
        return await answer(chat, body, MessagesWriter(body.stop_sequences), request)

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest) -> Any:
        tokens = await count(chat_request(body))
        return {"input_tokens": tokens, "context_management": {"original_input_tokens": tokens}}
