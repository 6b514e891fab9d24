"""``--sampler_engine client`` and servers with manners of their own: an engine behind a gate that has them."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from rayswift.generate.endpoint import EndpointEngine
from rayswift.generate.types import EngineUnusable, Request, SamplingParams
from rayswift.sampling.engines import RateLimit, answers_of

ROW = {"messages": [{"role": "user", "content": "Name a fruit."}]}
REQUESTS = [Request((0, 1, 2), ROW, (11, 12, 13)), Request((3, 4), ROW, (14, 15))]


class Gate:
    """Lets requests through to the engine, after ``change`` has seen their body: it returns a body, or a refusal."""

    def __init__(self, app: Any, change: Any) -> None:
        self.app, self.change, self.bodies, self.times = app, change, [], []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request as HttpRequest
        from starlette.responses import JSONResponse

        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = json.loads(await HttpRequest(scope, receive).body())
        self.bodies.append(body)
        self.times.append(time.monotonic())
        changed = self.change(dict(body), len(self.bodies))
        if "status" in changed:
            error = {"error": {"message": changed["message"], "type": "refused"}}
            await JSONResponse(error, changed["status"], {"Retry-After-Ms": "20"})(scope, receive, send)
            return
        data = json.dumps(changed).encode()

        bodies = [data]

        async def again() -> Any:  # the body once; then what the client does, as the server would tell
            return {"type": "http.request", "body": bodies.pop(), "more_body": False} if bodies else await receive()

        length = [(b"content-length", str(len(data)).encode())]
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"] + length
        await self.app({**scope, "headers": headers}, again, send)


@contextlib.contextmanager
def gated(
    served: Any, change: Any, *, per_minute: int | None = None, parallel: int = 32, **fields: Any
) -> Iterator[tuple[Gate, Any]]:
    """The engine behind such a gate, as a source of answers."""
    import uvicorn

    gate, listener = Gate(served.serving.app, change), socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(gate, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        engine = EndpointEngine.connect(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", api_key="any")
        engine = replace(engine.patient(), turn=RateLimit(per_minute).wait, parallel=parallel)
        yield gate, partial(answers_of, engine, SamplingParams(max_new_tokens=4, temperature=1.0), fields)
    finally:
        server.should_exit = True
        thread.join(20)


def numbers(answers: Any, requests: Any = REQUESTS) -> list[int]:
    found = list(answers(requests))
    assert not [answer.error for _, answer in found if answer.error]
    assert all(answer.text for _, answer in found)
    return sorted(number for number, _ in found)


def test_one_request_asks_for_all_answers_to_a_prompt(tiny_served: Any) -> None:
    with gated(tiny_served, lambda body, _: body, top_k=5) as (gate, answers):
        assert numbers(answers) == [0, 1, 2, 3, 4]
    assert sorted((body["n"], body["seed"], body["top_k"]) for body in gate.bodies) == [(2, 14, 5), (3, 11, 5)]


def test_a_server_that_gives_one_answer_is_asked_until_there_are_enough(tiny_served: Any) -> None:
    with gated(tiny_served, lambda body, _: body | {"n": 1}) as (gate, answers):
        assert numbers(answers) == [0, 1, 2, 3, 4]
    assert sorted(body["seed"] for body in gate.bodies) == [11, 12, 13, 14, 15]


def test_a_server_that_does_not_know_n_is_asked_without(tiny_served: Any) -> None:
    def refuse(body: Any, _: int) -> Any:
        return {"status": 400, "message": "n is not supported"} if "n" in body else body

    with gated(tiny_served, refuse, parallel=1) as (gate, answers):
        assert numbers(answers) == [0, 1, 2, 3, 4]
    assert [body.get("n") for body in gate.bodies] == [3, None, None, None, None, None]


def test_a_busy_server_is_asked_again(tiny_served: Any) -> None:
    def busy(body: Any, count: int) -> Any:
        return {"status": 429, "message": "slow down"} if count <= 3 else body

    with gated(tiny_served, busy) as (gate, answers):
        assert numbers(answers) == [0, 1, 2, 3, 4]
    assert len(gate.bodies) == 5


def test_requests_keep_to_the_rate_limit(tiny_served: Any) -> None:
    with gated(tiny_served, lambda body, _: body, per_minute=300) as (gate, answers):
        assert numbers(answers, [Request((number,), ROW, (number,)) for number in range(4)]) == [0, 1, 2, 3]
    assert gate.times[-1] - gate.times[0] > 3 * 0.2 - 0.08


def test_what_is_wrong_with_one_prompt_fails_its_answers_alone(tiny_served: Any) -> None:
    long = Request((7, 8), {"messages": [{"role": "user", "content": "word " * 9000}]}, (1, 2))
    with gated(tiny_served, lambda body, _: body) as (_, answers):
        found = dict(answers([*REQUESTS, long]))
    assert sorted(found) == [0, 1, 2, 3, 4, 7, 8]
    assert [bool(found[number].error) for number in (0, 7, 8)] == [False, True, True]


def test_a_server_that_stays_away_ends_the_run(tiny_served: Any) -> None:
    with (
        gated(tiny_served, lambda body, _: {"status": 401, "message": "no"}) as (_, answers),
        pytest.raises(EngineUnusable),
    ):
        numbers(answers)
