"""Messages in any spelling to ``{"role", "content"}`` messages: key and role aliases, sharegpt pairs, JSON text,
OpenAI ``tool_calls``, and content written as parts (OpenAI, Anthropic, Hugging Face)."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rayswift.data.json_text import has_half_surrogate, loads_literal

ROLES = frozenset({"system", "user", "assistant", "tool_call", "tool_response", "tool"})
ROLE_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": "tool_call",
    "function-call": "tool_call",
    "function_response": "tool_response",
    "function-response": "tool_response",
    "function": "tool_response",
    "observation": "tool_response",
    "observations": "tool_response",
}
#: What a part of a message stands for in the text, by the part's type: (column of the file, placeholder).
_MEDIA_PARTS = {
    kind: (f"{medium}s", f"<{medium}>")
    for medium in ("image", "video", "audio")
    for kind in (medium, f"{medium}_url", f"input_{medium}")
}
_TEXT_PARTS = ("text", "input_text", "output_text")
#: Thoughts kept apart from the answer: templates differ in how they are spelled, so they are not put into the text.
_THOUGHT_PARTS = ("thinking", "redacted_thinking")
THOUGHT_KEYS = ("reasoning_content", "reasoning")
_IMAGE_TYPES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}

HALF_SURROGATE = "a text holds half a surrogate pair (a broken emoji), which is not valid Unicode"
THOUGHTS_LEFT_OUT = "thoughts beside the answer are not trained; write them into content as <think>…</think>"


class Unusable(Exception):
    """A row that cannot be used; the message is the reason that is reported."""


@dataclass(frozen=True)
class MessageNames:
    """The ``messages`` settings of a ``dataset_info.json`` entry: names in use instead of (keys) or beside (roles)
    the usual ones. None: the usual ones alone."""

    role_key: str | None = None
    content_key: str | None = None
    user_role: str | None = None
    assistant_role: str | None = None
    system_role: str | None = None

    @cached_property
    def role_keys(self) -> tuple[str, ...]:
        """Where a message has its role, first choice first."""
        return (self.role_key,) if self.role_key else ("role", "from")

    @cached_property
    def content_keys(self) -> tuple[str, ...]:
        """Where a message has its content, first choice first."""
        return (self.content_key,) if self.content_key else ("content", "value")

    @cached_property
    def roles(self) -> dict[str, str]:
        """Role as written → standard role."""
        named = {self.user_role: "user", self.assistant_role: "assistant", self.system_role: "system"}
        usual = {role: role for role in ROLES} | ROLE_ALIASES
        return usual | {name: role for name, role in named.items() if name}


USUAL_NAMES = MessageNames()


@dataclass
class ParsedMessages:
    """What a messages value held: the messages, the files inside them by column, and what was left out."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    media: dict[str, list[Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, role: str, content: str, kept: Mapping[str, Any]) -> None:
        """Append one message."""
        self.messages.append({"role": role, "content": content, **kept})

    def warn(self, warning: str) -> None:
        """Note once what was left out."""
        if warning not in self.warnings:
            self.warnings.append(warning)


def plain_messages(value: Any, names: MessageNames = USUAL_NAMES) -> list[dict[str, Any]] | None:
    """The messages of a list in which each is a known role and a text and nothing else (nearly every row of nearly
    every dataset), fast; None for anything that :func:`read_messages` has to look at."""
    if type(value) is not list or not value:
        return None
    roles, role_key, content_key = names.roles, names.role_keys[0], names.content_keys[0]
    messages = []
    try:
        for item in value:
            content = item[content_key]
            if len(item) != 2 or type(content) is not str:
                return None
            messages.append({"role": roles[item[role_key]], "content": content})
    except (KeyError, TypeError):
        return None
    return messages


