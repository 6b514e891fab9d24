"""What a lease lets in at a replica, and when it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rayswift.serve import lease as leases
from rayswift.serve.lease import FULL_HEADER, LEASE_HEADER, NO_LEASE, LeaseBook, LeaseMiddleware

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Door:
    """A replica's middleware over an app that waits for ``go`` between the halves of its answer."""

    def __init__(self) -> None:
        self.book, self.go, self.fails, self.said_full = LeaseBook(2), asyncio.Event(), False, False
        self._middleware = LeaseMiddleware(self._app, self.book)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await self.go.wait()
        if self.fails:
            raise RuntimeError("the app fails in the middle")
        await send({"type": "http.response.body", "body": b"whole"})

    async def ask(self, token: str) -> int:
        """The status of a request with this token."""
        statuses: list[int] = []

        async def send(message: Any) -> None:
            if "status" in message:
                statuses.append(message["status"])
                self.said_full = (FULL_HEADER.encode(), b"1") in message["headers"]

        headers = [(LEASE_HEADER.encode(), token.encode())]
        await self._middleware({"type": "http", "headers": headers}, None, send)  # type: ignore[arg-type]
        return statuses[0]


async def test_a_lease_lets_one_request_in_after_the_other_and_no_two_at_once() -> None:
    door = Door()
    token = door.book.open()
    first = asyncio.ensure_future(door.ask(token))
    await asyncio.sleep(0)
    assert await door.ask(token) == NO_LEASE
    door.go.set()
    assert [await first, await door.ask(token)] == [200, 200]
    assert await door.ask("guessed") == NO_LEASE


async def test_a_lease_ends_with_a_request_that_breaks_off() -> None:
    door = Door()
    token, door.fails = door.book.open(), True
    ended = asyncio.ensure_future(door.book.ended(token))
    await asyncio.sleep(0)
    door.go.set()
    with pytest.raises(RuntimeError):
        await door.ask(token)
    await asyncio.wait_for(ended, 1)
    assert await door.ask(token) == NO_LEASE


async def test_a_lease_ends_when_no_request_comes_but_not_under_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "IDLE_SECONDS", 0.1)
    door = Door()
    token = door.book.open()
    ended = asyncio.ensure_future(door.book.ended(token))
    asked = asyncio.ensure_future(door.ask(token))
    await asyncio.sleep(0.3)
    assert not ended.done()
    door.go.set()
    assert await asked == 200
    await asyncio.wait_for(ended, 1)
    assert await door.ask(token) == NO_LEASE


async def test_an_answer_says_when_the_replica_has_no_free_place() -> None:
    door = Door()
    door.go.set()
    first = door.book.open()
    for is_full in (False, True):
        assert await door.ask(first) == 200
        assert door.said_full is is_full
        door.book.open()
