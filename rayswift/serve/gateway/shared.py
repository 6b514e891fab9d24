"""What the gateways of one deployment know together: adapters that clients named, who waits, what was counted.

A gateway that is alone keeps it itself. Several keep it in one small actor (`GatewayState`, an application of its own,
so that it outlives them). They ask it for names that clients gave to adapters, and for a place in the line when a
request has to wait, and tell it their counters every second or two: never on an event of a stream, nor on a request
that finds a free replica. Everything else that a gateway has is its own: kept leases, connections, the streams it could
resume; or stands in its configuration: keys, models, adapters given at start.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from rayswift.serve.node_address import keep_replica_ports_inside
from rayswift.serve.openai_errors import ApiError

logger = logging.getLogger("rayswift.serve.gateway.shared")

STATE = "GatewayState"
#: Seconds between a gateway's reports; one that is silent for so many is dead, and what waits there waits no more.
REPORT_SECONDS, SILENT_SECONDS = 2.0, 15.0
#: Seconds that an answer may take, and that a request in line waits for it: it may hold a replica meanwhile.
ASK_SECONDS, LINE_SECONDS = 10.0, 1.0
#: What is of the moment, and ends with its gateway.
GAUGES = ("running", "waiting")


@dataclass
class Counters:
    """What a gateway has seen since it started; `running` and `waiting` are of this moment."""

    requests: int = 0
    errors: int = 0
    tokens: int = 0
    retries: int = 0
    resumed: int = 0
    leases: int = 0
    kept_leases: int = 0
    running: int = 0
    waiting: int = 0
    by_status: dict[int, int] = field(default_factory=dict)


class TooManyWait(Exception):
    """The line of a model is full."""


class GatewayState:
    """The deployment class; a gateway that is alone has one as an object."""

    def __init__(self, *, is_actor: bool = False) -> None:
        if is_actor:
            keep_replica_ports_inside()
        self._created = int(time.time())
        # Later than every version of an actor before this one: replicas may still have what clients named then.
        self._version = self._began = time.time_ns()
        self._named: dict[tuple[str, str], tuple[str, int]] = {}  # (model, adapter) → path below the root, version
        self._counters: dict[str, dict[str, Any]] = {}
        self._line: dict[str, Counter[str]] = {}  # gateway → model → requests that wait
        self._heard: dict[str, float] = {}

    async def created(self) -> int:
        """When the deployment began, as its model cards say."""
        return self._created

    async def adapter(self, model: str, name: str) -> tuple[str, int]:
        """Where an adapter lies that a client named (empty for another name), and the version of what the name means.

        A name's version grows with every change of its meaning (`replica.adapters.AdapterKey`).
        """
        return self._named.get((model, name), ("", self._began))

    async def next_version(self) -> int:
        """A version above all that there have been."""
        self._version = max(self._version + 1, time.time_ns())
        return self._version

    async def name_adapter(self, model: str, name: str, path: str, version: int, replace: bool) -> bool:
        """Give the adapter at ``path`` a name; False when it has one from a client already, unless ``replace``."""
        known, since = await self.adapter(model, name)
        if known and not replace and version != since:
            return False
        if version > since:  # two came at once, and the later one is there already
            self._named[model, name] = path, version
        return True

    async def forget_adapter(self, model: str, name: str) -> int:
        """Take a name away that a client gave; the version from which on it means nothing, or its own folder."""
        version = await self.next_version()
        self._named[model, name] = "", version
        return version

    async def adapter_names(self, model: str) -> list[str]:
        """The names that clients gave."""
        return [name for (owner, name), (path, _) in self._named.items() if owner == model and path]

    async def wait(self, gateway: str, model: str, limit: int) -> bool:
        """Take a place in the line of a model; False when ``limit`` wait already, at all gateways together."""
        self._hear(gateway)
        if sum(line[model] for line in self._line.values()) >= limit:
            return False
        self._line.setdefault(gateway, Counter())[model] += 1
        return True

    async def stop_waiting(self, gateway: str, model: str) -> None:
        """Leave the place."""
        if line := self._line.get(gateway):
            line[model] -= 1

    async def totals(self, gateway: str, counters: dict[str, Any]) -> dict[str, Any]:
        """Note the counters of one gateway; the sums over all that there have been."""
        self._hear(gateway)
        self._counters[gateway] = counters
        silent = {name: 0 for name in GAUGES}
        known = [one if name in self._heard else one | silent for name, one in self._counters.items()]
        sums = {name: sum(one[name] for one in known) for name in counters if name != "by_status"}
        return sums | {"by_status": dict(sum((Counter(one["by_status"]) for one in known), Counter()))}

    def _hear(self, gateway: str) -> None:
        now = time.monotonic()
        self._heard = {name: when for name, when in self._heard.items() if now - when < SILENT_SECONDS} | {gateway: now}
        self._line = {name: line for name, line in self._line.items() if name in self._heard}


class SharedState:
    """A gateway's side of it.

    Args:
        app: the application of the actor; None for a gateway that is alone.
        counters: the gateway's.
    """

    def __init__(self, app: str | None, counters: Any) -> None:
        self._counters, self._id = counters, secrets.token_hex(8)
        self._actor = None if app is None else serve.get_deployment_handle(STATE, app)
        self._alone = GatewayState() if app is None else None
        self._leaving: set[asyncio.Future[None]] = set()
        self._is_silent = False  # the actor, since the last time it was asked
        self._reporting = None if app is None else asyncio.ensure_future(self._report())

    async def ask(self, method: str, *args: Any, timeout: float | None = ASK_SECONDS) -> Any:
        """What a method of `GatewayState` answers. Raises ApiError (503) when its actor does not."""
        if self._actor is None:
            return await getattr(self._alone, method)(*args)
        try:
            async with asyncio.timeout(timeout):
                answer = await getattr(self._actor, method).remote(*args)
            self._is_silent = False
            return answer
        except (RayError, RayServeException, TimeoutError) as error:
            self._is_silent = True
            logger.warning("the state that the gateways share does not answer: %s", type(error).__name__)
            raise ApiError(503, "the server is being started again; try again later", retry_after=2) from error

    async def totals(self) -> dict[str, Any]:
        """The counters of all gateways together; this one's alone when the actor does not answer."""
        own = asdict(self._counters)
        try:
            return dict(await self.ask("totals", self._id, own))
        except ApiError:
            return own

    @asynccontextmanager
    async def place(self, model: str, limit: int) -> AsyncIterator[None]:
        """A place in the line of a model. Raises TooManyWait.

        Serve counts those of a gateway that is alone, and of each where the actor does not answer.
        """
        if self._actor is None or self._is_silent:
            yield
            return
        asking = asyncio.ensure_future(self.ask("wait", self._id, model, limit))
        try:
            answered, _ = await asyncio.wait({asking}, timeout=LINE_SECONDS)
            with suppress(ApiError):
                if answered and not asking.result():
                    raise TooManyWait
            yield
        finally:  # nobody waits for this
            leaving = asyncio.ensure_future(self._leave(model, asking))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _leave(self, model: str, asking: asyncio.Future[bool]) -> None:
        with suppress(ApiError):
            if await asking:
                await self.ask("stop_waiting", self._id, model)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_SECONDS)
            await self.totals()

    def close(self) -> None:
        """Say nothing more."""
        if self._reporting is not None:
            self._reporting.cancel()
