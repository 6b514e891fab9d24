"""What a connection may cost before anybody knows whose it is: uvicorn's HTTP server has no limits of its own.

A connection is a *stranger's* until the app lets one of its requests in (`admit`: a key was shown, or none is needed).
Strangers have little time and few bytes, and when there are many of them, those that have waited longest are closed for
the next ones: who has a key shows it in the first moment, and is served however many others hold connections open.
Nothing here runs on the way of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from typing import Any, ClassVar

import uvicorn
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from rayswift.serve.openai_errors import ApiError

#: Bytes of a request's head: its line and headers. Replicas take longer ones: what a resumed stream goes on from.
MAX_HEAD_BYTES, MAX_REPLICA_HEAD_BYTES = 64 * 2**10, 4 * 2**20
#: A stranger's seconds in all, and bytes beyond a head; what comes after a refusal is read, so that it can be seen.
STRANGER_SECONDS, MAX_STRANGER_BYTES = 10.0, 2**20
#: With more strangers than this those that have been there for so many seconds make room.
MAX_STRANGERS, SHORT_SECONDS = 512, 1.0
#: Seconds for a further head, and for the rest of a body that was answered before it was there.
HEAD_SECONDS = 10.0
#: Seconds in which a client takes nothing of its answer.
STALLED_SECONDS = 60.0
#: Requests that a connection may send ahead.
MAX_PIPELINED = 16
#: Seconds for the handshake of TLS.
HANDSHAKE_SECONDS = 10.0
#: Connections and files that a server may have open, where the system lets it.
OPEN_FILES = 2**16
_CONNECTION = "rayswift.connection"


def admit(scope: Scope) -> None:
    """Let the client of a request stay: its connection is no stranger's any more."""
    if connection := scope.get("extensions", {}).get(_CONNECTION):
        connection.admit()


class BoundedServer(uvicorn.Server):
    """uvicorn's server with limits on connections; listens on the sockets that it is given."""

    def __init__(self, config: uvicorn.Config, max_head_bytes: int) -> None:
        super().__init__(config)
        self._max_head_bytes = max_head_bytes

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        loop, strangers, files = asyncio.get_running_loop(), dict[Connection, float](), raise_open_files()

        def accept() -> Connection:
            uvicorns = {"config": self.config, "server_state": self.server_state, "app_state": {}, "_loop": loop}
            return Connection(strangers, files // 2, self._max_head_bytes, **uvicorns)

        await self.lifespan.startup()
        ssl = self.config.ssl
        limits: dict[str, Any] = {"ssl": ssl, "ssl_handshake_timeout": HANDSHAKE_SECONDS} if ssl else {}
        self.servers = [
            await loop.create_server(accept, sock=sock, backlog=self.config.backlog, **limits) for sock in sockets or ()
        ]
        self.started = True


class Connection(HttpToolsProtocol):
    """One connection.

    Args:
        strangers: those of the server and when they came, the oldest first.
        most: strangers that there may be however short they have been there.
        max_head_bytes: of a request's head.
    """

    def __init__(self, strangers: dict[Connection, float], most: int, max_head_bytes: int, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._strangers, self._most, self._max_head_bytes = strangers, most, max_head_bytes
        self._in_head = self._in_message = False
        self._bytes = self._head_bytes = 0  # in all; since a message began or brought a piece of its body
        self._error: ApiError | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None

    # --- strangers ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """A stranger came."""
        super().connection_made(transport)
        now = self.loop.time()
        self._strangers[self] = now
        self._wait(STRANGER_SECONDS)
        while len(self._strangers) > MAX_STRANGERS:
            oldest, came = next(iter(self._strangers.items()))
            if now - came < SHORT_SECONDS and len(self._strangers) <= self._most:
                break
            del self._strangers[oldest]
            oldest.transport.abort()

    def admit(self) -> None:
        """It is somebody's."""
        if self._strangers.pop(self, None) is not None:
            self._wait(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._strangers.pop(self, None)
        self._wait(None)
        self._takes_again()
        super().connection_lost(exc)

    # --- requests -----------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._bytes += len(data)
        self._head_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_message and self._head_bytes > self._max_head_bytes:
            self._refuse(self._head_too_large())
        elif self in self._strangers and self._bytes > self._max_head_bytes + MAX_STRANGER_BYTES:
            self.transport.abort()
        elif self._in_head and self._deadline is None:
            self._wait(HEAD_SECONDS)

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self.scope["extensions"] = {_CONNECTION: self}  # type: ignore[dict-item]
        self._in_head, self._in_message, self._head_bytes = True, True, 0

    def on_headers_complete(self) -> None:
        """A head has ended; what is raised here ends the reading."""
        self._in_head = False
        if self not in self._strangers:
            self._wait(None)
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self._max_head_bytes:
            self._error = self._head_too_large()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._error = ApiError(400, f"more than {MAX_PIPELINED} requests were sent ahead")
        if self._error:
            raise self._error
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of a body."""
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A body has ended."""
        self._in_message = False
        if self not in self._strangers:
            self._wait(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """An answer has ended; it may be to a request that is coming still."""
        if self._in_message and self._deadline is None:
            self._wait(HEAD_SECONDS)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is no request, and for what is raised while one is read."""
        self._refuse(self._error or ApiError(400, msg))

    def _head_too_large(self) -> ApiError:
        return ApiError(431, f"the headers are larger than {self._max_head_bytes} bytes")

    def _refuse(self, error: ApiError) -> None:
        body = error.body()
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        self.transport.close()

    def _wait(self, seconds: float | None) -> None:
        """End the connection after so many seconds; None: no more."""
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    # --- answers ------------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The client does not take what is sent."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALLED_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._takes_again()

    def _takes_again(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()


class KeylessConnection(Connection):
    """One connection of a server that asks for no key and that somebody else starts (the chat page's): who has sent a
    head is no stranger."""

    _all: ClassVar[dict[Connection, float]] = {}

    def __init__(self, **uvicorns: Any) -> None:
        super().__init__(self._all, raise_open_files() // 2, MAX_HEAD_BYTES, **uvicorns)

    def on_headers_complete(self) -> None:
        """A head has ended."""
        self.admit()
        super().on_headers_complete()


def raise_open_files() -> int:
    """Raise how many files this process may have open; how many they are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted if soft == resource.RLIM_INFINITY else max(soft, wanted)
