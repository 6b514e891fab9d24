"""Requests from scripts of web pages (CORS): which pages may ask, as their browsers are told."""

from __future__ import annotations

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp


def allow_origins(app: ASGIApp, origins: list[str]) -> ASGIApp:
    """``app`` for pages of ``origins`` (``*``: all) too; as it is without any.

    Outside of all else: a browser asks first and without a key, and must be able to read refusals as well.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app, allow_origins=origins, allow_methods=["GET", "POST", "HEAD", "OPTIONS"], allow_headers=["*"],
        expose_headers=["retry-after"],
    )  # fmt: skip
