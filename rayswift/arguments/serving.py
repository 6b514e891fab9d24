"""The settings of serving, sampling and evaluating."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg, arg_like
from rayswift.arguments.groups import ASKED_ROWS, SERVED_ELSEWHERE
from rayswift.redaction import redact

#: Rules of what only a deployment with some replicas or adapters has; those of --models say so themselves.
_SCALED = {"max_replicas=@min_replicas models=none": "only with --max_replicas above --min_replicas"}
_LORA = {"adapters=none adapter_root=none models=none": "only with --adapters or --adapter_root"}
_JUDGED = {"prm_model!=client|qwen_max": "only with --prm_model client"}
_CLIENT = {"sampler_engine!=client": "only with --sampler_engine client"}
_POOL = {"sampler_engine=client|no": "no engine is started"}
_NO_TLS = {"command=eval": "only this command asks its deployment, on 127.0.0.1"}


@dataclass(init=False, repr=False, eq=False)
class ResultArguments(Arguments):
    """Batch inference: which rows, and where the answers go."""

    topic: ClassVar[str] = "Results"

    result_path: str | None = arg(
        None, "jsonl file of the answers", shown="<checkpoint>/infer_result/<date>.jsonl", no_effect=ASKED_ROWS
    )
    write_batch_size: int = arg(
        1000, "rows between writes of the result file", ge=1, no_effect="each row is written as it is answered"
    )
    val_dataset_sample: int | None = arg(None, "rows to take from --val_dataset", ge=1, shown="all", decides="answers")
    metric: str | None = arg(None, "score the answers against the dataset's", choices=("acc", "rouge"))


@dataclass(init=False, repr=False, eq=False)
class ServerArguments(Arguments):
    """An HTTP server with OpenAI's interface, as a Ray Serve application."""

    topic: ClassVar[str] = "Server"
    no_effect: ClassVar[dict[str, str]] = SERVED_ELSEWHERE

    host: str = arg("127.0.0.1", "address to listen on; 0.0.0.0 opens it to the network")
    port: int = arg(8000, "port to listen on", ge=1, le=65535)
    num_gateways: int | None = arg(
        None, "processes that take requests in; those on one node share --port", ge=1,
        shown="1; on a cluster with --host 0.0.0.0 one on the head and on each node that has replicas",
    )  # fmt: skip
    api_key: list[str] = arg([], "keys, one of which clients must send", shown="no key", example="KEY", no_effect="")
    allowed_origins: list[str] = arg(
        [], "web pages whose scripts may ask (CORS), * for all", shown="none", example="https://chat.example.com",
        no_effect={"base_url!=none": ""},
    )  # fmt: skip
    served_model_name: str | None = arg(
        None, "name of the model for clients", shown="the last part of --model", decides="answers",
        no_effect={"eval_url!=none": ""},
    )  # fmt: skip
    owned_by: str = arg("rayswift", "owner shown by /v1/models")
    models: dict[str, Any] = arg(
        {}, "several models, as JSON or in a YAML: name to its flags", example='\'{"small": {"model": "DIR"}}\'',
        decides="answers", no_effect={"eval_url!=none": ""},
    )  # fmt: skip
    app_name: str = arg("rayswift", "name on the cluster; deploying a name again replaces its models one by one")
    adapter_root: str | None = arg(
        None, "folder or URI whose adapters are loaded when asked for", example="s3://bucket/adapters"
    )
    max_adapters: int = arg(
        16, "adapters a replica keeps loaded; the longest unused one goes first", ge=1, no_effect=_LORA
    )
    min_replicas: int = arg(1, "fewest replicas", ge=0)
    max_replicas: int | None = arg(
        None, "most replicas; above --min_replicas the number follows the load", ge=1, shown="--min_replicas"
    )
    target_ongoing_requests: int | None = arg(
        None, "requests per replica to aim for when scaling", ge=1, no_effect=_SCALED,
        shown="a quarter of --vllm_max_num_seqs; 8 on CPUs",
    )  # fmt: skip
    max_ongoing_requests: int | None = arg(
        None, "most requests at once per replica; the others wait", ge=1, shown="--vllm_max_num_seqs"
    )
    max_queued_requests: int | None = arg(
        None, "most requests that wait; further ones get 429", ge=1, shown="twice what all replicas take at once"
    )
    queue_timeout: int = arg(300, "seconds a request may wait for a replica before it gets 503", ge=1)
    upscale_delay: int = arg(10, "seconds of more load before a replica is added", ge=0, no_effect=_SCALED)
    downscale_delay: int = arg(300, "seconds of less load before a replica is stopped", ge=0, no_effect=_SCALED)
    drain_timeout: int = arg(600, "seconds that running requests may take when a replica stops", ge=0)
    ssl_keyfile: str | None = arg(None, "key of the TLS certificate", no_effect=_NO_TLS)
    ssl_certfile: str | None = arg(None, "TLS certificate", no_effect=_NO_TLS)
    max_logprobs: int = arg(
        20, "most alternatives per token a client may ask for", ge=0,
        no_effect={"engine=transformers": "only with the vLLM engine"},
    )  # fmt: skip
    log_interval: int = arg(
        20, "seconds between lines with requests and tokens/s", ge=1,
        no_effect={"command=app|eval": "only rayswift deploy writes such lines"},
    )  # fmt: skip
    log_level: str = arg(
        "info",
        "what the server logs",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
        no_effect="LOG_LEVEL in the environment says what is logged",
    )
    verbose: bool = arg(False, "log each request", no_effect={"engine=transformers": "only with the vLLM engine"})
    dry_run: bool = arg(
        False, "print the Ray Serve configuration and stop",
        no_effect={"command=app|eval": "only with rayswift deploy"},
    )  # fmt: skip

    def problems(self) -> Iterator[str]:
        if not all(key.strip() for key in self.api_key):
            yield "--api_key is empty (a variable that is not set?): give a key, or leave the flag out for none"
        for name in ("vllm_engine_kwargs", "vllm_speculative_config"):
            if redact(given := getattr(self, name, {})) != given:
                yield (f"--{name} holds a secret, which Ray Serve would show with the deployment's settings: set it in "
                       "the environment of the nodes, for example HF_TOKEN")  # fmt: skip
        if self.max_replicas is not None and self.max_replicas < self.min_replicas:
            yield f"--max_replicas {self.max_replicas} is below --min_replicas {self.min_replicas}: change one"
        for name, flags in self.models.items():
            if not isinstance(flags, dict):
                yield f"--models: {name} is {flags!r}, expected the flags of that model, for example {{'model': 'DIR'}}"
        for origin in self.allowed_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                yield (f"--allowed_origins {origin}: expected * or scheme://host[:port] without a path, for example "
                       "https://chat.example.com")  # fmt: skip
        if bool(self.ssl_keyfile) != bool(self.ssl_certfile):
            yield "--ssl_keyfile and --ssl_certfile belong together: give both"
        for flag in ("ssl_keyfile", "ssl_certfile"):
            path = getattr(self, flag)
            if path and not os.path.isfile(path):
                yield f"--{flag} {path}: no such file"

    def remarks(self) -> Iterator[str]:
        if not self.api_key and self.host not in ("127.0.0.1", "localhost", "::1"):
            yield f"--host {self.host} without --api_key: whoever reaches this machine may use the model"

    def resolve(self) -> None:
        if self.max_replicas is None:
            self.max_replicas = max(1, self.min_replicas)


