"""Requests from scripts of web pages: which pages may ask (CORS), and under which names this server is asked.

A browser sends a page's simple requests before it asks whether it may show the answer, and a page whose name its owner
points at 127.0.0.1 (DNS rebinding) is of the same origin as the server there: both are refused here.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from rayswift.serve.openai_errors import ApiError


def allow_origins(app: ASGIApp, origins: list[str], host: str | None = None) -> ASGIApp:
    """``app`` for pages of its own address and of ``origins`` (``*``: all); others are refused (403).

    Outside of all else: a browser asks first and without a key, and must be able to read refusals as well.

    Args:
        host: the address the server listens on, where it is known. On a loopback one the server goes by the names of
            this machine and of ``origins`` only; elsewhere nobody knows by which name others reach it.
    """
    if origins:
        app = CORSMiddleware(
            app, allow_origins=origins, allow_methods=["GET", "POST", "HEAD", "OPTIONS"], allow_headers=["*"],
            expose_headers=["retry-after"],
        )  # fmt: skip
    return OwnPages(app, origins=origins, host=host)


class OwnPages:
    """Middleware that refuses what a foreign page asks; the arguments are those of `allow_origins`."""

    def __init__(self, app: ASGIApp, *, origins: list[str], host: str | None = None) -> None:
        self.app = app
        self._origins = {origin.lower().rstrip("/") for origin in origins}
        self._names = {urlsplit(origin).hostname for origin in self._origins}
        self._local = host is not None and is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope)) if scope["type"] == "http" and "*" not in self._origins else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await ApiError(
                403, f"{refusal}; --allowed_origins names the pages that may", code="foreign_page"
            ).response()(scope, receive, send)

    def _refusal(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        name = host.rpartition("]")[0].removeprefix("[") or host.partition(":")[0]
        if self._local and name and not is_loopback(name) and name not in self._names:
            return f"this server is not called {name[:100]}"
        # "null" is the origin of a page without one: a file, a sandboxed frame.
        if origin and origin not in self._origins and origin.partition("://")[2] != host:
            return f"pages of {origin[:100]} may not ask this server"
        return None


def is_loopback(host: str) -> bool:
    """Whether a name or address means this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
