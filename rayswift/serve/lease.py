"""The private HTTP port of a replica: only a request with an open ticket gets in.

The gateway first takes a *ticket* through Ray Serve, which picks the replica, counts the request for autoscaling and
draining, and applies its limits. The request itself and its answer then go over plain HTTP, past Serve: one hop
instead of an actor call for every token. A ticket is a random word known to the two ends only, for one request at a
time; the gateway may use it again for a moment (`kept_tickets`).
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

TICKET_HEADER = "x-rayswift-ticket"
#: A ticket that waits for a request for so many seconds is void.
TICKET_SECONDS = 30.0
#: Status for a request whose ticket is void or unknown (Misdirected Request).
NO_TICKET = 421
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


@dataclass(eq=False)
class _Issued:
    """A ticket in the office's book."""

    busy: bool = False
    idle_since: float = field(default_factory=time.monotonic)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class TicketOffice:
    """Hands out tickets and knows which are in use."""

    def __init__(self) -> None:
        self._book: dict[str, _Issued] = {}

    def issue(self) -> str:
        """A new ticket."""
        ticket = secrets.token_urlsafe(18)
        self._book[ticket] = _Issued()
        return ticket

    async def ended(self, ticket: str) -> None:
        """Wait until ``ticket`` has ended: its request broke off, or none came for :data:`TICKET_SECONDS`.

        A gateway that gives a ticket back says so, but that word can be lost, and the replica would count the request
        for ever.
        """
        issued = self._book[ticket]
        try:
            while not issued.ended.is_set() and (issued.busy or time.monotonic() - issued.idle_since < TICKET_SECONDS):
                with suppress(TimeoutError):
                    await asyncio.wait_for(issued.ended.wait(), TICKET_SECONDS)
        finally:
            self._book.pop(ticket, None)

    def enter(self, ticket: str) -> bool:
        """Begin a request with ``ticket``; False for one that is void, unknown or in use."""
        issued = self._book.get(ticket)
        if issued is None or issued.busy or issued.ended.is_set():
            return False
        issued.busy = True
        return True

    def answered(self, ticket: str) -> None:
        """The request has its whole answer: another may come with this ticket."""
        if issued := self._book.get(ticket):
            issued.busy, issued.idle_since = False, time.monotonic()

    def broke_off(self, ticket: str) -> None:
        """The request ended without its whole answer: the ticket ends with it."""
        if issued := self._book.get(ticket):
            issued.ended.set()


class TicketMiddleware:
    """Lets requests with a valid ticket through, and writes the ids of streamed tokens before each piece."""

    def __init__(self, app: App, office: TicketOffice) -> None:
        self.app, self.office = app, office

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        ticket = headers.get(TICKET_HEADER.encode(), b"").decode("latin-1")
        if not self.office.enter(ticket):
            await send({"type": "http.response.start", "status": NO_TICKET, "headers": []})
            await send({"type": "http.response.body", "body": b"no ticket"})
            return
        resume = headers.get(RESUME_HEADER.encode(), b"").decode("latin-1")
        notes = TokenNotes([int(one) for one in resume.split(",") if one])
        answer = _Answer(send, notes, functools.partial(self.office.answered, ticket))
        token = current_notes.set(notes)
        try:
            await self.app(scope, receive, answer)
        finally:
            current_notes.reset(token)
            if not answer.is_whole:
                self.office.broke_off(ticket)


class _Answer:
    """``send`` that puts the token ids of a piece of an event stream before it, and says when the last piece leaves."""

    def __init__(self, send: Send, notes: TokenNotes, on_whole: Callable[[], None]) -> None:
        self._send, self._notes, self._on_whole = send, notes, on_whole
        self._is_stream = self.is_whole = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
        elif self._is_stream and (ids := self._notes.flush()):
            message = {**message, "body": ids + message.get("body", b"")}
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.is_whole = True
            self._on_whole()  # before the piece: who has it may come with the next request at once
        await self._send(message)


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
