"""Reading a request's body: one JSON object of bounded size and depth, without what engines stumble over."""

from __future__ import annotations

import json
import math
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from rayswift.serve.openai_errors import ApiError

MAX_BODY_BYTES = 32 * 2**20
MAX_DEPTH = 64
#: Largest values of fields that cost the engine memory or time.
_LIMITS = {"n": 128, "best_of": 128, "logprobs": 100, "top_logprobs": 100, "prompt_logprobs": 100}
#: Fields of former versions, which engines now pass over without a word → what says the same.
_RENAMED = {
    "guided_json": 'structured_outputs: {"json": …}', "guided_regex": 'structured_outputs: {"regex": …}',
    "guided_choice": 'structured_outputs: {"choice": …}', "guided_grammar": 'structured_outputs: {"grammar": …}',
    "functions": "tools", "function_call": "tool_choice",
}  # fmt: skip
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "tool_call", "tool_response")


async def read_object(scope: Scope, receive: Receive) -> tuple[bytes, dict[str, Any]]:
    """The body's bytes and the JSON object in it.

    Raises:
        ApiError: not a JSON object (400), too large (413), nested too deeply or with text that is no Unicode (400).
        ClientDisconnect: the client left before the end.
    """
    raw = await _read(scope, receive)
    try:
        body = json.loads(raw.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    _check(body, 0)
    for name, instead in _RENAMED.items():
        if body.get(name) is not None:
            raise ApiError(400, f"{name} is no longer known: use {instead}", param=name)
    for name, limit in _LIMITS.items():
        value = body.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > limit:
            raise ApiError(400, f"{name}: {value} is above the limit of {limit}", param=name)
    return raw, body


def check_roles(body: dict[str, Any]) -> None:
    """Raises ApiError (400) for a message whose role nobody knows; an engine would write it into the prompt."""
    messages = body.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        role = message.get("role") if isinstance(message, dict) else None
        if isinstance(role, str) and role not in _ROLES:
            known = ", ".join(_ROLES)
            raise ApiError(400, f"messages[{number}].role: {role[:80]!r} is none of {known}", param="messages")


async def client_left(receive: Receive) -> None:
    """Wait until the client has left; for a request whose body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read(scope: Scope, receive: Receive) -> bytes:
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
        if not message.get("more_body"):
            return b"".join(parts)


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _check(value: Any, depth: int) -> None:
    """Raises ApiError for depth, numbers beyond all bounds, and text with lone surrogates (it cannot be encoded)."""
    if depth > MAX_DEPTH:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ApiError(400, "the body has text that is not Unicode (a lone surrogate)") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth + 1)
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ApiError(400, "the body has a number that is not finite")
    elif isinstance(value, int) and abs(value) >= 2**63:
        raise ApiError(400, f"the body has a number out of range: {str(value)[:40]}")
