"""Engines, Ray Data, Serve, hubs and servers that record what they are asked, in place of the real ones: everything up
to them is what a command does. Nothing is started."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from observed_serving import prompts, serve_here

Record = dict[str, Any]


class Rows:
    """A dataset of Ray Data, in this process."""

    def __init__(self, rows: Iterable[Any], seen: Record) -> None:
        self.rows, self.seen = list(rows), seen

    def flat_map(self, each: Callable[[Any], list[Any]], **_: Any) -> Rows:
        return Rows((one for row in self.rows for one in each(row)), self.seen)

    def map_batches(
        self, worker: Any, *, fn_constructor_args: Any, batch_size: int, compute: Any, **needs: Any
    ) -> Rows:
        import pyarrow as pa

        self.seen["pool"] = [batch_size, vars(compute), needs]
        run = worker(*fn_constructor_args)
        batches = [self.rows[first : first + batch_size] for first in range(0, len(self.rows), batch_size)]
        return Rows((row for batch in batches for row in run(pa.Table.from_pylist(batch)).to_pylist()), self.seen)

    def iter_rows(self) -> Iterator[Any]:
        from ray.data import DataContext

        self.seen["nodes"] = DataContext.get_current().execution_options.label_selector
        return iter(self.rows)


def ray_data(seen: Record) -> Iterator[Any]:
    """Ray Data, and its processor for vLLM, which answers with how much it was asked."""
    import ray.data
    import ray.data.llm

    from rayswift import private
    from rayswift.generate import pool, vllm_pool

    def build_processor(config: Any, *, preprocess: Any, postprocess: Any, **_: Any) -> Any:
        seen["vllm"] = config

        def answer(row: Any) -> Any:
            asked = {**row, **preprocess(row)}
            seen.setdefault("vllm asks", []).append(asked)
            if asked[vllm_pool.ERROR]:
                return asked
            ids = asked["tokenized_prompt"]
            logprobs = asked["sampling_params"]["logprobs"] is not None
            return postprocess({
                **asked, "generated_text": f"told {len(ids)}", "num_input_tokens": len(ids), "generated_tokens": [],
                "num_generated_tokens": 2, "logprobs": [] if logprobs else None, "time_taken_llm": 0.0,
            })  # fmt: skip

        return lambda rows: Rows(map(answer, rows.rows), seen)

    def from_arrow(tables: Any) -> Rows:
        seen["blocks"] = [table.num_rows for table in tables]
        return Rows((row for table in tables for row in table.to_pylist()), seen)

    yield mock.patch.object(ray.data, "from_arrow", from_arrow)
    yield mock.patch.object(ray.data.llm, "build_processor", build_processor)
    yield mock.patch.object(private, "retry_engine_blocks")
    yield mock.patch.object(pool, "node_kinds", return_value=())
    yield mock.patch.object(vllm_pool, "resolve_on_every_node", lambda spec, token: spec.resolve_model(token))


def transformers(seen: Record) -> Iterator[Any]:
    """The Transformers engine without a model in it, which answers with what it was asked."""
    from transformers import GenerationConfig

    from rayswift.generate import pool
    from rayswift.generate import transformers as engines
    from rayswift.generate.transformers import TransformersEngine, context_length
    from rayswift.generate.types import Answer

    def load(encoder: Any, adapter: str | None = None, **how: Any) -> Any:
        seen["loaded"] = [encoder.model_dir, encoder.trust_remote_code, adapter, how]
        model = SimpleNamespace(generation_config=GenerationConfig())
        return TransformersEngine(model, encoder, context_length(encoder, how["model_kwargs"]))

    def ask(self: Any, prompts: list[list[int]], params: Any) -> list[Answer]:
        how = [vars(self.sampling(params, 1)), self.generation_config(params, 1).num_beams,
               self._text_stop_words(params)]  # fmt: skip
        seen.setdefault("asked", []).append([prompts, how])
        answers = [self._answer_of(prompt, prompt[-1:], params) for prompt in prompts]
        for prompt, answer in zip(prompts, answers, strict=True):
            answer.text += f"told {len(prompt)}"
            answer.logprobs = {"content": []} if params.logprobs else None
        return answers

    def stream(self: Any, messages: Any, params: Any, tools: Any = None) -> Iterator[str]:
        seen["streams"] = True
        (self.last_stream,) = ask(self, [self.prompt_ids(messages, tools)], params)
        yield self.last_stream.text

    yield mock.patch.object(TransformersEngine, "load", load)
    yield mock.patch.object(TransformersEngine, "_answer", ask)
    yield mock.patch.object(TransformersEngine, "_search", ask)
    yield mock.patch.object(TransformersEngine, "stream", stream)
    for owner in (engines, pool):
        yield mock.patch.object(owner, "seed_everything", lambda seed: seen.update(seed=seed))


class Client:
    """OpenAI's client, of a server that calls a tool and thinks beforehand."""

    def __init__(self, seen: Record, **how: Any) -> None:
        self.seen, self.how, self.base_url = seen, how, how["base_url"]
        seen.setdefault("clients", []).append(str(how))
        card = SimpleNamespace(id="served", model_dump=lambda: {"id": "served"})
        self.models = SimpleNamespace(list=lambda: [card])
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def with_options(self, **how: Any) -> Client:
        return Client(self.seen, **{**self.how, **how})

    @contextlib.contextmanager
    def _pieces(self, choice: Any, usage: Any) -> Iterator[Any]:
        choice.delta = choice.message
        for number, call in enumerate(choice.delta.tool_calls):
            call.index = number
        yield [SimpleNamespace(choices=[choice], usage=usage)]

    def create(self, **body: Any) -> Any:
        self.seen.setdefault("asked", []).append([self.base_url, self.how["api_key"], body])
        call = SimpleNamespace(function=SimpleNamespace(name="look", arguments="{}"))
        size = len(json.dumps(body["messages"]))
        count = body.get("extra_body", {}).get("n", 1)
        choices = [
            SimpleNamespace(finish_reason="stop", logprobs=None, message=SimpleNamespace(
                content=f"Reward: 0.{(size + number) % 7}", tool_calls=[call],
                function_call=None, refusal=None, reasoning="a thought"))
            for number in range(count)
        ]  # fmt: skip
        usage = SimpleNamespace(prompt_tokens=size, completion_tokens=2)
        if body.get("stream"):
            return self._pieces(choices[0], usage)
        return SimpleNamespace(choices=choices, usage=usage)


