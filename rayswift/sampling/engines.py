"""Who answers: a pool of engines on the cluster, or an endpoint."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from rayswift.errors import UserError
from rayswift.generate.pool import EnginePool
from rayswift.generate.types import Answer, EngineUnusable, Request, SamplingParams
from rayswift.modeling.resolved import resolve_model

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments
    from rayswift.generate.endpoint import EndpointEngine

#: Gets requests and answers each of their numbers once, in any order.
Answers = Callable[[Sequence[Request]], Iterator[tuple[int, Answer]]]
#: Most answers that OpenAI's interface gives to one request.
_MOST_CHOICES = 128


@contextlib.contextmanager
def open_answers(args: SampleArguments) -> Iterator[Answers]:
    """What ``--sampler_engine`` names.

    Raises:
        UserError: the engine or the endpoint cannot be used.
    """
    if args.sampler_engine != "client":
        yield EnginePool.start(resolve_model(args)).answers
        return
    from rayswift.generate.endpoint import EndpointEngine

    engine = EndpointEngine.connect(args.base_url or "", model=args.model, api_key=args.api_key, seed=args.seed)
    engine.parallel = args.max_parallel_requests
    engine.with_thoughts = args.sampler_type == "distill"
    limit = RateLimit(args.max_requests_per_minute)
    yield Client(engine.patient(), SamplingParams.from_arguments(args), limit, args.engine_kwargs).answers


@dataclass
class RateLimit:
    """At most so many turns a minute, evenly spread; None is no limit."""

    per_minute: int | None
    _next: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self) -> None:
        """Return when it is this caller's turn."""
        if self.per_minute is None:
            return
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + 60 / self.per_minute
        time.sleep(max(0.0, turn - time.monotonic()))


@dataclass
class Client:
    """Answers from an endpoint, all answers to a prompt with one request where the server gives several."""

    engine: EndpointEngine
    settings: SamplingParams
    limit: RateLimit
    fields: dict[str, Any]
    most_choices: int = _MOST_CHOICES

    def answers(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """Answer every number of the requests, several requests at a time. EngineUnusable when the endpoint fails."""
        from rayswift.generate.endpoint import in_parallel

        calls = ((request, partial(self.ask, request)) for request in requests)
        for request, answers in in_parallel(calls, self.engine.parallel):
            yield from zip(request.numbers, answers, strict=True)

    def ask(self, request: Request) -> list[Answer]:
        """One answer for each number of the request; a server that gives fewer is asked again."""
        answers: list[Answer] = []
        while (left := len(request.numbers) - len(answers)) > 0:
            try:
                answers += self.choices(request, min(left, self.most_choices), request.seeds[len(answers)])
            except EngineUnusable:
                raise
            except UserError as error:
                answers += [Answer(error=str(error))] * left
        return answers

    def choices(self, request: Request, count: int, seed: int) -> list[Answer]:
        """At most ``count`` answers from one request; one from a server that does not know ``n``."""
        ask = partial(self.engine.choices, request.row["messages"], self.settings, request.row.get("tools"), seed=seed)
        self.limit.wait()
        try:
            return ask(**self.fields, **({"n": count} if count > 1 else {}))[:count]
        except EngineUnusable:
            raise
        except UserError:
            if count == 1:
                raise
        self.limit.wait()
        answers = ask(**self.fields)[:1]
        self.most_choices = 1  # it was n that the server did not like
        return answers
