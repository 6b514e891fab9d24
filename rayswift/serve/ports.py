"""Ports to listen on: a taken one is noticed before anything expensive starts."""

from __future__ import annotations

import contextlib
import socket

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
