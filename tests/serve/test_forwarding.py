"""What the gateway does when replicas fail under a request: real connections to servers that break as replicas do.

(Whole deployments whose processes are killed: ``tests/slow/test_serving_chaos.py``.)
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import anthropic
import pytest
from aiohttp import web
from starlette.responses import Response
from starlette.testclient import TestClient

from rayswift.serve import lease as leases
from rayswift.serve.gateway import forwarding
from rayswift.serve.gateway.forwarding import Forwarder, GatewayRequest
from rayswift.serve.gateway.shared import Counters, TooManyWait
from rayswift.serve.lease import FULL_HEADER, NO_LEASE, RESUME_HEADER
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.replica.messages import MessagesWriter

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
PATH = "/v1/chat/completions"
WORDS = ["one", " two", " three", " four"]


pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwarding, "RETRY_SECONDS", 0.0)


@dataclass
class Replicas:
    """Servers in the order in which requests reach them; stands for Serve's handle, which gives leases to them."""

    urls: list[str]
    called: int = 0
    given: int = 0
    cancelled: int = 0
    seen: list[dict[str, str]] = field(default_factory=list)

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, only_prepare: bool) -> Leases:
        assert not only_prepare
        return Leases(self)


class Leases:
    """One call of ``lease``: yields where the request goes."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        replicas.called += 1

    async def __aiter__(self) -> AsyncIterator[dict[str, str]]:
        number = min(self._replicas.given, len(self._replicas.urls) - 1)
        self._replicas.given += 1
        yield {"url": self._replicas.urls[number], "token": f"token-{number}"}

    def cancel(self) -> None:
        self._replicas.cancelled += 1


@asynccontextmanager
async def served(*handlers: Handler) -> AsyncIterator[tuple[Forwarder, Replicas, Counters]]:
    """A forwarder before one server for each handler."""
    replicas, runners = Replicas([]), []
    for handler in handlers:

        async def noted(request: web.Request, handler: Handler = handler) -> web.StreamResponse:
            replicas.seen.append(dict(request.headers))
            return await handler(request)

        app = web.Application()
        app.router.add_route("*", "/{rest:.*}", noted)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        runners.append(runner)
        replicas.urls.append("http://{}:{}".format(*runner.addresses[0][:2]))
    counters = Counters()
    async with aiohttp.ClientSession() as session:
        yield Forwarder(replicas, session, 5, counters), replicas, counters
    for runner in runners:
        await runner.cleanup()


async def ask(forwarder: Forwarder, **body: Any) -> tuple[int, bytes]:
    """Status and body as the client gets them."""
    request = GatewayRequest("POST", PATH, json.dumps(body).encode(), body)
    async with aclosing(forwarder.send(request)) as responses:
        async for response in responses:
            return response.status, b"".join([piece async for piece in response.pieces])
    raise AssertionError("no response")


async def answers(request: web.Request) -> web.StreamResponse:
    return web.json_response({"answer": "yes", "usage": {"completion_tokens": 3}})


async def dies(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def fails(request: web.Request) -> web.StreamResponse:
    return web.json_response({"error": {"message": "EngineDeadError"}}, status=500)


def event(text: str, finish: str | None = None) -> bytes:
    chunk = {"id": "chat-1", "created": 1, "choices": [{"index": 0, "delta": {"content": text}}]}
    if finish:
        chunk["choices"][0]["finish_reason"] = finish  # type: ignore[index]
    return f"data: {json.dumps(chunk)}\n\n".encode()


def streams(first: int, last: int, ends: bool) -> Handler:
    """Streams ``WORDS[first:last]``, one token each, and then ends or dies."""

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(first, last):
            await response.write(f": {number}\n\n".encode() + event(WORDS[number]))
        if not ends:
            await asyncio.sleep(0.2)  # what was written has left
            return await dies(request)
        await response.write(event("", "stop") + b"data: [DONE]\n\n")
        return response

    return handler


def text_of(stream: bytes) -> str:
    """The text of a stream, which must have ended well."""
    lines = [line.removeprefix(b"data: ") for line in stream.split(b"\n\n") if line]
    assert lines.pop() == b"[DONE]"
    assert b": " not in [line[:2] for line in stream.split(b"\n\n")]  # token ids are for the gateway alone
    return "".join(choice["delta"].get("content") or "" for line in lines for choice in json.loads(line)["choices"])


async def test_a_request_whose_replica_dies_is_answered_by_another() -> None:
    async with served(dies, answers) as (forwarder, replicas, counters):
        status, body = await ask(forwarder)
        assert (status, json.loads(body)["answer"]) == (200, "yes")
        assert (replicas.given, counters.retries, counters.tokens) == (2, 1, 3)


async def test_a_request_that_costs_two_replicas_does_not_reach_a_third() -> None:
    async with served(dies, dies, answers) as (forwarder, replicas, _):
        with pytest.raises(ApiError) as refused:
            await ask(forwarder)
        assert (refused.value.status, refused.value.retry_after) == (503, 5)
        assert replicas.given == 2


async def test_replicas_that_cannot_be_reached_cost_nothing_but_tries() -> None:
    async with served(answers) as (forwarder, replicas, counters):
        replicas.urls[:0] = ["http://127.0.0.1:9"] * 3  # the discard port: nobody listens
        assert (await ask(forwarder))[0] == 200
        assert (counters.retries, replicas.cancelled) == (3, 3)


async def test_one_failing_engine_is_passed_over_and_a_request_that_all_fail_on_is_refused() -> None:
    async with served(fails, answers) as (forwarder, _, _):
        assert (await ask(forwarder))[0] == 200
    async with served(fails) as (forwarder, replicas, _):
        with pytest.raises(ApiError, match="every replica failed on this request: EngineDeadError"):
            await ask(forwarder)
        assert replicas.given == forwarding.ERROR_TRIES


async def test_an_error_of_the_request_is_the_clients_at_once() -> None:
    async def refuses(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "too hot", "param": "temperature"}}, status=400)

    async with served(refuses) as (forwarder, replicas, _):
        with pytest.raises(ApiError) as refused:
            await ask(forwarder)
        assert (refused.value.status, refused.value.message, refused.value.param) == (400, "too hot", "temperature")
        assert replicas.given == 1


@pytest.mark.parametrize("body", [{"detail": "Not Found"}, {"error": {"message": "no such path", "code": "not_found"}}])
async def test_a_path_that_an_engine_lacks_is_what_its_model_does_not_do(body: dict[str, Any]) -> None:
    async def lacks(request: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=404)

    async with served(lacks) as (forwarder, _, _):
        with pytest.raises(ApiError, match="this model does not do that") as refused:
            await ask(forwarder)
        assert refused.value.status == 404


async def test_a_stream_whose_replica_dies_goes_on_from_its_tokens() -> None:
    # The last token may have been cut short: the second replica is given those before it, and repeats their text.
    async with served(streams(0, 3, ends=False), streams(0, 4, ends=True)) as (forwarder, replicas, counters):
        status, body = await ask(forwarder, stream=True, temperature=0)
        assert (status, text_of(body)) == (200, "".join(WORDS))
        assert replicas.seen[1][RESUME_HEADER] == "0,1"
        assert counters.resumed == 1


async def test_a_stream_that_cannot_be_resumed_starts_again_and_nothing_is_sent_twice() -> None:
    async with served(streams(0, 2, ends=False), streams(0, 4, ends=True)) as (forwarder, replicas, _):
        body = (await ask(forwarder, stream=True, temperature=0, logprobs=True))[1]
        assert text_of(body) == "".join(WORDS)
        assert RESUME_HEADER not in replicas.seen[1]


async def test_a_stream_that_would_go_on_with_another_text_ends_in_an_error() -> None:
    async with served(streams(0, 2, ends=False), streams(2, 4, ends=True)) as (forwarder, _, _):
        body = (await ask(forwarder, stream=True, temperature=0))[1]
        assert b"stream_interrupted" in body
        assert b"three" not in body


async def test_a_stream_that_costs_two_replicas_ends_in_an_error() -> None:
    broken = streams(0, 2, ends=False)
    async with served(broken, broken, streams(0, 4, ends=True)) as (forwarder, replicas, _):
        body = (await ask(forwarder, stream=True, temperature=0))[1]
        assert b"stream_interrupted" in body
        assert replicas.given == 2


def messages(first: int, last: int, ends: bool) -> Handler:
    """The same as `streams` in the shape of Messages."""

    async def handler(request: web.Request) -> web.StreamResponse:
        writer = MessagesWriter()
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number in range(first, last):
            chunk = {"model": "m", "choices": [{"index": 0, "delta": {"content": WORDS[number]}}]}
            await response.write(f": {number}\n\n".encode() + b"".join(map(named, writer.take(chunk))))
        if not ends:
            await asyncio.sleep(0.2)
            return await dies(request)
        await response.write(b"".join(map(named, writer.end())))
        return response

    return handler


def named(value: dict[str, Any]) -> bytes:
    return f"event: {value['type']}\ndata: {json.dumps(value)}\n\n".encode()


async def read_message(forwarder: Forwarder) -> anthropic.types.Message:
    """The stream that the gateway passes, read by Anthropic's client."""
    body = {"stream": True}
    async with aclosing(forwarder.send(GatewayRequest("POST", "/v1/messages", b"{}", body))) as responses:
        raw = b"".join([piece async for one in responses async for piece in one.pieces])
    app = TestClient(Response(raw, media_type="text/event-stream"))
    client = anthropic.Anthropic(api_key="none", base_url="http://testserver", max_retries=0, http_client=app)
    with client.messages.stream(model="m", max_tokens=9, messages=[{"role": "user", "content": "?"}]) as stream:
        return stream.get_final_message()


