"""What ``infer``, ``sample``, ``app`` and ``eval`` make of their arguments: who is asked what and how, what is written."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from observed_serving import ASKED, TOOLS, plan

from rayswift.arguments import Arguments


@contextlib.contextmanager
def new_folder(seen: dict[str, Any]) -> Iterator[None]:
    """Work in an empty folder; what is written there is seen, dates left out."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    name = re.sub(r"\d{6,}|\d+-\d+", "N", str(path.relative_to(folder)))
                    seen[f"file {name}"] = path.read_bytes().decode("utf-8", "replace").replace(folder, "")
        finally:
            os.chdir(before)


def sampling(engine: Any, params: Any) -> Any:
    """What an answer's tokens are chosen by."""
    found = engine.sampling(params, 1)
    beams = engine.generation_config(params, 1).num_beams
    return [vars(found), beams, engine._text_stop_words(params)]


@contextlib.contextmanager
def no_engines(seen: dict[str, Any]) -> Iterator[None]:
    """Engines are planned and asked, and answer what they are asked."""
    from transformers import GenerationConfig

    from rayswift.generate import endpoint, pool, transformers, vllm_pool
    from rayswift.generate.transformers import TransformersEngine, context_length
    from rayswift.generate.types import Answer

    def load(encoder: Any, adapter: str | None = None, **how: Any) -> Any:
        seen["loaded"] = [encoder.model_dir, encoder.trust_remote_code, adapter, how]
        model = SimpleNamespace(generation_config=GenerationConfig())
        return TransformersEngine(model, encoder, context_length(encoder))

    def generate(self: Any, conversations: Any, params: Any, tools: Any = None) -> list[Answer]:
        seen["sampling"] = sampling(self, params)
        seen.setdefault("batches", []).append(len(conversations))
        texts = [str(self.prompt_ids(one, each)) for one, each in zip(conversations, tools, strict=True)]
        return [Answer(self.encoder.response_prefix or "" + text, logprobs=params.logprobs or None) for text in texts]

    def stream(self: Any, messages: Any, params: Any, tools: Any = None) -> Iterator[str]:
        seen["streams"] = sampling(self, params)
        self.last_stream = Answer(str(self.prompt_ids(messages, tools)))
        yield self.last_stream.text

    def answers(self: Any, requests: Any) -> Iterator[tuple[int, Answer]]:
        seen["pool"] = [
            self.model.args.address,
            self.size,
            self.spec.bundles,
            self.spec.env_vars,
            [one.seeds for one in requests],
        ]
        if self.spec.engine == "vllm":
            self.answered(mock.MagicMock(), 1)
            ask = seen.pop("ask")
            seen["vllm asks"] = [ask({**pool.request_row(one), "seed": -1}) for one in requests]
            texts = ["" for _ in requests]
        else:
            seen["pool batch"] = self.batch_size
            engine = transformers.load_engine(self.model)
            params = pool.SamplingParams.from_arguments(self.model.args)
            texts = [generate(engine, [one.row["messages"]], params, [None])[0].text for one in requests]
        for request, text in zip(requests, texts, strict=True):
            yield from ((number, Answer(f"{text} {number}")) for number in request.numbers)

    def connect(base_url: str, **about: Any) -> Any:
        seen.setdefault("endpoints", []).append([base_url, about])
        given = {name: about[name] for name in ("seed", "system") if name in about}
        made = endpoint.EndpointEngine(mock.MagicMock(), about.get("model") or "first", **given)
        made.patient = lambda: made  # type: ignore[method-assign]
        return made

    def choices(self: Any, messages: Any, params: Any, tools: Any = None, **fields: Any) -> list[Answer]:
        limit = getattr(getattr(self.turn, "__self__", None), "per_minute", None)
        asks = [self.request(messages, params, tools), fields, self.parallel, self.with_thoughts, limit]
        seen.setdefault("asks", []).append(str(asks))
        return [Answer(f"Reward: 0.{len(str(messages)) % 7} {number}") for number in range(fields.get("n", 1))]

    def build_processor(config: Any, *, preprocess: Any, **_: Any) -> Any:
        seen["vllm"], seen["ask"] = config, preprocess
        return mock.MagicMock()

    llm = SimpleNamespace(build_processor=build_processor, vLLMEngineProcessorConfig=lambda **how: how)
    with (
        mock.patch.object(TransformersEngine, "load", load), mock.patch.object(TransformersEngine, "generate", generate),
        mock.patch.object(TransformersEngine, "stream", stream), mock.patch.object(pool.EnginePool, "answers", answers),
        mock.patch.object(transformers, "seed_everything", lambda seed: seen.update(seed=seed)),
        mock.patch.object(endpoint.EndpointEngine, "connect", connect),
        mock.patch.object(endpoint.EndpointEngine, "choices", choices),
        mock.patch.object(endpoint, "endpoint_sources", lambda *_: {}),
        mock.patch.object(vllm_pool, "resolve_on_every_node", lambda spec, token: spec.resolve_model(token)),
        mock.patch.object(vllm_pool.private, "retry_engine_blocks", lambda *_: None),
        mock.patch.dict(sys.modules, {"ray.data.llm": llm}),  # type: ignore[dict-item]
        mock.patch("sys.stdin", open(os.devnull, encoding="utf-8")),
        contextlib.redirect_stdout(None), contextlib.redirect_stderr(open(os.devnull, "w", encoding="utf-8")),
    ):  # fmt: skip
        yield


