"""Bodies of requests: what is no JSON object of sane size gets a clear 4xx before any engine sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from rayswift.serve.openai_errors import ApiError
from rayswift.serve.request_body import MAX_BODY_BYTES, read_object


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