@dataclass(init=False, repr=False, eq=False)
class EndpointArguments(Arguments):
    """A model that is served already, by any server with OpenAI's interface."""

    topic: ClassVar[str] = "Endpoint"
    decides: ClassVar[str] = "answers"

    base_url: str | None = arg(
        None, "endpoint to talk to; --model is then a name it serves", shown="none", example="http://127.0.0.1:8000/v1"
    )
    api_key: str | None = arg(
        None, "key of the endpoint", shown="OPENAI_API_KEY", example="KEY", decides="",
        no_effect={"base_url=none": "only with --base_url"},
    )  # fmt: skip

    def problems(self) -> Iterator[str]:
        yield from endpoint_problems(self)


def endpoint_problems(args: Any) -> Iterator[str]:
    """What is wrong with ``--base_url`` and the flags beside it."""
    if not args.base_url:
        return
    if not args.base_url.startswith(("http://", "https://")):
        yield f"--base_url {args.base_url}: expected an address such as http://127.0.0.1:8000/v1"
    if args.adapters:
        yield "--adapters: the endpoint of --base_url loads its own; name one of those it serves with --model"


@dataclass(init=False, repr=False, eq=False)
class WebPageArguments(Arguments):
    """The chat page."""

    topic: ClassVar[str] = "Web page"

    base_url: str | None = arg_like(EndpointArguments, "base_url", None, shown="one is started")
    lang: str = arg("en", "language of the page", choices=("en", "zh"))
    studio_title: str | None = arg(None, "title of the page", shown="the model's name")
    is_multimodal: bool | None = arg(None, "whether the model takes images", shown="found from the model")
    server_name: str = arg("127.0.0.1", "address the page listens on")
    server_port: int = arg(7860, "port the page listens on", ge=1, le=65535)
    share: bool = arg(False, "make a public link, through Gradio's servers")

    def problems(self) -> Iterator[str]:
        yield from endpoint_problems(self)


