"""Ports to listen on (a taken one is noticed before anything expensive starts), and an app on one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Any

from rayswift.errors import UserError

PORTS_TRIED = 100


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there now."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just closed is free
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def require_free_port(host: str, port: int, flag: str) -> None:
    """UserError when something listens on ``port`` already: by which process, and which port is free."""
    if is_free(host, port):
        return
    if is_free(host, 0):
        free = free_port(host, port + 1)
        offer = f"; {flag} {free} is free" if free else ""
        raise UserError(f"{flag} {port}: already in use{owner_of(port)}{offer}")
    raise UserError(f"{flag} {port}: {host} is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all")


def free_port(host: str, start: int) -> int | None:
    """The first free port from ``start`` on; None where there is none near."""
    return next((port for port in range(start, min(start + PORTS_TRIED, 65536)) if is_free(host, port)), None)


def owner_of(port: int) -> str:
    """`` by NAME (process PID)`` where the system tells."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (process {connection.pid})"
    return ""


def bind(host: str, port: int = 0, *, shared: bool = False) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises OSError where the port is taken.

    Args:
        shared: other processes may listen there in the same way; each connection goes to one of them.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


async def run_http(app: Any, sock: socket.socket, *, max_head_bytes: int | None = None, **options: Any) -> Any:
    """Serve ``app`` on ``sock`` in this event loop until the returned server's ``should_exit`` is set.

    Args:
        max_head_bytes: of a request's line and headers; None: as much as clients need.
    """
    import uvicorn

    from rayswift.serve.connections import MAX_HEAD_BYTES, BoundedServer

    # Anybody can send what it warns of, as often as he likes.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, date_header=False, lifespan="off", ws="none",
        timeout_keep_alive=75, **options,
    )  # fmt: skip
    server = BoundedServer(config, max_head_bytes or MAX_HEAD_BYTES)
    task = asyncio.ensure_future(server.serve(sockets=[sock]))
    while not server.started and not task.done():
        await asyncio.sleep(0.01)
    if task.done():
        task.result()
    server.task = task  # type: ignore[attr-defined]  # keeps the task alive as long as the server
    return server
