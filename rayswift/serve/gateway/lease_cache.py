"""Tickets that the gateway keeps for a moment after their requests, so that those that follow need not ask Serve.

A ticket through Serve costs several milliseconds of processor time on both sides; on a small machine the engine is
short of them. Serve goes on counting a kept ticket as a request to its replica.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

#: A ticket is kept so long after the last answer: what a client needs to ask its next question.
KEEP_SECONDS = 0.25
#: A ticket older than this is not kept: Serve chooses the replica anew, which may have been started or drained since.
LIFE_SECONDS = 5.0


@dataclass(eq=False)
class Ticket:
    """The right to send a request to the replica at ``url``; ``call`` is Serve's call that counts it."""

    call: Any
    url: str
    word: str
    issued: float = field(default_factory=time.monotonic)
    kept: float = 0.0
    timer: asyncio.TimerHandle | None = None

    def end(self) -> None:
        """Give it back."""
        with suppress(Exception):  # cancelling a call that failed raises its error once more
            self.call.cancel()


class KeptTickets:
    """The kept tickets of one deployment."""

    def __init__(self) -> None:
        self._tickets: list[Ticket] = []
        self._failures: dict[str, float] = {}

    def take(self) -> Ticket | None:
        """The ticket that was kept last; None when there is none."""
        while self._tickets:
            ticket = self._tickets.pop()
            if ticket.timer is not None:
                ticket.timer.cancel()
            if time.monotonic() - ticket.kept < KEEP_SECONDS:
                return ticket
            ticket.end()  # this process stood still, and its timer is late
        return None

    def keep(self, ticket: Ticket) -> None:
        """Keep the ticket of a request that was answered, or give it back when it is old or its replica failed."""
        ticket.kept = time.monotonic()
        if ticket.kept - ticket.issued > LIFE_SECONDS or ticket.issued <= self._failures.get(ticket.url, 0.0):
            ticket.end()
            return
        self._tickets.append(ticket)
        ticket.timer = asyncio.get_running_loop().call_later(KEEP_SECONDS, self._expire, ticket)

    def replica_failed(self, url: str) -> None:
        """Give back what is kept for a replica; its tickets that are in use will not be kept."""
        self._failures[url] = time.monotonic()
        for ticket in [ticket for ticket in self._tickets if ticket.url == url]:
            self._expire(ticket)

    def _expire(self, ticket: Ticket) -> None:
        if ticket in self._tickets:
            self._tickets.remove(ticket)
            ticket.end()
