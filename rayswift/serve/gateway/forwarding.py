"""One request from the gateway to a replica and back, whatever replicas do meanwhile.

A replica that dies before its first byte: the request goes to another. One that dies in the middle of a stream: another
resumes it from the tokens that the client has (`stream_resume`). A replica that answers with an error of its own (its
engine died) counts as dead; an error that a second replica repeats is the request's and is passed on.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

from rayswift.serve.gateway.shared import TooManyWait
from rayswift.serve.gateway.stream_resume import (
    DONE,
    ERROR,
    EVENT_END,
    Mismatch,
    ResumedEvents,
    ResumedStream,
    StreamLog,
    can_resume,
    longest_stop,
)
from rayswift.serve.lease import FULL_HEADER, LEASE_HEADER, NO_LEASE, RESUME_HEADER, Lease, LeaseCache
from rayswift.serve.openai_errors import ApiError

logger = logging.getLogger("rayswift.serve.gateway.forwarding")

#: How often one request is tried when replicas answer with 5xx; connections that break do not count.
ERROR_TRIES = 3
#: Tries in all.
MAX_TRIES = 6
#: Replicas that may die while they work on one request; it may be what kills them, and must not go through them all.
MAX_DEATHS = 2
#: Seconds before the second try; it grows with each.
RETRY_SECONDS = 0.25
#: Requests whose streams are made of named events.
NAMED_STREAMS = ("/v1/responses", "/v1/messages")
#: A request that has no replica after so many seconds waits in the line that all gateways share.
LINE_SECONDS = 0.1
#: Seconds that the replicas may take for a call to each of them.
BROADCAST_SECONDS = 10.0
#: Seconds for a question about their health; who asks the gateway for it waits about as long. And how old what all of
#: them said of it may be, and of the length of their context.
HEALTH_SECONDS, HEALTH_AGE, LENGTH_AGE = 2.0, 1.0, 10.0
#: States of a deployment without replicas that starts one for the next request, or does so already.
AWAKENS = ("HEALTHY", "UPSCALING", "DOWNSCALING")
_USAGE = re.compile(rb'"(?:completion|output)_tokens":\s*(\d+)')


class ReplicaDied(Exception):
    """The connection broke, or the replica said that its engine is dead."""


class ReplicaFailed(ReplicaDied):
    """The replica answered with 5xx; it may live on."""


_DEAD = (ReplicaDied, RayActorError, aiohttp.ClientError, ConnectionError)


@dataclass
class GatewayRequest:
    """What a client asked. ``body`` is the JSON object of a POST; ``raw`` its bytes; ``adapter`` a key or ``""``."""

    method: str
    path: str
    raw: bytes = b""
    body: dict[str, Any] = field(default_factory=dict)
    adapter: str = ""
    request_id: str = ""
    deaths: int = 0


@dataclass
class Response:
    """Head of an answer; ``pieces`` are its bytes."""

    status: int
    content_type: str
    pieces: AsyncIterator[bytes]
    length: int | None = None  # bytes in all; None for a stream


class Forwarder:
    """Sends requests to the replicas behind one deployment handle.

    Args:
        handle: Serve's handle of the deployment.
        session: connections to the replicas.
        queue_timeout: seconds a request may wait for a replica.
        counters: the gateway's.
        line: a place in the line that the gateways share (`SharedState.place`), for a request that has to wait.
    """

    def __init__(
        self,
        handle: Any,
        session: aiohttp.ClientSession,
        queue_timeout: float,
        counters: Any,
        line: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> None:
        self.handle, self._session, self._queue_timeout, self.counters = handle, session, queue_timeout, counters
        self._line = line
        self._leases, self._waiting = LeaseCache(), 0
        self._said: dict[str, tuple[float, list[Any]]] = {}  # by question: when, and the answers

        @functools.lru_cache(maxsize=1024)  # a handle with options costs a look-up in Serve: one per adapter is kept
        def lease_call(adapter: str) -> Any:
            options = {"multiplexed_model_id": adapter} if adapter else {}
            return self.handle.options(method_name="lease", stream=True, **options)

        self._lease_call = lease_call

    async def send(self, request: GatewayRequest) -> AsyncGenerator[Response]:
        """Yields the one response; leaving the generator early drops the request at the replica.

        Raises:
            ApiError: no replica in time, too many waiting, an adapter that cannot be used.
        """
        tries = errors = 0
        while True:
            tries += 1
            try:
                async with self._connection(request) as upstream:
                    if upstream.status == NO_LEASE or (upstream.status >= 500 and (errors := errors + 1) < ERROR_TRIES):
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

    async def whole(self, request: GatewayRequest) -> bytes:
        """The whole answer to a request. Raises ApiError for one that is refused."""
        async with aclosing(self.send(request)) as responses:
            async for response in responses:
                return b"".join([piece async for piece in response.pieces])
        raise ApiError(503, "no replica could answer the request", retry_after=5)

    async def prepare(self, adapter: str) -> None:
        """Have a replica load an adapter that no request asks for yet. Raises ApiError when it cannot be used."""
        for tries in range(1, MAX_TRIES + 1):
            try:
                (await self._take_lease(adapter, only_prepare=True)).give_back()
                return
            except RayActorError as error:
                await self._before_retry(error, tries)
        raise ApiError(503, "no replica could load the adapter", retry_after=5)

    async def can_answer(self, may_sleep: bool) -> bool:
        """Whether a running replica says that it is well; ``may_sleep``: or none runs because nobody asked."""
        try:
            well = await self.broadcast("check_health", timeout=HEALTH_SECONDS, age=HEALTH_AGE)
            return bool(well) or (may_sleep and await asyncio.to_thread(self._is_asleep))
        except ApiError:  # one of them is silent: whether Serve finds another
            asked = self.handle.options(method_name="check_health").remote()
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    await asked
            except BackPressureError:
                return True
            except (RayError, RayServeException, TimeoutError):
                asked.cancel()
                return False
            return True

    def _is_asleep(self) -> bool:
        app = serve.status().applications.get(self.handle.app_name)
        status = app.deployments.get(self.handle.deployment_name) if app else None
        return status is not None and status.status in AWAKENS and not status.replica_states.get("RUNNING")

    async def context_length(self) -> int | None:
        """Tokens that a prompt and its answer may have; None when no replica can say."""
        try:
            return next(iter(await self.broadcast("context_length", age=LENGTH_AGE)), None)
        except ApiError:
            return None

    async def broadcast(self, method: str, *args: Any, timeout: float = BROADCAST_SECONDS, age: float = 0) -> list[Any]:
        """What every running replica answers to a call, or has answered in the last ``age`` seconds: nothing when none
        runs, nor from one that dies meanwhile.

        Raises:
            ApiError: one is there and does not answer.
        """
        when, known = self._said.get(method, (0.0, []))
        if known and time.monotonic() - when < age:
            return known
        try:
            asked = self.handle.broadcast(method, *args)
            answers = await asked.results_async(timeout_s=timeout, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        except TimeoutError:
            raise ApiError(503, "a replica does not answer; try again later", retry_after=5) from None
        for error in answers:
            if isinstance(error, BaseException):
                logger.warning("%s: a replica did not answer (%s)", method, type(error).__name__)
        found = [answer for answer in answers if not isinstance(answer, BaseException)]
        if age:
            self._said[method] = time.monotonic(), found
        return found

    def close(self) -> None:
        """Send nothing more."""
        self._leases.give_back_all()

    async def _before_retry(self, error: BaseException, tries: int) -> None:
        self.counters.retries += 1
        logger.warning("a replica did not answer (%s); trying another", type(error).__name__)
        await asyncio.sleep(RETRY_SECONDS * tries)

    async def _stream(self, request: GatewayRequest, upstream: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The pieces of a stream, resumed at another replica when one dies."""
        log = StreamLog()
        has_names = request.path in NAMED_STREAMS
        rest = ResumedEvents if has_names else ResumedStream
        try:
            async for piece in self._pass(log, upstream):
                yield piece
            return
        except _DEAD as error:
            self._leases.replica_failed(str(upstream.url.origin()))
            request.deaths += cost_a_replica(error)
            await self._before_retry(error, 0)
        ids: list[int] = []
        for tries in range(1, MAX_TRIES + 1):
            if can_resume(request.body):
                ids = max(ids, log.ids_to_resume(longest_stop(request.body)), key=len)
            log.reset()
            try:
                async with self._connection(request, ids) as upstream:
                    if not is_event_stream(upstream):
                        raise ReplicaFailed(f"status {upstream.status}")
                    async for piece in self._pass(log, upstream, rest(log.events)):
                        yield piece
                self.counters.resumed += 1
                return
            except _DEAD as error:
                request.deaths += cost_a_replica(error)
                if request.deaths >= MAX_DEATHS:
                    break
                await self._before_retry(error, tries)
            except (Mismatch, ApiError) as error:
                logger.warning("a stream could not be resumed: %s", error)
                break
        message = "the replica that wrote this answer stopped, and no other could go on with it"
        stopped = ApiError(503, message, code="stream_interrupted")
        yield stopped.named_event() if has_names else stopped.event() + DONE + EVENT_END

    async def _pass(
        self, log: StreamLog, upstream: aiohttp.ClientResponse, resumed: ResumedStream | ResumedEvents | None = None
    ) -> AsyncIterator[bytes]:
        """Pieces for the client. Raises ReplicaDied for a stream without an end or with the engine's death in it."""
        async for chunk in upstream.content.iter_any():
            out: list[bytes] = []
            for event in log.take(chunk):
                if event.startswith(ERROR) and is_engine_error(event):
                    raise ReplicaDied("the engine died")
                passed = event if resumed is None else resumed.pass_on(event)
                if passed is not None:
                    log.events.append(passed)
                    out += (passed, EVENT_END)
            if out:
                self.counters.tokens += len(out) // 2
                yield b"".join(out)
        if not log.finished:
            raise ReplicaDied("the stream has no end")

    @asynccontextmanager
    async def _connection(self, request: GatewayRequest, resume: list[int] | None = None) -> AsyncIterator[Any]:
        """A connection to the replica that Serve chooses, which counts the request until this ends."""
        lease = None if request.adapter else self._leases.take()  # an adapter may have been unloaded since
        self.counters.kept_leases += lease is not None
        lease = lease or await self._take_lease(request.adapter)
        headers = {LEASE_HEADER: lease.token, "content-type": "application/json"}
        if request.request_id:
            headers["x-request-id"] = request.request_id
        if resume:
            headers[RESUME_HEADER] = ",".join(map(str, resume))
        is_answered = is_full = False
        try:
            async with self._session.request(
                request.method, lease.url + request.path, data=request.raw or None, headers=headers
            ) as upstream:
                is_full = FULL_HEADER in upstream.headers
                try:
                    yield upstream
                finally:  # came to its end, and was read to it
                    is_answered = upstream.content.at_eof() and upstream.content.exception() is None
        except _DEAD:
            self._leases.replica_failed(lease.url)
            raise
        finally:
            # While others wait for one of Serve's places, here or at another gateway, this one is theirs.
            if is_answered and not request.adapter and not self._waiting and not is_full:
                self._leases.keep(lease)
            else:
                lease.give_back()

    async def _take_lease(self, adapter: str, only_prepare: bool = False) -> Lease:
        """A lease through Serve. Raises ApiError when there is none."""
        lease = Lease(self._lease_call(adapter).remote(only_prepare))
        self.counters.leases += 1
        self.counters.waiting += 1
        self._waiting += 1
        try:
            async with asyncio.timeout(self._queue_timeout):
                given = await self._in_line(anext(aiter(lease.call)))
            if "message" in given:
                raise ApiError(given["status"], given["message"], code="adapter_refused", param="model")
            lease.url, lease.token = given["url"], given["token"]
            return lease
        except BaseException as error:
            lease.give_back()
            if isinstance(error, (BackPressureError, TooManyWait)):
                raise ApiError(429, "too many requests are waiting; try again later", retry_after=5) from None
            if isinstance(error, (TimeoutError, RayServeException, StopAsyncIteration)):
                raise ApiError(503, "no replica is free; try again later", retry_after=30) from None
            raise
        finally:
            self.counters.waiting -= 1
            self._waiting -= 1

    async def _in_line(self, coming: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        """What is coming from Serve, awaited in the line where it takes long. Raises TooManyWait."""
        given = asyncio.ensure_future(coming)
        try:
            await asyncio.wait({given}, timeout=LINE_SECONDS)
            async with nullcontext() if given.done() else self._line():
                return await given
        finally:
            given.cancel()


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
    if status == 404 and code in (None, "not_found"):
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