@dataclass(init=False, repr=False, eq=False)
class SamplingArguments(Arguments):
    """Sampling many answers per prompt and keeping the best."""

    topic: ClassVar[str] = "Sampling"

    sampler_type: str = arg(
        "sample", "sample, or distil from a stronger model", choices=("sample", "distill"), decides="answers",
        no_effect=_CLIENT,
    )  # fmt: skip
    sampler_engine: str = arg(
        "transformers",
        "engine that samples; no scores --cache_files only",
        value_aliases={"pt": "transformers"},
        choices=("transformers", "vllm", "lmdeploy", "no", "client"),
        decides="answers",
    )
    num_return_sequences: int = arg(64, "answers per prompt", ge=1, decides="answers")
    n_best_to_keep: int = arg(
        5, "best answers per prompt to keep", ge=1,
        no_effect={"orm_model=none prm_model=none": "only with --orm_model or --prm_model: every answer is kept"},
    )  # fmt: skip
    num_sampling_batch_size: int = arg(
        1, "prompts per batch", ge=1, decides="answers",
        no_effect={"sampler_engine!=transformers num_sampling_batches=none": "only with --num_sampling_batches"},
    )  # fmt: skip
    num_sampling_batches: int | None = arg(None, "batches to sample", ge=1, shown="all", decides="answers")
    orm_model: str | None = arg(None, "outcome reward: accuracy, math, gsm8k, format, ... or a model", decides="scores")
    prm_model: str | None = arg(None, "process reward: a registered name or a model", decides="scores")
    prm_threshold: float = arg(
        0.0, "least process reward of an answer to keep", no_effect={"prm_model=none": "only with --prm_model"}
    )
    easy_query_threshold: float | None = arg(
        None, "drop prompts with a larger share of right answers", ge=0, le=1,
        no_effect={"orm_model=none": "only with --orm_model"},
    )  # fmt: skip
    data_range: list[int] = arg([], "part I of N of the prompts: --data_range I N, I from 0", ge=0, decides="answers")
    cache_files: list[str] = arg([], "answers sampled before", decides="answers")
    engine_kwargs: dict[str, Any] = arg(
        {}, "further engine settings, as JSON: vLLM's, the model's, or fields of a client's requests", decides="answers"
    )
    output_dir: str = arg("sample_output", "folder of the results")
    output_file: str | None = arg(None, "name of the result file, .jsonl or .parquet", shown="<date>.jsonl")
    override_exist_file: bool = arg(False, "write over an existing result file")
    resume: bool = arg(
        False, "go on with the newest unfinished run of the same settings in --output_dir",
        no_effect={"output_file!=none": "--output_file says which run goes on"},
    )  # fmt: skip
    min_replicas: int | None = arg(None, "fewest engines", ge=1, shown="one per GPU, else 1", no_effect=_POOL)
    max_replicas: int | None = arg(
        None, "most engines; they come and go with the work", ge=1, shown="--min_replicas", no_effect=_POOL
    )
    max_requests_per_minute: int | None = arg(
        None, "rate limit of --sampler_engine client", ge=1, shown="none", no_effect=_CLIENT
    )
    max_parallel_requests: int = arg(
        32, "requests under way at a time with --sampler_engine client", ge=1,
        no_effect={
            "sampler_engine!=client prm_model!=client|qwen_max":
                "only with --sampler_engine client or --prm_model client",
        },
    )  # fmt: skip
    judge_base_url: str | None = arg(
        None, "endpoint of --prm_model client", example="http://127.0.0.1:8000/v1", decides="scores", no_effect=_JUDGED
    )
    judge_model: str | None = arg(
        None, "model that judges there", shown="the first it serves", decides="scores", no_effect=_JUDGED
    )
    judge_max_tokens: int = arg(1024, "longest judgement, in tokens", ge=1, decides="scores", no_effect=_JUDGED)
    judge_api_key: str | None = arg(
        None, "key of that endpoint", shown="OPENAI_API_KEY", example="KEY", no_effect=_JUDGED
    )

    def problems(self) -> Iterator[str]:
        shard = self.data_range
        if shard and (len(shard) != 2 or not shard[0] < shard[1]):
            yield "--data_range: expected I N with 0 <= I < N, for example --data_range 0 4"
        if self.output_file and (
            os.path.basename(self.output_file) != self.output_file
            or not self.output_file.endswith((".jsonl", ".parquet"))
        ):
            yield (f"--output_file {self.output_file}: expected a file name ending in .jsonl or .parquet; the folder "
                   "is --output_dir")  # fmt: skip
        if self.sampler_engine == "no" and not self.cache_files:
            yield "--sampler_engine no needs --cache_files: without an engine only earlier answers can be scored"
        if self.max_replicas is not None and self.max_replicas < (self.min_replicas or 1):
            yield f"--max_replicas {self.max_replicas} is below --min_replicas {self.min_replicas}: change one"
        if self.prm_model == "client" and not self.judge_base_url:
            yield "--prm_model client needs --judge_base_url, for example --judge_base_url http://127.0.0.1:8000/v1"