async def test_a_stream_of_messages_goes_on_at_another_replica() -> None:
    async with served(messages(0, 3, ends=False), messages(0, 4, ends=True)) as (forwarder, replicas, counters):
        message = await read_message(forwarder)
        assert (message.content[0].text, message.stop_reason) == ("".join(WORDS), "end_turn")
        assert replicas.seen[1][RESUME_HEADER] == "0,1"
        assert counters.resumed == 1


async def test_a_stream_of_messages_that_cannot_go_on_ends_in_an_error_of_its_client() -> None:
    async with served(messages(0, 2, ends=False), messages(2, 4, ends=True)) as (forwarder, _, _):
        with pytest.raises(anthropic.APIStatusError, match="no other could go on with it"):
            await read_message(forwarder)
    async with served(messages(0, 0, ends=False)) as (forwarder, _, _):  # nothing was sent
        with pytest.raises(anthropic.APIStatusError, match="no other could go on with it"):
            await read_message(forwarder)


async def test_requests_that_follow_one_another_share_a_lease_that_is_given_back_when_nobody_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "KEEP_SECONDS", 0.2)
    async with served(answers) as (forwarder, replicas, _):
        for _ in range(3):
            assert (await ask(forwarder))[0] == 200
            await asyncio.sleep(0.05)
        assert (replicas.given, replicas.cancelled) == (1, 0)
        await asyncio.sleep(0.4)
        assert replicas.cancelled == 1
        await ask(forwarder)
        assert replicas.given == 2


