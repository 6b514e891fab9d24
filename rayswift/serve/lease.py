"""Leases: the right to one slot of a replica, taken through Ray Serve and used past it.

The gateway takes a lease by a call of `LLMServer.lease`: Serve picks the replica, counts the call for autoscaling and
draining, and applies its limits. The request itself and its answer then go over plain HTTP to the replica's private
port, one hop instead of an actor call for every token; the port lets in only requests with the token of an open lease,
one at a time. To take a lease costs several milliseconds of processor time on both sides, and on a small machine the
engine is short of them: the gateway keeps it for a moment for the request that follows, and Serve goes on counting it.

Ray's own form of this is direct streaming (``RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING``). In Ray 2.60 it serves one model
without adapters and cannot resume a stream; once it can, it replaces this file.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayswift.serve.connections import admit

LEASE_HEADER = "x-rayswift-lease"
RESUME_HEADER = "x-rayswift-resume"  # token ids that were generated elsewhere, comma-separated
FULL_HEADER = "x-rayswift-full"  # of an answer: every place of the replica is taken
#: Status for a request whose lease has ended or is unknown (Misdirected Request).
NO_LEASE = 421
#: A lease ends when no request comes for so many seconds.
IDLE_SECONDS = 30.0
#: The gateway keeps a lease so long after an answer: what a client needs to ask its next question.
KEEP_SECONDS = 0.25
#: A lease older than this is not kept: Serve chooses the replica anew, which may have been started or drained since.
LIFE_SECONDS = 5.0


# --- the gateway's side -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Lease:
    """The right to send requests with ``token`` to the replica at ``url``; ``call`` is Serve's call that counts it."""

    call: Any
    url: str = ""
    token: str = ""
    taken: float = field(default_factory=time.monotonic)
    kept: float = 0.0
    timer: asyncio.TimerHandle | None = None

    def give_back(self) -> None:
        """End it."""
        with suppress(Exception):  # cancelling a call that failed raises its error once more
            self.call.cancel()


class LeaseCache:
    """The leases of one deployment that are kept for the next request."""

    def __init__(self) -> None:
        self._leases: list[Lease] = []
        self._failures: dict[str, float] = {}

    def take(self) -> Lease | None:
        """The lease that was kept last; None when there is none."""
        while self._leases:
            lease = self._leases.pop()
            if lease.timer is not None:
                lease.timer.cancel()
            if time.monotonic() - lease.kept < KEEP_SECONDS:
                return lease
            lease.give_back()  # this process stood still, and its timer is late
        return None

    def keep(self, lease: Lease) -> None:
        """Keep the lease of a request that was answered, or give it back when it is old or its replica failed."""
        lease.kept = time.monotonic()
        if lease.kept - lease.taken > LIFE_SECONDS or lease.taken <= self._failures.get(lease.url, 0.0):
            lease.give_back()
            return
        self._leases.append(lease)
        lease.timer = asyncio.get_running_loop().call_later(KEEP_SECONDS, self._expire, lease)

    def replica_failed(self, url: str) -> None:
        """Give back what is kept for a replica; its leases that are in use will not be kept."""
        self._failures[url] = time.monotonic()
        for lease in [lease for lease in self._leases if lease.url == url]:
            self._expire(lease)

    def give_back_all(self) -> None:
        """End those that are kept: the gateway ends, and their replicas would wait for its next requests."""
        for lease in list(self._leases):
            self._expire(lease)

    def _expire(self, lease: Lease) -> None:
        if lease in self._leases:
            self._leases.remove(lease)
            lease.give_back()


# --- the replica's side -----------------------------------------------------------------------------------------


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
class _Slot:
    busy: bool = False
    idle_since: float = field(default_factory=time.monotonic)
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class LeaseBook:
    """The open leases of a replica, by their tokens. ``limit``: how many there can be."""

    def __init__(self, limit: float = float("inf")) -> None:
        self._slots: dict[str, _Slot] = {}
        self._limit = limit

    @property
    def is_full(self) -> bool:
        """Whether every place is taken: who has no lease waits, perhaps at another gateway than the one that asks."""
        return len(self._slots) >= self._limit

    def open(self) -> str:
        """The token of a new lease."""
        token = secrets.token_urlsafe(18)
        self._slots[token] = _Slot()
        return token

    async def ended(self, token: str) -> None:
        """Wait until a lease has ended: its request broke off, or none came for :data:`IDLE_SECONDS`.

        A gateway that gives a lease back says so, but that word can be lost, and the replica would count the request
        for ever.
        """
        slot = self._slots[token]
        try:
            while not slot.ended.is_set() and (slot.busy or time.monotonic() - slot.idle_since < IDLE_SECONDS):
                with suppress(TimeoutError):
                    await asyncio.wait_for(slot.ended.wait(), IDLE_SECONDS)
        finally:
            self._slots.pop(token, None)

    def enter(self, token: str) -> bool:
        """Begin a request; False for a lease that has ended, is unknown or in use."""
        slot = self._slots.get(token)
        if slot is None or slot.busy or slot.ended.is_set():
            return False
        slot.busy = True
        return True

    def leave(self, token: str, *, is_answered: bool) -> None:
        """End a request. One with its whole answer frees the lease for another; else the lease ends with it."""
        if slot := self._slots.get(token):
            if is_answered:
                slot.busy, slot.idle_since = False, time.monotonic()
            else:
                slot.ended.set()


class LeaseMiddleware:
    """Lets requests with a lease through, and writes the ids of streamed tokens before each piece."""

    def __init__(self, app: ASGIApp, book: LeaseBook) -> None:
        self.app, self.book = app, book

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        token = headers.get(LEASE_HEADER.encode(), b"").decode("latin-1")
        if not self.book.enter(token):
            await send({"type": "http.response.start", "status": NO_LEASE, "headers": []})
            await send({"type": "http.response.body", "body": b"no lease"})
            return
        admit(scope)
        resume = headers.get(RESUME_HEADER.encode(), b"").decode("latin-1")
        notes = TokenNotes([int(one) for one in resume.split(",") if one])
        is_stream = is_whole = False

        async def send_on(message: Message) -> None:
            nonlocal is_stream, is_whole
            if message["type"] == "http.response.start":
                is_stream = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                if self.book.is_full:
                    message = {**message, "headers": [*message["headers"], (FULL_HEADER.encode(), b"1")]}
            elif is_stream and (ids := notes.flush()):
                message = {**message, "body": ids + message.get("body", b"")}
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                is_whole = True
                self.book.leave(token, is_answered=True)  # before the piece: who has it may come again at once
            await send(message)

        entered = current_notes.set(notes)
        try:
            await self.app(scope, receive, send_on)
        finally:
            current_notes.reset(entered)
            if not is_whole:
                self.book.leave(token, is_answered=False)
