"""Requests that no client should send: each is refused in a known way, in time, and ends no process.

Three sources: a list of single cases that broke servers before, broken HTTP, and Schemathesis, which derives valid
and invalid requests from the served OpenAPI schema (``RAYSWIFT_FUZZ_CASES`` of them, 2,000 by default).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_requests import BROKEN, CHAT, KEY, ODD, QUESTION, REFUSED
from serving import KEYS, MODEL, Deployment, wait_until_idle

pytestmark = pytest.mark.slow

#: Its schema has so many kinds of items that covering them takes 7,000 requests: it is fuzzed only.
RESPONSES = "/v1/responses"
FUZZ_CASES = int(os.environ.get("RAYSWIFT_FUZZ_CASES", "2000"))
#: A bad request that has no answer by then hangs, seconds.
REQUEST_TIMEOUT = 60.0


@pytest.fixture(scope="module", autouse=True)
def _nothing_died(server: Deployment) -> Iterator[None]:
    """Before and after all of this the same processes give the same answer, and nothing is left running."""
    before, answer = server.essential(), text_of(server)
    assert all(before.values()), before
    yield
    wait_until_idle(server)
    assert server.essential() == before
    assert text_of(server) == answer


def text_of(server: Deployment) -> str:
    status, body = server.request("POST", "/v1/chat/completions", QUESTION)
    assert status == 200, body
    return json.loads(body)["choices"][0]["message"]["content"]


# --- single cases -----------------------------------------------------------------------------------------------


def send(server: Deployment, case: Any) -> tuple[int, bytes]:
    """Status and body of one case: bytes as they are, or an object as JSON, to the chat endpoint or its own."""
    path, body = case if isinstance(case, tuple) else (CHAT, case)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {KEYS[0]}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=REQUEST_TIMEOUT)
    with contextlib.closing(connection):
        # A server may refuse a large body before it has read it all.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", path, data, headers)
        response = connection.getresponse()
        return response.status, response.read()


def exchange(server: Deployment, data: bytes, timeout: float = REQUEST_TIMEOUT) -> tuple[int, bytes]:
    """Write bytes to the server and read until it closes; status 0 when it closes without an answer."""
    answer, end = b"", time.monotonic() + timeout
    with socket.create_connection(("127.0.0.1", server.port), timeout) as connection:
        # A server may refuse a large body before it has read it all.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
                assert time.monotonic() < end, f"no end after {timeout} s: {answer[:200]!r}"
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split(b" ", 2)[1]) if head else 0), body


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_and_says_why(server: Deployment, name: str) -> None:
    status, body = send(server, REFUSED[name])
    assert 400 <= status < 500, (status, body[:500])
    error = json.loads(body)["error"]
    assert error["message"] and "type" in error and "code" in error
    assert "Traceback" not in error["message"] and len(error["message"]) < 5000


@pytest.mark.parametrize("name", ODD)
def test_an_odd_request_is_answered_or_refused(server: Deployment, name: str) -> None:
    status, body = send(server, ODD[name])
    assert 200 <= status < 500, (status, body[:500])


@pytest.mark.parametrize("name", ["deep schema", "NUL in the text", "special tokens in the text", "unknown field"])
def test_an_odd_request_may_stream_too(server: Deployment, name: str) -> None:
    status, body = send(server, ODD[name] | {"stream": True})
    assert 200 <= status < 500 and (status != 200 or b"data: [DONE]" in body), (status, body[-500:])


@pytest.mark.parametrize("options", [{"echo": True}, {"prompt_logprobs": 2}, {"echo": True, "top_logprobs": 2}])
def test_log_probabilities_of_a_prompt_in_a_batch_with_another_request(
    server: Deployment, options: dict[str, Any]
) -> None:
    """vLLM computes them on a way of its own, which on CPUs with adapters switched on ended the engine."""
    before = server.essential()
    with socket.create_connection(("127.0.0.1", server.port), 30) as other:
        body = json.dumps(QUESTION | {"stream": True, "max_tokens": 400, "ignore_eos": True}).encode()
        other.sendall(chat_head(body) + body)
        assert other.recv(15) == b"HTTP/1.1 200 OK"
        status, answer = send(server, QUESTION | options)
        assert 200 <= status < 500, (status, answer[:300])
        assert server.essential() == before


# --- broken HTTP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BROKEN)
def test_broken_http_is_refused_or_hung_up_on(server: Deployment, name: str) -> None:
    with contextlib.suppress(TimeoutError):  # a server may wait for the rest of what looks like a beginning
        status, body = exchange(server, BROKEN[name], timeout=10)
        assert status < 500 or status in (501, 505), (status, body[:300])
    assert server.answers()


def chat_head(body: bytes) -> bytes:
    """The head of a request with this body that keeps its connection."""
    return (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{KEY}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()


def test_clients_that_send_slowly_or_stop_in_the_middle_hold_nobody_up(server: Deployment) -> None:
    data = json.dumps(QUESTION).encode()
    request = chat_head(data) + data
    began = time.monotonic()
    text_of(server)
    alone = time.monotonic() - began
    with contextlib.ExitStack() as stack:
        for number in range(200):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
            # Never the whole request: that would be an honest client whose answer takes its time.
            connection.sendall(request[: 1 + number * 2 % (len(request) - 1)])
        began = time.monotonic()
        text_of(server)
        assert time.monotonic() - began < max(15, 10 * alone)  # a busy machine is slow without them too
    assert server.answers()


def test_streams_that_are_dropped_at_any_byte_leave_nothing_behind(server: Deployment) -> None:
    body = json.dumps(QUESTION | {"stream": True, "max_tokens": 400, "ignore_eos": True}).encode()
    head = chat_head(body)
    for wanted in (0, 1, 20, 200, 400, 800, 1600):
        with socket.create_connection(("127.0.0.1", server.port), 30) as connection:
            connection.sendall(head + body)
            while wanted > 0 and (piece := connection.recv(wanted)):
                wanted -= len(piece)
    wait_until_idle(server, timeout=15)


# --- generated --------------------------------------------------------------------------------------------------


def test_generated_requests_valid_and_invalid_never_fail_inside(server: Deployment, tmp_path: Path) -> None:
    """Schemathesis over every operation of the served schema: examples, coverage phase, fuzzing; NUL bytes allowed."""
    record = tmp_path / "record"
    operations = count_operations(server)
    each = max(20, FUZZ_CASES // operations)
    run_schemathesis(server, record, "fuzzing", each, 1, "--include-path", RESPONSES)
    # The coverage phase has as many cases as the schema gives; rounds of fuzzing with new seeds fill the rest.
    run_schemathesis(server, record, "examples,coverage,fuzzing", each, 1, "--exclude-path", RESPONSES)
    seed = 2
    while (done := len(read(record))) < FUZZ_CASES:
        run_schemathesis(server, record, "fuzzing", max(20, (FUZZ_CASES - done) // operations), seed)
        seed += 1
        assert len(read(record)) > done, "Schemathesis sent nothing"
    rows = read(record)
    print(f"\n{len(rows)} requests, by status: {sorted(Counter(row['status'] for row in rows).items())}")
    failed = [row for row in rows if row["status"] >= 500 or row["status"] == 0]
    assert not failed, f"{len(failed)} of {len(rows)}: {json.dumps(failed[:5], indent=1)}"
    assert {row["status"] for row in rows} >= {200, 400}, "both valid and invalid requests reached the server"


def count_operations(server: Deployment) -> int:
    status, text = server.get("/openapi.json")
    assert status == 200
    return sum(len(methods) for methods in json.loads(text)["paths"].values())


def run_schemathesis(server: Deployment, record: Path, phases: str, each: int, seed: int, *paths: str) -> None:
    """One run in a process of its own; what it found stands in the record."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.address}/openapi.json",
        "--header", f"Authorization: Bearer {KEYS[0]}", "--mode", "all", "--phases", phases,
        "--max-examples", str(each), "--seed", str(seed), "--checks", "not_a_server_error",
        "--generation-allow-x00", "true", "--generation-database", "none", "--request-timeout", str(REQUEST_TIMEOUT),
        "--continue-on-failure", "--no-shrink", "--suppress-health-check", "all", "--no-color", "--workers", "2",
        *paths,
    ]  # fmt: skip
    environment = {
        **os.environ, "SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(Path(__file__).parent),
        "RAYSWIFT_FUZZ_RECORD": str(record), "RAYSWIFT_FUZZ_MODEL": MODEL,
    }  # fmt: skip
    done = subprocess.run(
        command, env=environment, cwd=record.parent, timeout=1800, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    # 1: something was found, which the record says better. Anything else: it did not run.
    assert done.returncode in (0, 1) and read(record), done.stdout[-4000:]


def read(record: Path) -> list[dict[str, Any]]:
    """The responses so far."""
    return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
