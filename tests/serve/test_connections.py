"""What strangers' connections and slow ones may cost: closed in time, refused by size, and never in the others' way."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from rayswift.serve import connections, request_body
from rayswift.serve.connections import MAX_HEAD_BYTES, MAX_PIPELINED, MAX_STRANGER_BYTES, admit
from rayswift.serve.openai_errors import ApiError
from rayswift.serve.ports import bind, run_http
from rayswift.serve.request_body import read_object

pytestmark = pytest.mark.anyio

HEAD = b"POST %s HTTP/1.1\r\nhost: x\r\n%s\r\n"
GOOD = HEAD % (b"/", b"authorization: KEY\r\ncontent-length: 2\r\n") + b"{}"
#: Patience with a busy machine; everything that is waited for has an end of its own.
PATIENCE = 20


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """As the gateway: a key first, then the body; ``/flood`` is a long answer."""
    try:
        if dict(scope["headers"]).get(b"authorization") != b"KEY":
            raise ApiError(401, "a key is needed")
        admit(scope)
        raw, _ = await read_object(scope, receive)
    except ApiError as error:
        await error.response()(scope, receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(200 if scope["path"] == "/flood" else 0):
        await send({"type": "http.response.body", "body": b"x" * 2**18, "more_body": True})
    await send({"type": "http.response.body", "body": b"%d bytes" % len(raw)})


Connect = Callable[..., Any]


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Connect]:
    """A server; gives what connects to it."""
    sock = bind("127.0.0.1")
    port = sock.getsockname()[1]
    server = await run_http(app, sock, **options)
    yield lambda *sent, **tls: _connect(port, *sent, **tls)
    server.should_exit = server.force_exit = True
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    async with asyncio.timeout(PATIENCE):
        await server.task


async def _connect(port: int, *sent: bytes, **tls: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, **tls)
    for piece in sent:
        writer.write(piece)
    await writer.drain()
    return reader, writer


async def answer_of(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    async with asyncio.timeout(PATIENCE):
        head = await reader.readuntil(b"\r\n\r\n")
        if b"content-length" in head:
            body = await reader.readexactly(int(head.split(b"content-length: ")[1].split()[0]))
        else:
            body = (await reader.readuntil(b"0\r\n\r\n")).split(b"\r\n")[1]
    return int(head.split()[1]), body


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the server closes."""
    found = b""
    async with asyncio.timeout(PATIENCE):
        try:
            while piece := await reader.read(2**16):
                found += piece
        except ConnectionError:
            pass
    return found


@pytest.mark.parametrize(
    "sent",
    [
        [b"GET / HTTP/1.1\r\nx: ", b"a" * MAX_HEAD_BYTES * 2],
        [b"GET /", b"a" * MAX_HEAD_BYTES, b" HTTP/1.1\r\n\r\n"],
        [b"GET / HTTP/1.1\r\n", *[b"x-%d: %s\r\n" % (number, b"a" * 9000) for number in range(8)], b"\r\n"],
        [HEAD % (b"/", b"authorization: KEY\r\ntransfer-encoding: chunked\r\n"), b"1;", *[b"a" * 2**15] * 12],
        [HEAD % (b"/", b"authorization: KEY\r\ntransfer-encoding: chunked\r\n"), b"2\r\n{}\r\n0\r\nx: ",
         *[b"a" * 2**15] * 12],
    ],
    ids=["one header", "the path", "many headers", "an extension of a chunk", "a trailer"],
)  # fmt: skip
async def test_what_is_no_body_has_a_limit(sent: list[bytes]) -> None:
    async with serving() as connect:
        reader, writer = await connect()
        for piece in sent:
            writer.write(piece)
            await asyncio.sleep(0.01)  # each comes by itself
        found = await rest_of(reader)
        assert b"431" in found.split(b"\r\n", 1)[0] or not found
        assert not found or b'"type": "invalid_request_error"' in found