def read_folder(raw: Any) -> str | None:
    """SWIFT's ``true`` (its folder ``data``) or ``false``, or the name of a folder."""
    text = str(raw).strip()
    return {"true": "data", "false": None}.get(text.lower(), text)


@dataclass(init=False, repr=False, eq=False)
class BenchmarkArguments(Arguments):
    """Benchmarks over an endpoint."""

    topic: ClassVar[str] = "Benchmarks"
    decides: ClassVar[str] = "answers"

    eval_dataset: list[str] = arg(
        [], "benchmarks, by the backend's names", aliases=("eval_datasets",), example="gsm8k arc"
    )
    eval_backend: str = arg(
        "Native",
        "who runs them: EvalScope, one of the two toolkits through it, or lm-evaluation-harness",
        choices=("Native", "OpenCompass", "VLMEvalKit", "lm-eval"),
        value_aliases={"lm_eval": "lm-eval"},
    )
    eval_limit: int | None = arg(None, "rows per benchmark (and subset)", ge=1, shown="all")
    eval_base: bool = arg(
        False, "with --adapters: evaluate the model without them too, side by side",
        no_effect={"eval_url!=none": SERVED_ELSEWHERE["eval_url!=none"]},
    )  # fmt: skip
    eval_dataset_args: dict[str, Any] = arg({}, "settings of each benchmark, as JSON", aliases=("eval_datasets_args",))
    eval_generation_config: dict[str, Any] = arg({}, "settings of generation, as JSON")
    eval_output_dir: str = arg("eval_output", "folder of the results", decides="")
    eval_num_proc: int = arg(16, "requests at a time", ge=1, decides="")
    eval_url: str | None = arg(None, "endpoint to evaluate", shown="one is started", example="http://127.0.0.1:8000/v1")
    extra_eval_args: dict[str, Any] = arg({}, "further settings of the backend, as JSON")
    local_dataset: str | None = arg(
        None,
        "folder that the benchmarks are taken from (true: data)",
        parse=read_folder,
        shown="the hub",
        example="DIR",
    )

    def problems(self) -> Iterator[str]:
        if not self.eval_dataset:
            yield "--eval_dataset is required, for example --eval_dataset gsm8k"
        if self.eval_base and not getattr(self, "adapters", None):
            yield "--eval_base true needs --adapters: without them there is only the model itself"