def servers(seen: Record) -> Iterator[Any]:
    """Servers with OpenAI's interface; requests go one after the other."""
    from rayswift.generate import endpoint
    from rayswift.sampling import engines

    def in_parallel(calls: Any, most: int) -> Iterator[Any]:
        seen["parallel"] = most
        return ((key, call()) for key, call in calls)

    def limit(per_minute: Any) -> Any:
        seen["limit"] = per_minute
        return SimpleNamespace(wait=lambda: None)

    yield mock.patch("openai.OpenAI", lambda **how: Client(seen, **how))
    yield mock.patch.object(endpoint, "in_parallel", in_parallel)
    yield mock.patch.object(engines, "RateLimit", limit)


def hubs(seen: Record, files: Path) -> Iterator[Any]:
    """Hubs that have every model and every dataset: ``model`` and ``hub_rows`` of ``files``."""
    from rayswift.hub.clients import HuggingFace, ModelScope

    def listing(repo: Any) -> Any:
        seen.setdefault("hubs", []).append([repo.title, repo.kind, repo.name, repo.revision, repo.token])
        folder = files / ("model" if repo.kind == "model" else "hub_rows")
        return "", {path.name: (path.stat().st_size, "x") for path in folder.iterdir() if path.is_file()}

    def download(repo: Any, _: Any) -> str:
        return str(files / ("model" if repo.kind == "model" else "hub_rows"))

    for hub in (HuggingFace, ModelScope):
        yield mock.patch.object(hub, "listing", listing)
        yield mock.patch.object(hub, "download", download)
        yield mock.patch.object(hub, "cache_dir", return_value="hub")  # below the folder that is worked in
        yield mock.patch.object(hub, "offline", return_value=False)


@contextlib.contextmanager
def everything_here(seen: Record, files: Path) -> Iterator[None]:
    """All of them, and no cluster."""
    from rayswift import cluster
    from rayswift.serve import running

    connect, serve = cluster.connect, running.deployment

    def connected(args: Any) -> Any:
        seen["address"] = cluster.address_of(args)
        return connect(args)

    def deployment(settings: Any, specs: Any) -> Any:
        seen["prompts"] = [prompts(spec.encoders(spec.model)[""]) for spec in specs]
        return serve(settings, specs)

    with contextlib.ExitStack() as stack:
        for part in (ray_data(seen), transformers(seen), servers(seen), hubs(seen, files)):
            for patch in part:
                stack.enter_context(patch)
        stack.enter_context(mock.patch.object(cluster, "connect", connected))
        stack.enter_context(mock.patch.object(running, "deployment", deployment))
        stack.enter_context(mock.patch.object(running, "free_port", lambda _, port: port))
        # The folder that is worked in names a deployment; it is another each time.
        stack.enter_context(mock.patch.object(running, "os", SimpleNamespace(getcwd=lambda: "")))
        stack.enter_context(serve_here(seen))
        yield
    shutil.rmtree("hub", ignore_errors=True)
