"""Who answers: a pool of engines on the cluster, or an endpoint."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rayswift.generate.model_spec import model_spec
from rayswift.generate.pool import EnginePool
from rayswift.generate.sources import open_endpoint
from rayswift.generate.types import Answer, Request, SamplingParams, prompt_of
from rayswift.modeling.resolved import resolve_model
from rayswift.serve.running import running_deployment

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments
    from rayswift.generate.endpoint import EndpointEngine

#: Gets requests and answers each of their numbers once, in any order.
Answers = Callable[[Sequence[Request]], Iterator[tuple[int, Answer]]]


@contextlib.contextmanager
def open_answers(args: SampleArguments, files: bool = False) -> Iterator[Answers]:
    """What ``--sampler_engine`` names. ``files``: prompts have some, which reach vLLM through a deployment.

    Raises:
        UserError: the engine or the endpoint cannot be used.
    """
    if args.sampler_engine != "client":
        model = resolve_model(args)
        if not files:
            yield EnginePool.start(model).answers
            return
        with open_endpoint(args, [model_spec(model)], running_deployment) as served:
            yield partial(answers_of, served.patient(), SamplingParams.from_arguments(args), {})
        return
    from rayswift.generate.endpoint import EndpointEngine

    engine = EndpointEngine.connect(
        args.base_url or "", model=args.model, api_key=args.api_key, seed=args.seed,
        agent_template=args.agent_template,
    )  # fmt: skip
    engine = replace(
        engine.patient(), parallel=args.max_parallel_requests, with_thoughts=args.sampler_type == "distill",
        turn=RateLimit(args.max_requests_per_minute).wait,
    )  # fmt: skip
    yield partial(answers_of, engine, SamplingParams.from_arguments(args), args.engine_kwargs)


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


def answers_of(
    engine: EndpointEngine, settings: SamplingParams, fields: dict[str, Any], requests: Sequence[Request]
) -> Iterator[tuple[int, Answer]]:
    """Answer every number of the requests, several requests at a time. EngineUnusable when the endpoint fails."""
    from rayswift.generate.endpoint import in_parallel

    def ask(request: Request) -> list[Answer]:
        return engine.several(prompt_of(request.row), settings, request.row.get("tools"), request.seeds, **fields)

    for request, answers in in_parallel(((each, partial(ask, each)) for each in requests), engine.parallel):
        yield from zip(request.numbers, answers, strict=True)