async def test_requests_at_the_same_time_have_a_lease_each_and_those_after_them_none_more() -> None:
    async with served(streams(0, 4, ends=True)) as (forwarder, replicas, _):
        for _ in range(2):
            bodies = await asyncio.gather(*(ask(forwarder, stream=True) for _ in range(4)))
            assert {text_of(body) for _, body in bodies} == {"".join(WORDS)}
        assert replicas.given == 4


async def test_an_old_lease_is_given_back_so_that_serve_chooses_a_replica_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "LIFE_SECONDS", 0.05)
    async with served(answers) as (forwarder, replicas, _):
        await ask(forwarder)
        await asyncio.sleep(0.1)
        await ask(forwarder)  # with the kept lease, the last time
        await ask(forwarder)
        assert (replicas.given, replicas.cancelled) == (2, 1)


async def test_a_lease_is_not_kept_while_a_request_waits_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnePlace(Leases):
        """Serve with one place: the next lease comes when one has been given back."""

        async def __aiter__(self) -> AsyncIterator[dict[str, str]]:
            while self._replicas.given > self._replicas.cancelled:
                await asyncio.sleep(0.01)
            async for lease in Leases.__aiter__(self):
                yield lease

    monkeypatch.setattr(leases, "KEEP_SECONDS", 60)
    monkeypatch.setattr(Replicas, "remote", lambda self, _: OnePlace(self))
    async with served(streams(0, 4, ends=True)) as (forwarder, _, _), asyncio.timeout(5):
        assert len(await asyncio.gather(*(ask(forwarder, stream=True) for _ in range(3)))) == 3


