"""lm-eval's client of an endpoint, with what it lacks: a refused request is not sent again, and no key in its log."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI

from rayswift.errors import one_line

#: Refusals that pass: too slow, in conflict, too early, too many at a time.
_PASSING = (408, 409, 425, 429)


class RefusedRequest(BaseException):
    """The endpoint will never answer this request. No ``Exception``: those lm-eval tries again."""


class Client(LocalCompletionsAPI):
    """Asks ``/v1/completions``. ``asked``, ``answered``: how many requests so far."""

    asked = 0
    answered = 0

    async def get_batched_requests(self, requests: list[Any], *args: Any, **options: Any) -> Any:
        self.asked += len(requests)
        return await super().get_batched_requests(requests, *args, **options)

    async def amodel_call(self, session: Any, *args: Any, **options: Any) -> Any:
        answers = await super().amodel_call(_Session(session), *args, **options)
        self.answered += 1
        return answers


class _Session:
    """An aiohttp session whose errors say what the endpoint said. aiohttp's own, which lm-eval writes to its log,
    hold the request's headers: the key."""

    def __init__(self, session: Any) -> None:
        self._session = session

    @contextlib.asynccontextmanager
    async def post(self, *args: Any, **options: Any) -> AsyncIterator[Any]:
        async with self._session.post(*args, **options) as response:
            if not response.ok:
                why = f"HTTP {response.status}: {one_line(Exception(await response.text()))[:300]}"
                final = 400 <= response.status < 500 and response.status not in _PASSING
                raise RefusedRequest(why) if final else ConnectionError(why)
            yield response
