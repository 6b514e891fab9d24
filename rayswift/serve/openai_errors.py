"""Errors in the shape that OpenAI's clients read: ``{"error": {"message", "type", "param", "code"}}``.

``"type": "error"`` beside it is what Anthropic's clients look for: one shape serves both.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

if TYPE_CHECKING:
    from fastapi import FastAPI, Request
    from fastapi.exceptions import RequestValidationError

# OpenAI's word for each status; clients choose their exception by the status alone.
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    431: "invalid_request_error",
    422: "unprocessable_entity_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """What a client is told. ``retry_after`` in seconds becomes the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    def response(self) -> Response:
        """The answer to the client."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(self.body(), self.status, headers, "application/json")

    def body(self) -> bytes:
        """The JSON body."""
        kind = _TYPES.get(self.status, "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error, "type": "error"}, ensure_ascii=True).encode()

    def event(self) -> bytes:
        """The same as an event of a stream that had already begun."""
        return b"data: " + self.body() + b"\n\n"

    def named_event(self) -> bytes:
        """The same in a stream whose events have names (Responses, Messages): its last one."""
        flat = {"message": self.message, "param": self.param, "code": self.code}  # where Responses look
        return b"event: error\ndata: " + json.dumps(json.loads(self.body()) | flat).encode() + b"\n\n"


class RefusalBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | int | None


class Refusal(BaseModel):
    """The request cannot be served; for schemas of OpenAPI."""

    error: RefusalBody


def add_error_handlers(app: FastAPI, failure: str) -> None:
    """Have ``app`` answer every error in this shape. ``failure``: what is said where the fault is the server's."""
    from fastapi.exceptions import RequestValidationError

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"][1:])[:200]
        return ApiError(400, f"{where or 'body'}: {problem['msg']}", param=where or None).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"][:200]
        if error.status_code == 404:
            return ApiError(404, f"no such path: {path}", code="not_found").response()
        if error.status_code == 405:
            taken = ", ".join(sorted(((error.headers or {}).get("Allow") or "").split(", ")))
            return ApiError(405, f"{path} takes {taken}", code="method_not_allowed").response()
        return ApiError(error.status_code, f"{request.method} {path}: {error.detail}").response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, failure).response()
