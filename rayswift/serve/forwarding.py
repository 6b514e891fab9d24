"""One request from the gateway to a replica and back, whatever replicas do meanwhile.

A replica that dies before its first byte: the request goes to another. One that dies in the middle of a stream: another
goes on from the tokens that the client has (`sent_stream`). A replica that answers with an error of its own (its engine
died) counts as dead; an error that a second replica repeats is the request's and is passed on.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from rayswift.serve.openai_errors import ApiError, error_event
from rayswift.serve.sent_stream import ERROR, Diverged, Resumed, SentStream, can_carry_on, longest_stop
from rayswift.serve.tickets import RESUME_HEADER, TICKET_HEADER, TICKET_SECONDS

logger = logging.getLogger("rayswift.serve.forwarding")

#: How often one request is tried when replicas answer with 5xx; connections that break do not count.
ERROR_TRIES = 3
#: Tries in all.
MAX_TRIES = 6
#: Replicas that may die while they work on one request; it may be what kills them, and must not go through them all.
MAX_DEATHS = 2
#: Seconds before the second try; it grows with each.
RETRY_SECONDS = 0.25
#: A spare ticket is kept so long after the last answer.
SPARE_SECONDS = 1.0
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')


class ReplicaDied(Exception):
    """The connection broke, or the replica said that its engine is dead."""


class ReplicaFailed(ReplicaDied):
    """The replica answered with 5xx; it may live on."""


_DEAD = (ReplicaDied, RayActorError, aiohttp.ClientError, ConnectionError)


@dataclass
class Request:
    """What a client asked. ``body`` is the JSON object of a POST; ``raw`` its bytes; ``adapter`` a key or ``""``."""

    method: str
    path: str
    raw: bytes = b""
    body: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""
    request_id: str = ""
    deaths: int = 0

    @property
    def streams(self) -> bool:
        """Whether the answer comes in pieces."""
        return bool(self.body.get("stream"))


@dataclass
class Response:
    """Head of an answer; ``pieces`` are its bytes."""

    status: int
    content_type: str
    pieces: AsyncIterator[bytes]
    length: int | None = None  # bytes in all; None for a stream


class Spare:
    """A ticket that is taken before a request needs it: one who asks again and again need not wait for Serve.

    Serve counts it as a request, so it is given back a moment after the last answer has ended.
    """

    def __init__(self) -> None:
        self._call: Any = None
        self._ticket: asyncio.Future[Any] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._taken = 0.0

    def prepare(self, ticket_call: Any) -> None:
        """Take a ticket through ``ticket_call`` (a handle of ``ticket``), unless one is kept or on its way.

        A call that is made and dropped would count as a request until its ticket runs out.
        """
        if self._call is None:
            self._call = ticket_call.remote()
            self._ticket = asyncio.ensure_future(anext(aiter(self._call)))
            self._taken = time.monotonic()

    def take(self) -> tuple[Any, dict[str, Any]] | None:
        """The kept call and its ticket; None when there is none yet."""
        self._stop_timer()
        call, ticket = self._call, self._ticket
        if ticket is None or not ticket.done():
            return None
        if time.monotonic() - self._taken > TICKET_SECONDS / 2:  # the replica is about to forget it
            self.drop()
            return None
        self._call = self._ticket = None
        if ticket.cancelled() or ticket.exception() or "message" in ticket.result():
            return None
        return call, dict(ticket.result())

    def expire(self, seconds: float) -> None:
        """Give the ticket back after so long, unless it is taken before."""
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.drop)

    def drop(self) -> None:
        """Give the ticket back."""
        call, ticket = self._call, self._ticket
        self._call = self._ticket = None
        if call is not None and ticket is not None:
            ticket.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else looks at it
            ticket.cancel()
            with suppress(Exception):
                call.cancel()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Forwarder:
    """Sends requests to the replicas behind one deployment handle.

    Args:
        handle: Serve's handle of the deployment.
        session: connections to the replicas.
        queue_timeout: seconds a request may wait for a replica.
        counters: the gateway's.
        keeps_spare: have a ticket ready for a client whose requests follow one another (:class:`Spare`).
    """

    def __init__(
        self,
        handle: Any,
        session: aiohttp.ClientSession,
        queue_timeout: float,
        counters: Any,
        keeps_spare: bool = False,
    ) -> None:
        self.handle, self._session, self._queue_timeout, self.counters = handle, session, queue_timeout, counters
        self._keeps_spare, self._spare, self._under_way = keeps_spare, Spare(), 0
        # A handle with options costs a look-up in Serve: one per adapter is kept.
        self._ticket_calls = functools.lru_cache(maxsize=1024)(self._ticket_call)

    def _ticket_call(self, adapter: str) -> Any:
        options = {"multiplexed_model_id": adapter} if adapter else {}
        return self.handle.options(method_name="ticket", stream=True, **options)

    async def send(self, request: Request) -> AsyncGenerator[Response]:
        """Yields the one response; leaving the generator early drops the request at the replica.

        Raises:
            ApiError: no replica in time, too many waiting, an adapter that cannot be used.
        """
        tries = errors = 0
        while True:
            tries += 1
            try:
                async with self._connection(request) as upstream:
                    if upstream.status >= 500 and (errors := errors + 1) < ERROR_TRIES:
                        raise ReplicaFailed(f"status {upstream.status}")
                    if is_event_stream(upstream):
                        yield Response(upstream.status, upstream.content_type, self._stream(request, upstream))
                    else:
                        whole = await upstream.read()
                        self.counters.tokens += sum(int(count) for count in _USAGE.findall(whole[-2000:]))
                        if upstream.status >= 400:
                            raise refusal(upstream.status, whole)
                        yield Response(upstream.status, upstream.content_type, _once(whole), len(whole))
                return
            except _DEAD as error:
                request.deaths += cost_a_replica(error)
                if tries >= MAX_TRIES or request.deaths >= MAX_DEATHS:
                    raise ApiError(503, "no replica could answer the request", retry_after=5) from error
                await self._before_retry(error, tries)

    async def touch(self, adapter: str) -> None:
        """Have one replica load an adapter. Raises ApiError when it cannot be used."""
        await self._whole(Request("GET", "/health", adapter=adapter))

    async def get_json(self, path: str) -> Any:
        """The JSON that a replica's own app has at ``path``."""
        return json.loads(await self._whole(Request("GET", path)))

    async def _whole(self, request: Request) -> bytes:
        async with aclosing(self.send(request)) as responses:
            async for response in responses:
                return b"".join([piece async for piece in response.pieces])
        raise ApiError(503, "no replica could answer the request", retry_after=5)

    async def _before_retry(self, error: BaseException, tries: int) -> None:
        self.counters.retries += 1
        logger.warning("a replica did not answer (%s); trying another", type(error).__name__)
        await asyncio.sleep(RETRY_SECONDS * tries)

    async def _stream(self, request: Request, upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The pieces of a stream, carried on at another replica when one dies."""
        stream = SentStream()
        try:
            async for piece in self._pass(stream, upstream):
                yield piece
            return
        except _DEAD as error:
            request.deaths += cost_a_replica(error)
            await self._before_retry(error, 0)
        ids: list[int] = []
        for tries in range(1, MAX_TRIES + 1):
            ids = max(ids, self._ids(request, stream), key=len)
            stream.token_ids.clear()
            stream.reset()
            try:
                async with self._connection(request, ids) as upstream:
                    if not is_event_stream(upstream):
                        raise ReplicaFailed(f"status {upstream.status}")
                    async for piece in self._pass(stream, upstream, Resumed(stream.events)):
                        yield piece
                self.counters.resumed += 1
                return
            except _DEAD as error:
                request.deaths += cost_a_replica(error)
                if request.deaths >= MAX_DEATHS:
                    break
                await self._before_retry(error, tries)
            except (Diverged, ApiError) as error:
                logger.warning("a stream could not be carried on: %s", error)
                break
        yield error_event(503, "the replica that wrote this answer stopped, and no other could go on with it")

    def _ids(self, request: Request, stream: SentStream) -> list[int]:
        return stream.ids_to_carry_on(longest_stop(request.body)) if can_carry_on(request.body) else []

    async def _pass(
        self, stream: SentStream, upstream: aiohttp.ClientResponse, resumed: Resumed | None = None
    ) -> AsyncIterator[bytes]:
        """Pieces for the client. Raises ReplicaDied for a stream without an end or with the engine's death in it."""
        async for chunk in upstream.content.iter_any():
            out: list[bytes] = []
            for event in stream.take(chunk):
                if event.startswith(ERROR) and is_engine_error(event):
                    raise ReplicaDied("the engine died")
                passed = event if resumed is None else resumed.pass_on(event)
                if passed is not None:
                    stream.sent(passed)
                    out += (passed, b"\n\n")
            if out:
                self.counters.tokens += len(out) // 2
                yield b"".join(out)
        if not stream.finished:
            raise ReplicaDied("the stream has no end")

    @asynccontextmanager
    async def _connection(self, request: Request, resume: list[int] | None = None) -> AsyncIterator[Any]:
        """A connection to the replica that Serve chooses, which counts the request until this ends."""
        spare = None if request.adapter else self._spare.take()
        tickets, ticket = spare or (self._ticket_calls(request.adapter).remote(), None)
        is_used = False
        self._under_way += 1
        try:
            ticket = ticket or await self._first(tickets)
            headers = {TICKET_HEADER: ticket["ticket"], "content-type": "application/json"}
            if request.request_id:
                headers["x-request-id"] = request.request_id
            if resume:
                headers[RESUME_HEADER] = ",".join(map(str, resume))
            async with self._session.request(
                request.method, ticket["url"] + request.path, data=request.raw or None, headers=headers
            ) as upstream:
                is_used = True
                if self._keeps_spare and self._under_way == 1 and not request.adapter:
                    self._spare.prepare(self._ticket_calls(""))
                yield upstream
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._spare.expire(SPARE_SECONDS)
            if not is_used:  # a used ticket ends with its connection
                with suppress(Exception):  # cancelling a call that failed raises its error once more
                    tickets.cancel()

    async def _first(self, tickets: Any) -> dict[str, Any]:
        """The ticket. Raises ApiError when there is none."""
        self.counters.waiting += 1
        try:
            ticket = await asyncio.wait_for(anext(aiter(tickets)), self._queue_timeout)
        except BackPressureError:
            raise ApiError(429, "too many requests are waiting; try again later", retry_after=5) from None
        except (TimeoutError, DeploymentUnavailableError, StopAsyncIteration):
            raise ApiError(503, "no replica is free; try again later", retry_after=30) from None
        finally:
            self.counters.waiting -= 1
        if "message" in ticket:
            raise ApiError(ticket["status"], ticket["message"], code="adapter_refused", param="model")
        return dict(ticket)


def cost_a_replica(error: BaseException) -> bool:
    """Whether a replica died with the request in its hands, rather than before it had it."""
    return not isinstance(error, (ReplicaFailed, RayActorError, aiohttp.ClientConnectorError))


def is_event_stream(upstream: aiohttp.ClientResponse) -> bool:
    """Whether an answer is a stream of events."""
    return upstream.content_type == "text/event-stream"


def refusal(status: int, body: bytes) -> ApiError:
    """A replica's error as the client's, in OpenAI's shape.

    A 5xx comes here when replicas repeated it: the request is what they fail on, and they live on.
    """
    try:
        content = json.loads(body)
        error = content.get("error") if isinstance(content.get("error"), dict) else content
        message, param, code = error.get("message") or error.get("detail"), error.get("param"), error.get("code")
    except (ValueError, AttributeError):
        message, param, code = None, None, None
    if status >= 500:
        return ApiError(422, f"every replica failed on this request: {message or status}", code="engine_failed")
    if status == 404 and code is None:
        message = "this model does not do that: the engine has no such path for it"
    code = code if isinstance(code, str) else None
    return ApiError(status, str(message or f"refused with status {status}"), param=param, code=code)


def is_engine_error(event: bytes) -> bool:
    """Whether an error event says that the replica failed, rather than the request."""
    try:
        error = json.loads(event[len(b"data: ") :])["error"]
        return int(error.get("code") or 500) >= 500
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
