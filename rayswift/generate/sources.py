"""Who answers a command: the endpoint of ``--base_url``, an own deployment, a pool of engines, a model in this process.

A deployment is a matter of `rayswift.serve`, above this room: whoever asks hands in what starts it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.cluster import address_of
from rayswift.data.names import ResolvedDataset
from rayswift.generate.media import EVERY_KIND, media_of
from rayswift.generate.model_spec import ModelSpec, model_spec
from rayswift.generate.pool import EnginePool
from rayswift.generate.transformers import TransformersEngine, load_engine
from rayswift.generate.types import Answer, AnswerSource, Endpoint, Engine, Request, SamplingParams, prompt_of
from rayswift.modeling.loading import read_config
from rayswift.modeling.resolved import ResolvedModel

if TYPE_CHECKING:
    from rayswift.generate.endpoint import EndpointEngine


def kinds_taken(model: ResolvedModel | None, engine: str) -> tuple[str, ...]:
    """The kinds of files that a model is given with an engine; None is an endpoint, which refuses what it does not
    take."""
    if model is None:
        return EVERY_KIND
    return media_of(read_config(model.folder())) if engine == "vllm" else ()


#: Serves models with the settings of a command while its context lasts: `rayswift.serve.running.running_deployment`.
Deployment = Callable[[Any, list[ModelSpec]], contextlib.AbstractContextManager[Endpoint]]


@contextlib.contextmanager
def open_endpoint(
    args: Any, specs: list[ModelSpec], deployment: Deployment, *, seed: int | None = None
) -> Iterator[EndpointEngine]:
    """The endpoint of ``--base_url``, else one that serves ``specs`` for this command and is stopped at its end.

    ``seed``: sent with each request; None leaves it to the server.

    Raises:
        UserError: the endpoint cannot be used, or the models cannot be served.
    """
    from rayswift.generate.endpoint import EndpointEngine

    if args.base_url:
        yield EndpointEngine.connect(
            args.base_url, model=args.model, api_key=key_of(args), seed=seed, system=args.system,
            agent_template=args.agent_template,
        )  # fmt: skip
        return
    with deployment(args, specs) as found:
        yield EndpointEngine.connect(
            found.base_url, model=found.model, api_key=found.api_key, seed=seed, agent_template=args.agent_template
        )


def sources_of(args: Any, model: ResolvedModel | None) -> dict[str, str]:
    """Marks of what answers (for `rayswift.journal`): the model's folders, or what the endpoint says of itself."""
    if model is not None:
        return model.sources()
    from rayswift.generate.endpoint import endpoint_sources

    return endpoint_sources("--base_url", args.base_url, args.model, key_of(args))


def key_of(args: Any) -> str | None:
    """The key of ``--base_url``, the first where a command takes several; None leaves it to the environment."""
    return (args.api_key[0] if args.api_key else None) if isinstance(args.api_key, list) else args.api_key or None


@dataclass(frozen=True)
class AnswerJob:
    """What the arguments of a command that wants answers lead to: they themselves, completed from the checkpoint; the
    model that answers (None: the endpoint of ``--base_url``); how an answer is sampled; the datasets that ask; whether
    rows have files beside their text."""

    args: Any
    model: ResolvedModel | None
    params: SamplingParams
    datasets: list[ResolvedDataset]
    has_media: bool = False


@contextlib.contextmanager
def open_engine(
    job: AnswerJob, deployment: Deployment, *, seed: int | None = None
) -> Iterator[TransformersEngine | EndpointEngine]:
    """What answers one conversation at a time."""
    if job.model is not None and job.args.infer_backend == "transformers":
        yield load_engine(job.model)
        return
    specs = [] if job.model is None else [model_spec(job.model)]
    with open_endpoint(job.args, specs, deployment, seed=seed) as endpoint:
        yield endpoint


@contextlib.contextmanager
def open_answers(
    job: AnswerJob,
    deployment: Deployment,
    one_by_one: Callable[[Engine, SamplingParams], AnswerSource] | None = None,
) -> Iterator[AnswerSource]:
    """What answers many prompts: a pool of engines on the cluster for vLLM, and for Transformers where workers or a
    cluster are named; else one engine. Files reach vLLM through a deployment, whose chat template has a place for them.

    ``one_by_one``: makes the source of one engine that answers one prompt after the other; there is no pool then.
    """
    args = job.args
    is_spread = args.infer_backend == "vllm" or (
        args.infer_backend == "transformers" and bool(args.num_workers or address_of(args))
    )
    if job.model is not None and is_spread and one_by_one is None and not job.has_media:
        yield EnginePool.start(job.model).answers
        return
    with open_engine(job, deployment, seed=args.seed) as engine:
        if one_by_one is not None:
            yield one_by_one(engine, job.params)
        elif isinstance(engine, TransformersEngine):
            yield in_batches(engine, job.params, args.max_batch_size)
        else:
            yield side_by_side(engine, job.params)


def in_batches(engine: Engine, params: SamplingParams, size: int) -> AnswerSource:
    """Batches of ``size`` prompts (−1: all at once) through a model in this process; each is answered once."""

    def answers(requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        step = max(len(requests), 1) if size == -1 else size
        for first in range(0, len(requests), step):
            batch = requests[first : first + step]
            prompts, tools = [prompt_of(one.row) for one in batch], [one.row.get("tools") for one in batch]
            found = engine.generate(prompts, params, tools)
            yield from zip((one.numbers[0] for one in batch), found, strict=True)

    return answers


def side_by_side(engine: EndpointEngine, params: SamplingParams) -> AnswerSource:
    """Requests to an endpoint, several under way at a time; each is answered once."""
    return lambda requests: engine.answers(
        ((one.numbers[0], prompt_of(one.row), one.row.get("tools")) for one in requests), params
    )