def observed(work: Callable[[Any, dict[str, Any]], Any]) -> Callable[[Arguments], Any]:
    """An observer: what a command asks for, returns and writes."""

    def observe(args: Arguments) -> Any:
        seen: dict[str, Any] = {}
        with new_folder(seen), no_engines(seen), served(seen):
            seen["returned"] = work(args, seen)
        return seen

    return observe


def infer(args: Any, seen: dict[str, Any]) -> Any:
    from rayswift.inference import command

    def chat(engine: Any, params: Any, *, stream: bool) -> None:
        seen["stream"] = stream
        engine.generate([ASKED], params, [TOOLS])

    with mock.patch.object(command, "chat", chat):
        return command.infer(args)


def sample(args: Any, seen: dict[str, Any]) -> Any:
    from rayswift.sampling.run import sample

    return {key: value for key, value in sample(args).items() if key not in ("output_file", "tokens/s")}


@contextlib.contextmanager
def served(seen: dict[str, Any]) -> Iterator[None]:
    """A command's own deployment is planned, and answers at an address."""
    from rayswift.serve import running

    @contextlib.contextmanager
    def deployment(settings: Any, specs: Any) -> Iterator[None]:
        seen["deployment"] = plan(settings)
        yield

    with (
        mock.patch.object(running, "deployment", deployment),
        mock.patch.object(running, "free_port", lambda _, port: port),
    ):
        yield


def app(args: Any, seen: dict[str, Any]) -> Any:
    from rayswift.chat_page import command

    page = mock.MagicMock()
    page.launch.side_effect = lambda **how: (
        seen.update(page={key: str(value) for key, value in how.items()}) or (0, 0, 0)
    )

    def build_page(engine: Any, params: Any, **about: Any) -> Any:
        seen["built"] = [about, engine.request([dict(one) for one in ASKED], params, None)]
        return page

    middleware = lambda cls, **about: about  # noqa: E731
    with (
        mock.patch.dict(sys.modules, {"rayswift.chat_page.page": SimpleNamespace(build_page=build_page)}),  # type: ignore[dict-item]
        mock.patch.object(command, "require_free_port", lambda *_: None), mock.patch.object(command, "Middleware", middleware),
        mock.patch.object(command.private, "replace_http_protocol", lambda _: None),
        mock.patch.object(command.threading, "Event", mock.MagicMock(side_effect=None)),
    ):  # fmt: skip
        return command.app(args)


def evaluate(args: Any, seen: dict[str, Any]) -> Any:
    import json

    from rayswift.eval import evaluate as evaluation
    from rayswift.eval.backends import opencompass_vlmeval as toolkit

    def run(words: list[str], **how: Any) -> Any:
        if words[1] == "-c" and "run_task" in words[2]:
            task = json.loads(Path(words[3]).read_text())
            key = how["env"].get("OPENAI_API_KEY")
            seen["task"] = [task["eval_config"], key, how["env"].get("COMPASS_DATA_CACHE")]
            folder = Path(words[3]).parent / "1" / "summary"
            folder.mkdir(parents=True)
            (folder / "s.csv").write_text("dataset,version,metric,mode,m\nARC_c,1,accuracy,gen,62.5\n")
        return SimpleNamespace(returncode=0, stdout='\n["ARC_c", "ARC_e"]', stderr="")

    with (
        mock.patch.object(toolkit.Toolkit, "_find_python", lambda self: self.args.extra_eval_args.get("python", "py")),
        mock.patch.object(toolkit.subprocess, "run", run),
        mock.patch.object(evaluation, "open_run", lambda root, *_: contextlib.nullcontext(SimpleNamespace(path=Path(root, "run"), resumed=False, mark=lambda **_: None))),
        mock.patch.object(evaluation.time, "strftime", lambda _: "date"),
    ):  # fmt: skip
        return evaluation.evaluate(args)