def read_messages(value: Any, names: MessageNames = USUAL_NAMES) -> ParsedMessages:
    """Read a messages value: a list of messages or pairs, or its JSON or Python text.

    Raises:
        Unusable: it is no such thing; the message says what is wrong with it.
    """
    if isinstance(value, str):
        value = parse_text(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise Unusable("the messages column is empty or not a list")
    parsed = ParsedMessages()
    for item in value:
        _read_message(item, names, parsed)
    return parsed


def parse_text(text: str) -> Any:
    """A value that a column holds as JSON or Python text; None if it is neither.

    Raises:
        Unusable: it holds text that cannot be stored.
    """
    value = loads_literal(text)
    if not text.isascii() or "\\u" in text or "\\U" in text:
        refuse_half_surrogates(value)
    return value


def refuse_half_surrogates(value: Any) -> None:
    """Raise Unusable for text that no encoding can store."""
    if has_half_surrogate(value):
        raise Unusable(HALF_SURROGATE)


def is_message(value: Any, names: MessageNames = USUAL_NAMES) -> bool:
    """Whether a value is an object with a role."""
    return isinstance(value, Mapping) and any(value.get(key) is not None for key in names.role_keys)


def media_file(item: Any) -> Any:
    """One file of an images, videos or audios column as ``{"bytes": None, "path": path, URL or data: URI}``.

    Rows travel as JSON, so bytes become a ``data:`` URI. A list (the frames of a video) is one item.
    """
    if isinstance(item, str):
        return {"bytes": None, "path": item}
    if isinstance(item, (list, tuple)):
        return [media_file(frame) for frame in item]
    if isinstance(item, bytes):
        return {"bytes": None, "path": _data_uri(item)}
    if not isinstance(item, Mapping):
        raise Unusable("an image, video or audio is neither a path nor an object with bytes or path")
    if isinstance(item.get("bytes"), bytes):
        return {**item, "bytes": None, "path": _data_uri(item["bytes"])}
    return dict(item)


def _data_uri(data: bytes) -> str:
    kind = next((kind for magic, kind in _IMAGE_TYPES.items() if data.startswith(magic)), "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read_message(item: Any, names: MessageNames, parsed: ParsedMessages) -> None:
    """One message of any spelling; it may become several (text, tool calls, tool results)."""
    if isinstance(item, str):  # ms-swift writes its val_dataset.jsonl so
        item = parse_text(item)
    if not isinstance(item, Mapping):
        raise Unusable("a message is not an object with role and content")
    name = _first(item, names.role_keys)
    if name is None:
        _read_pair(item, names, parsed)
        return
    role = names.roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise Unusable(f"unknown message role {str(name)[:40]!r}")
    keys = ("loss", "loss_scale", "name") if role in ("tool", "tool_response") else ("loss", "loss_scale")
    kept = {key: item[key] for key in keys if item.get(key) is not None}
    if any(item.get(key) for key in THOUGHT_KEYS):
        parsed.warn(THOUGHTS_LEFT_OUT)
    content = _first(item, names.content_keys)
    # OpenAI's calls (a list or its JSON text), or its older single one.
    calls = item.get("tool_calls") or item.get("function_call") or []
    if isinstance(calls, str):
        calls = parse_text(calls)
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, (list, tuple)):
        raise Unusable("tool_calls is not a list of calls")
    if content is None and not calls:
        raise Unusable("a message has no content")
    if content is not None and not (calls and content in ("", [])):
        _read_content(content, role, kept, parsed)
    for call in calls:
        parsed.add("tool_call", _call_text(call), kept)


def _first(item: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _call_text(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable("a tool call has no function name")
    arguments: Any = next((function[key] for key in ("arguments", "input") if function.get(key) is not None), {})
    if isinstance(arguments, str):
        parsed = parse_text(arguments)
        arguments = arguments if parsed is None else parsed
    return _json({"name": function["name"], "arguments": arguments})


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        raise Unusable("a tool message is not valid JSON") from None


def _read_pair(item: Mapping[str, Any], names: MessageNames, parsed: ParsedMessages) -> None:
    """Sharegpt's ``{"human": …, "assistant": …}``: two messages in one object."""
    user = _first(item, (*filter(None, [names.user_role]), "human", "user"))
    assistant = _first(item, (*filter(None, [names.assistant_role]), "assistant", "gpt", "bot"))
    if user is None and assistant is None:
        raise Unusable("a message has no role")
    if not isinstance(user, str) or not isinstance(assistant, str):
        raise Unusable("a pair of messages has no text on one side")
    parsed.add("user", user, {})
    parsed.add("assistant", assistant, {})


def _read_content(content: Any, role: str, kept: Mapping[str, Any], parsed: ParsedMessages) -> None:
    if isinstance(content, str):
        parsed.add(role, content, kept)
        return
    listed = [content] if isinstance(content, Mapping) else content
    tool = role in ("tool_call", "tool_response", "tool")
    if isinstance(listed, (list, tuple)) and listed and all(_is_part(part, known_only=tool) for part in listed):
        _read_parts(list(listed), role, kept, parsed)
    elif tool and isinstance(content, (Mapping, list)):
        # Tool messages are JSON text; datasets also write the value itself.
        refuse_half_surrogates(content)
        parsed.add(role, _json(content), kept)
    else:
        raise Unusable("a message's content is neither text nor text parts")


def _is_part(part: Any, *, known_only: bool) -> bool:
    """What a tool answers may have a ``type`` of its own: ``known_only`` takes parts of text and files alone."""
    if isinstance(part, str):
        return not known_only
    kind = part.get("type") if isinstance(part, Mapping) else None
    known = isinstance(kind, str) and (kind in _TEXT_PARTS or kind in _MEDIA_PARTS)
    return known or (not known_only and isinstance(part, Mapping) and ("type" in part or "text" in part))


def _read_parts(parts: list[Any], role: str, kept: Mapping[str, Any], parsed: ParsedMessages) -> None:
    """Parts in order: text and placeholders are joined, tool calls and results become messages of their own."""
    text: list[str] = []
    before = len(parsed.messages)

    def flush() -> None:
        if text:
            parsed.add(role, "".join(text), kept)
            text.clear()

    for part in parts:
        kind = "text" if isinstance(part, str) else part.get("type") or "text"
        words = part if isinstance(part, str) else part.get("text")
        if kind in _TEXT_PARTS and isinstance(words, str):
            text.append(words)
        elif isinstance(kind, str) and kind in _MEDIA_PARTS:
            column, placeholder = _MEDIA_PARTS[kind]
            text.append(placeholder)
            file = _file_of_part(part, kind)
            if file is not None:
                parsed.media.setdefault(column, []).append(file)
        elif kind == "tool_use":
            flush()
            parsed.add("tool_call", _call_text(part), kept)
        elif kind == "tool_result":
            flush()
            _read_content("" if part.get("content") is None else part["content"], "tool_response", kept, parsed)
        elif kind in _THOUGHT_PARTS:
            parsed.warn(THOUGHTS_LEFT_OUT)
        else:
            raise Unusable(f"a message holds a part of type {str(kind)[:40]!r} that is not text, a file or a tool's")
    flush()
    if len(parsed.messages) == before:
        raise Unusable("a message has no content")


def _file_of_part(part: Mapping[str, Any], kind: str) -> Any:
    """The file of an image, video or audio part; None where the part only marks the place of a file in a column."""
    found = _first(part, (kind, "source", "url", "path", kind.split("_")[0]))
    if isinstance(found, Mapping) and not isinstance(found.get("bytes"), bytes):
        medium = next(medium for medium in ("image", "video", "audio") if medium in kind)
        if isinstance(found.get("data"), str):
            mime = found.get("media_type") or f"{medium}/{found.get('format') or '*'}"
            return {"bytes": None, "path": f"data:{mime};base64,{found['data']}"}
        found = _first(found, ("url", "path"))
        if found is None:
            raise Unusable(f"{medium} part without url, path or data")
    return None if found is None else media_file(found)
