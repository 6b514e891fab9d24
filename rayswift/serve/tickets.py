"""The private HTTP port of a replica: only a request with an open ticket gets in.

The gateway first takes a *ticket* through Ray Serve, which picks the replica, counts the request for autoscaling and
draining, and applies its limits. The request itself and its answer then go over plain HTTP, past Serve: one hop
instead of an actor call for every token. A ticket is a random word for one request, known to the two ends only.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

TICKET_HEADER = "x-rayswift-ticket"
#: Seconds in which the request of a ticket must come.
TICKET_SECONDS = 30.0
RESUME_HEADER = "x-rayswift-resume"  # token ids that were generated elsewhere, comma-separated

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class TokenNotes:
    """Ids of the tokens of one answer: ``resume`` were generated elsewhere, `flush` gives those since the last call."""

    def __init__(self, resume: list[int]) -> None:
        self.resume = resume
        self._new: list[int] = []

    def add(self, ids: list[int]) -> None:
        """Note generated tokens."""
        self._new += ids

    def flush(self) -> bytes:
        """The new ids as a comment of the event stream; empty when there are none."""
        if not self._new:
            return b""
        text, self._new = ",".join(map(str, self._new)), []
        return f": {text}\n\n".encode()


#: The notes of the request that is being answered; None outside of one.
current_notes: ContextVar[TokenNotes | None] = ContextVar("current_notes", default=None)


class TicketOffice:
    """Hands out tickets and knows when their requests end."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Event] = {}
        self._waiting: set[str] = set()

    def issue(self) -> str:
        """A new ticket."""
        ticket = secrets.token_urlsafe(18)
        self._open[ticket] = asyncio.Event()
        self._waiting.add(ticket)
        return ticket

    async def used(self, ticket: str) -> None:
        """Wait until the request of ``ticket`` has ended; one that does not come in time ends it as well.

        A gateway that gives up says so, but that word can be lost, and the replica would count the request for ever.
        """
        try:
            ended = self._open[ticket]
            with suppress(TimeoutError):
                await asyncio.wait_for(ended.wait(), TICKET_SECONDS)
            if ticket not in self._waiting:
                await ended.wait()
        finally:
            self._open.pop(ticket, None)
            self._waiting.discard(ticket)

    def enter(self, ticket: str) -> asyncio.Event | None:
        """The event to set when the request ends; None for a ticket that is unknown or was used before."""
        if ticket not in self._waiting:
            return None
        self._waiting.discard(ticket)
        return self._open[ticket]


class TicketMiddleware:
    """Lets requests with an open ticket through, and writes the ids of streamed tokens before each piece."""

    def __init__(self, app: App, office: TicketOffice) -> None:
        self.app, self.office = app, office

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        ended = self.office.enter(headers.get(TICKET_HEADER.encode(), b"").decode("latin-1"))
        if ended is None:
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"no ticket"})
            return
        resume = headers.get(RESUME_HEADER.encode(), b"").decode("latin-1")
        notes = TokenNotes([int(one) for one in resume.split(",") if one])
        token = current_notes.set(notes)
        try:
            await self.app(scope, receive, _with_ids(send, notes))
        finally:
            current_notes.reset(token)
            ended.set()


def _with_ids(send: Send, notes: TokenNotes) -> Send:
    """``send`` that puts the token ids of a piece of an event stream before it."""
    is_stream = False

    async def sending(message: MutableMapping[str, Any]) -> None:
        nonlocal is_stream
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            is_stream = kind.startswith(b"text/event-stream")
        elif is_stream and (ids := notes.flush()):
            message = {**message, "body": ids + message.get("body", b"")}
        await send(message)

    return sending


def bind(host: str, port: int = 0) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises OSError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


async def run_http(app: Any, sock: socket.socket, **options: Any) -> Any:
    """Serve ``app`` on ``sock`` in this event loop until the returned server's ``should_exit`` is set."""
    import uvicorn

    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, date_header=False, lifespan="off", ws="none",
        timeout_keep_alive=75, h11_max_incomplete_event_size=256 * 1024, **options,
    )  # fmt: skip
    server = uvicorn.Server(config)
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if task.done():
        task.result()
    server.task = task  # type: ignore[attr-defined]  # keeps the task alive as long as the server
    return server