async def test_a_lease_of_a_replica_without_a_free_place_is_not_kept_for_another_gateway_may_wait() -> None:
    async def full(request: web.Request) -> web.StreamResponse:
        return web.json_response({}, headers={FULL_HEADER: "1"})

    async with served(full) as (forwarder, replicas, _):
        assert (await ask(forwarder))[0] == 200
        assert (replicas.given, replicas.cancelled) == (1, 1)


async def test_a_request_that_waits_stands_in_the_line_of_all_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late(Leases):
        async def __aiter__(self) -> AsyncIterator[dict[str, str]]:
            await asyncio.sleep(0.1)
            async for lease in Leases.__aiter__(self):
                yield lease

    line: list[str] = []

    @asynccontextmanager
    async def place() -> AsyncIterator[None]:
        if len(line) == 2:
            raise TooManyWait
        line.append("in")
        yield
        line.append("out")

    async with served(answers) as (forwarder, replicas, counters):
        forwarder._line = place
        assert (await ask(forwarder))[0] == 200
        assert not line  # there was a replica
        await asyncio.sleep(0)
        forwarder.close()
        monkeypatch.setattr(forwarding, "LINE_SECONDS", 0.01)
        monkeypatch.setattr(Replicas, "remote", lambda self, _: Late(self))
        assert (await ask(forwarder))[0] == 200
        assert line == ["in", "out"]
        forwarder.close()
        with pytest.raises(ApiError) as refused:
            await ask(forwarder)
        assert (refused.value.status, refused.value.retry_after, counters.waiting) == (429, 5, 0)
        assert replicas.cancelled == replicas.called == 3  # kept ones were given back


async def test_a_request_that_is_left_gives_its_lease_back() -> None:
    async with served(streams(0, 4, ends=True)) as (forwarder, replicas, _):
        body = {"stream": True}
        async with aclosing(forwarder.send(GatewayRequest("POST", PATH, json.dumps(body).encode(), body))) as responses:
            await anext(responses)
        assert (replicas.given, replicas.cancelled) == (1, 1)


async def test_requests_for_an_adapter_ask_serve_each_time() -> None:
    async with served(answers) as (forwarder, replicas, _):
        for _ in range(2):
            async with aclosing(
                forwarder.send(GatewayRequest("POST", PATH, b"{}", {}, adapter="base:red"))
            ) as responses:
                async for response in responses:
                    assert [piece async for piece in response.pieces]
        assert (replicas.given, replicas.cancelled) == (2, 2)


async def test_leases_kept_for_a_replica_that_has_died_since_cost_one_more_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "KEEP_SECONDS", 60)
    living = True

    async def ends(request: web.Request) -> web.StreamResponse:
        return await (streams(0, 4, ends=True) if living else dies)(request)

    async with served(ends, ends, ends, ends, answers) as (forwarder, replicas, counters):
        replicas.urls[1:4] = [replicas.urls[0]] * 3
        await asyncio.gather(*(ask(forwarder, stream=True) for _ in range(4)))
        living = False
        assert (await ask(forwarder))[0] == 200
        assert (replicas.given, counters.retries, replicas.cancelled) == (5, 1, 4)


async def test_a_lease_that_the_replica_has_forgotten_is_replaced() -> None:
    async def forgot(request: web.Request) -> web.StreamResponse:
        return web.Response(status=NO_LEASE)

    async with served(forgot, answers) as (forwarder, replicas, _):
        assert (await ask(forwarder))[0] == 200
        assert replicas.given == 2
