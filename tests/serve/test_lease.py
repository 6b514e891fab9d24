"""What a ticket lets in at a replica, and when it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayswift.serve import lease as tickets
from rayswift.serve.lease import NO_TICKET, TICKET_HEADER, TicketMiddleware, TicketOffice

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Door:
    """A replica's middleware over an app that waits for ``go`` between the halves of its answer."""

    def __init__(self) -> None:
        self.office, self.go, self.fails = TicketOffice(), asyncio.Event(), False
        self._middleware = TicketMiddleware(self._app, self.office)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await self.go.wait()
        if self.fails:
            raise RuntimeError("the app fails in the middle")
        await send({"type": "http.response.body", "body": b"whole"})

    async def ask(self, ticket: str) -> int:
        """The status of a request with this ticket."""
        statuses: list[int] = []

        async def send(message: Any) -> None:
            statuses.extend([message["status"]] if "status" in message else [])

        headers = [(TICKET_HEADER.encode(), ticket.encode())]
        await self._middleware({"type": "http", "headers": headers}, None, send)  # type: ignore[arg-type]
        return statuses[0]


async def test_a_ticket_lets_one_request_in_after_the_other_and_no_two_at_once() -> None:
    door = Door()
    ticket = door.office.issue()
    first = asyncio.ensure_future(door.ask(ticket))
    await asyncio.sleep(0)
    assert await door.ask(ticket) == NO_TICKET
    door.go.set()
    assert [await first, await door.ask(ticket)] == [200, 200]
    assert await door.ask("guessed") == NO_TICKET


async def test_a_ticket_ends_with_a_request_that_breaks_off() -> None:
    door = Door()
    ticket, door.fails = door.office.issue(), True
    ended = asyncio.ensure_future(door.office.ended(ticket))
    await asyncio.sleep(0)
    door.go.set()
    with pytest.raises(RuntimeError):
        await door.ask(ticket)
    await asyncio.wait_for(ended, 1)
    assert await door.ask(ticket) == NO_TICKET


async def test_a_ticket_ends_when_no_request_comes_but_not_under_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tickets, "TICKET_SECONDS", 0.1)
    door = Door()
    ticket = door.office.issue()
    ended = asyncio.ensure_future(door.office.ended(ticket))
    asked = asyncio.ensure_future(door.ask(ticket))
    await asyncio.sleep(0.3)
    assert not ended.done()
    door.go.set()
    assert await asked == 200
    await asyncio.wait_for(ended, 1)
    assert await door.ask(ticket) == NO_TICKET
