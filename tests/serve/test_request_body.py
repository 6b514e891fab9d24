"""Bodies of requests: what is no JSON object of sane size gets a clear 4xx before any engine sees it."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest

from rayswift.serve import request_body
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.request_body import (
    LARGE_BYTES,
    MAX_ANSWERS,
    MAX_BODY_BYTES,
    MAX_FIELDS,
    MAX_MESSAGES,
    MAX_VALUES,
    read_object,
)


def read(raw: bytes, pieces: int = 1, declared: int | None = None) -> tuple[bytes, dict[str, Any]]:
    size = max(1, -(-len(raw) // pieces))
    parts = [raw[i : i + size] for i in range(0, len(raw), size)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
        for number, part in enumerate(parts)
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    headers = [] if declared is None else [(b"content-length", str(declared).encode())]
    return asyncio.run(read_object({"type": "http", "headers": headers}, receive))


def test_a_body_in_pieces_is_read_whole() -> None:
    raw = json.dumps({"model": "m", "messages": [{"role": "user", "content": "你好"}]}).encode()
    assert read(raw, pieces=5) == (raw, json.loads(raw))


@pytest.mark.parametrize(
    ("raw", "status", "says"),
    [
        (b"", 400, "not JSON"),
        (b'{"a": ', 400, "not JSON"),
        (b'"text"', 400, "JSON object"),
        (b"[1]", 400, "JSON object"),
        (b"42", 400, "JSON object"),
        (b"null", 400, "JSON object"),
        (b'{"temperature": NaN}', 400, "NaN"),
        (b'{"temperature": 1e999}', 400, "not finite"),
        (b'{"seed": 1' + b"0" * 40 + b"}", 400, "out of range"),
        (b'{"seed": 1' + b"0" * 5000 + b"}", 400, "not JSON"),
        (b'{"prompt": "\\ud800"}', 400, "lone surrogate"),
        (b'{"prompt": "\xff"}', 400, "not JSON"),
        (b'{"n": 129}', 400, "n: 129 is above the limit of 128"),
        (b'{"n": 128, "prompt": ["a", "b", "c"]}', 400, "3 prompts with 128 answers each are above the limit of 256"),
        (b'{"best_of": 128, "prompt": [[1], [2], [3]]}', 400, "3 prompts with 128 answers each"),
        (b'{"prompt": [' + b'"a",' * MAX_ANSWERS + b'"a"]}', 400, "above the limit of 256 answers; send several"),
        (b'{"messages": [' + b"{}," * MAX_MESSAGES + b"{}]}", 400, "messages: 16385 are above the limit of 16384"),
        (b'{"input": [' + b"{}," * MAX_MESSAGES + b"{}]}", 400, "input: 16385 are above"),
        (b'{"prompt": [' + b"1," * MAX_VALUES + b"1]}", 413, "more than 1048576 values"),
        (b'{"prompt": [' + b"[]," * MAX_VALUES + b"1]}", 413, "more than 1048576 values"),
        (b'{"a": [' + b'{"b":1},' * MAX_FIELDS + b"{}]}", 413, "more than 131072 named fields"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400, "nested"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "nested"),
    ],
)
def test_bad_bodies_are_refused(raw: bytes, status: int, says: str) -> None:
    with pytest.raises(ApiError) as refused:
        read(raw)
    assert refused.value.status == status
    assert says in refused.value.message
    error = json.loads(refused.value.body())["error"]
    assert error["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    with pytest.raises(ApiError) as refused:
        read(b"{}", declared=MAX_BODY_BYTES + 1)
    assert refused.value.status == 413


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"] * 128, "n": 2},
        {"prompt": list(range(100_000)), "n": 128},
        {"input": ["a"] * (MAX_MESSAGES + 1)},
        {"n": True, "best_of": None, "messages": [{"role": "user", "content": ", ".join("x" * 200_000)}]},
    ],
    ids=["answers", "token ids", "texts to embed", "a long text"],
)
def test_much_work_in_one_request_is_not_too_much(body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    assert read(raw)[1] == body


@pytest.mark.parametrize("choice", [None, "auto", "none", {"type": "auto"}])
def test_an_empty_list_of_tools_is_as_none(choice: Any) -> None:
    """What clients send with every request; it must not come to an engine."""
    same = {"messages": [{"role": "user", "content": "数"}], "functions": []}
    given = same | {"tools": []} | ({} if choice is None else {"tool_choice": choice})
    raw, body = read(json.dumps(given).encode())
    assert json.loads(raw) == body == same
    kept = {"tools": [], "tool_choice": "required"}
    assert read(json.dumps(kept).encode())[1] == {"tool_choice": "required"}  # the engine says what is missing


def test_large_bodies_leave_the_server_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop goes on while a large body is parsed: what parses it waits for what runs there."""
    loop_runs, parse = threading.Event(), request_body._parse
    monkeypatch.setattr(request_body, "_parse", lambda raw: (loop_runs.wait(20), parse(raw))[1])

    async def both() -> tuple[bytes, dict[str, Any]]:
        asyncio.get_running_loop().call_later(0.01, loop_runs.set)
        message = {"type": "http.request", "body": json.dumps({"prompt": "a" * LARGE_BYTES}).encode()}

        async def receive() -> dict[str, Any]:
            return message

        return await read_object({"type": "http", "headers": []}, receive)

    assert len(asyncio.run(both())[1]["prompt"]) == LARGE_BYTES
    assert loop_runs.is_set()


def test_large_bodies_that_do_not_end_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "MAX_UNFINISHED_BYTES", 4 * LARGE_BYTES)

    async def several() -> tuple[list[Any], dict[str, Any]]:
        async def receive(parts: list[int]) -> dict[str, Any]:
            if not parts:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": b" " * parts.pop(), "more_body": True}

        def held(parts: list[int]) -> asyncio.Future[Any]:
            return asyncio.ensure_future(read_object({"type": "http", "headers": []}, lambda: receive(parts)))

        waiting = [held([LARGE_BYTES, LARGE_BYTES]) for _ in range(3)]
        await asyncio.sleep(0.01)

        async def small() -> dict[str, Any]:
            return {"type": "http.request", "body": b'{"a": 1}'}

        found = (await read_object({"type": "http", "headers": []}, small))[1]
        refused = [one.exception() for one in waiting if one.done()]
        for one in waiting:
            one.cancel()
        await asyncio.wait(waiting)
        return refused, found

    refused, found = asyncio.run(several())
    assert [one.status for one in refused] == [503]
    assert found == {"a": 1}
    assert request_body._unfinished == 0
