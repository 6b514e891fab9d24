"""Reading a request's body: one JSON object of bounded size and depth, without what engines stumble over.

A server answers others meanwhile: a large body is read with the event loop free, as far as Python lets it be.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from rayswift.serve.openai_errors import ApiError

T = TypeVar("T")

MAX_BODY_BYTES = 32 * 2**20
MAX_DEPTH = 64
#: Values and named fields of a body. Nothing else can run while JSON is parsed: that many take a fifth of a second.
MAX_VALUES, MAX_FIELDS = 2**20, 2**17
#: Answers to one request (prompts × n), and messages of one conversation.
MAX_ANSWERS, MAX_MESSAGES = 256, 2**14
#: From this size on a body is parsed in a thread, one after the other.
LARGE_BYTES = 2**18
#: Seconds for a body, beside what it takes with so many bytes a second.
BODY_SECONDS, BODY_BYTES_PER_SECOND = 30.0, 2**14
#: Bytes of bodies that are not whole yet; beyond that no large one goes on.
MAX_UNFINISHED_BYTES = 256 * 2**20
_unfinished = 0
_worker = ThreadPoolExecutor(1, thread_name_prefix="bodies")
#: Largest values of fields that cost the engine memory or time.
_LIMITS = {"n": 128, "best_of": 128, "logprobs": 100, "top_logprobs": 100, "prompt_logprobs": 100}
#: Fields of former versions, which engines now pass over without a word → what says the same.
_RENAMED = {
    "guided_json": 'structured_outputs: {"json": …}', "guided_regex": 'structured_outputs: {"regex": …}',
    "guided_choice": 'structured_outputs: {"choice": …}', "guided_grammar": 'structured_outputs: {"grammar": …}',
    "functions": "tools", "function_call": "tool_choice",
}  # fmt: skip
#: Which tool is called, where there is none to choose; OpenAI's way and Anthropic's.
_FREE_CHOICES = (None, "auto", "none", {"type": "auto"}, {"type": "none"})
_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "tool_call", "tool_response")


async def read_object(scope: Scope, receive: Receive) -> tuple[bytes, dict[str, Any]]:
    """The body's bytes and the JSON object in it; an empty list of ``tools`` is as none.

    Raises:
        ApiError: not a JSON object (400), too large (413), nested too deeply or with text that is no Unicode (400).
        ClientDisconnect: the client left before the end.
    """
    raw = await _read(scope, receive)
    return await aside(len(raw), lambda: _parse(raw))


async def aside(size: int, work: Callable[[], T]) -> T:
    """What ``work`` gives, done in a thread when it is about a large body."""
    if size < LARGE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_worker, work)


def _parse(raw: bytes) -> tuple[bytes, dict[str, Any]]:
    if len(raw) >= LARGE_BYTES:
        for what, count, limit in (
            ("values", raw.count(b",") + raw.count(b"[") + raw.count(b"{"), MAX_VALUES),
            ("named fields", raw.count(b":"), MAX_FIELDS),
        ):
            if count > limit:
                raise ApiError(413, f"the body has more than {limit} {what}")
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
        if body.get(name) not in (None, []):
            raise ApiError(400, f"{name} is no longer known: use {instead}", param=name)
    for name, limit in _LIMITS.items():
        if _number(body.get(name)) > limit:
            raise ApiError(400, f"{name}: {body[name]} is above the limit of {limit}", param=name)
    _check_work(body)
    if body.get("tools") == []:  # many clients send it always; engines differ about what it is
        del body["tools"]
        if body.get("tool_choice") in _FREE_CHOICES:
            body.pop("tool_choice", None)
        raw = json.dumps(body).encode()
    return raw, body


def _check_work(body: dict[str, Any]) -> None:
    """Raises ApiError for a request that would keep the engine from all others."""
    for name in ("messages", "input"):
        items = body.get(name)
        if isinstance(items, list) and len(items) > MAX_MESSAGES and any(isinstance(item, dict) for item in items):
            raise ApiError(400, f"{name}: {len(items)} are above the limit of {MAX_MESSAGES}", param=name)
    prompt, number = body.get("prompt"), max(1, _number(body.get("n")), _number(body.get("best_of")))
    is_several = isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)
    prompts = len(prompt) if isinstance(prompt, list) and is_several else 1
    if prompts * number > MAX_ANSWERS:
        what = f"prompt: {prompts} prompts with {number} answers each are above the limit of {MAX_ANSWERS} answers"
        raise ApiError(400, f"{what}; send several requests", param="prompt")


def _number(value: Any) -> int | float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0


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
    global _unfinished
    too_large = ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    declared = dict(scope["headers"]).get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    parts: list[bytes] = []
    began, size = asyncio.get_running_loop().time(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS) as limit:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                _unfinished += len(parts[-1])
                if size > MAX_BODY_BYTES:
                    raise too_large
                if not message.get("more_body"):
                    return b"".join(parts)
                if _unfinished > MAX_UNFINISHED_BYTES and size > LARGE_BYTES:
                    raise ApiError(503, "too many large bodies are coming in; try again later", retry_after=5)
                limit.reschedule(began + BODY_SECONDS + size / BODY_BYTES_PER_SECOND)
    except TimeoutError:
        raise ApiError(408, "the body did not come in time") from None
    finally:
        _unfinished -= size


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