async def test_a_replica_takes_the_head_of_a_resumed_stream() -> None:
    longer = HEAD % (b"/", b"authorization: KEY\r\ncontent-length: 2\r\nx: " + b"1," * MAX_HEAD_BYTES + b"\r\n") + b"{}"
    async with serving(max_head_bytes=connections.MAX_REPLICA_HEAD_BYTES) as connect:
        reader, _ = await connect(longer)
        assert await answer_of(reader) == (200, b"2 bytes")


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nx: y", HEAD % (b"/", b"content-length: 100\r\n") + b"{"])
async def test_a_stranger_has_little_time(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections, "STRANGER_SECONDS", 0.1)
    async with serving() as connect:
        reader, _ = await connect(sent)
        found = await rest_of(reader)
        assert found.startswith(b"HTTP/1.1 401") if b"length" in sent else not found


async def test_who_is_known_is_not_hurried_but_with_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STRANGER_SECONDS", 0.3)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    async with serving() as connect:
        reader, writer = await connect(GOOD)
        assert await answer_of(reader) == (200, b"2 bytes")
        await asyncio.sleep(0.5)
        writer.write(GOOD)
        assert await answer_of(reader) == (200, b"2 bytes")
        writer.write(GOOD[:20])
        assert await rest_of(reader) == b""


async def test_who_shows_a_key_is_served_however_many_connections_are_half_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "MAX_STRANGERS", 20)
    monkeypatch.setattr(connections, "SHORT_SECONDS", 0)
    async with serving() as connect:
        known, write = await connect(GOOD)
        assert (await answer_of(known))[0] == 200
        hostile = [await connect(GOOD[:30]) for _ in range(60)]
        for _ in range(3):
            reader, _ = await connect(GOOD)
            assert await answer_of(reader) == (200, b"2 bytes")
        for reader, _ in hostile[:40]:
            assert await rest_of(reader) == b""  # those that came first made room
        hostile[-1][1].write(GOOD[30:].replace(b"KEY", b"guess"))
        assert (await answer_of(hostile[-1][0]))[0] == 401
        write.write(GOOD)
        assert (await answer_of(known))[0] == 200


async def test_many_that_come_at_once_are_all_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_STRANGERS", 20)
    async with serving() as connect:
        opened = [await connect() for _ in range(60)]
        for _, writer in opened:
            writer.write(GOOD)
        assert [(await answer_of(reader))[0] for reader, _ in opened] == [200] * 60


async def test_what_follows_a_refusal_is_not_read_for_long() -> None:
    async with serving() as connect:
        reader, writer = await connect(HEAD % (b"/", b"content-length: 999999999\r\n"))
        assert (await answer_of(reader))[0] == 401
        for _ in range((MAX_HEAD_BYTES + MAX_STRANGER_BYTES) // 2**16 + 2):
            writer.write(b"a" * 2**16)
            await asyncio.sleep(0)
        assert await rest_of(reader) == b""


async def test_a_body_that_does_not_come_ends_its_request_and_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_body, "BODY_SECONDS", 0.1)
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    async with serving() as connect:
        for began in (b"", b'{"a": '):
            reader, _ = await connect(HEAD % (b"/", b"authorization: KEY\r\ncontent-length: 100\r\n") + began)
            status, body = await answer_of(reader)
            assert (status, b"did not come in time" in body) == (408, True)
            assert await rest_of(reader) == b""


async def test_few_requests_are_taken_ahead() -> None:
    async with serving() as connect:
        reader, _ = await connect(GOOD * MAX_PIPELINED)
        assert [(await answer_of(reader))[0] for _ in range(MAX_PIPELINED)] == [200] * MAX_PIPELINED
        reader, _ = await connect(GOOD * 1000)
        assert (await rest_of(reader)).count(b"HTTP/1.1 200") <= 1


async def test_a_client_that_takes_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "STALLED_SECONDS", 0.1)
    async with serving() as connect:
        reader, writer = await connect(HEAD % (b"/flood", b"authorization: KEY\r\ncontent-length: 2\r\n") + b"{}")
        writer.transport.pause_reading()
        await asyncio.sleep(0.5)
        writer.transport.resume_reading()
        found = await rest_of(reader)  # and then its end
        assert 0 < len(found) < 100 * 2**18


async def test_a_handshake_has_an_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(connections, "HANDSHAKE_SECONDS", 0.5)
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    async with serving(ssl_keyfile=str(key), ssl_certfile=str(certificate)) as connect:
        silent, _ = await connect()
        trusting = ssl.create_default_context(cafile=str(certificate))
        reader, _ = await connect(GOOD, ssl=trusting, server_hostname="localhost")
        assert await answer_of(reader) == (200, b"2 bytes")
        assert await rest_of(silent) == b""


async def test_servers_of_others_have_the_limits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Gradio starts one for the chat page, which asks for no key."""
    import uvicorn
    from uvicorn import config as uvicorn_config

    from rayswift import private

    monkeypatch.setattr(uvicorn_config, "HTTP_PROTOCOLS", dict(uvicorn_config.HTTP_PROTOCOLS))
    monkeypatch.setattr(connections, "STRANGER_SECONDS", 0.1)
    private.replace_http_protocol("rayswift.serve.connections:KeylessConnection")
    sock = bind("127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    port = sock.getsockname()[1]
    silent, _ = await _connect(port)
    reader, writer = await _connect(port, GOOD)
    assert (await answer_of(reader))[0] == 200
    assert await rest_of(silent) == b""
    writer.write(GOOD)  # it has stayed
    assert (await answer_of(reader))[0] == 200
    reader, _ = await _connect(port, b"GET / HTTP/1.1\r\nx: ", b"a" * MAX_HEAD_BYTES * 8)
    assert b"431" in (await rest_of(reader))[:20]
    server.should_exit = server.force_exit = True
    await task
