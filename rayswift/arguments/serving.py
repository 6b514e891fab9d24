"""The settings of serving, sampling, evaluating and exporting."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg, arg_like
from rayswift.arguments.groups import SERVED_ELSEWHERE
from rayswift.redaction import redact

#: Rules of what only a deployment with some replicas or adapters has; those of --models say so themselves.
_SCALED = {"max_replicas=@min_replicas models=none": "only with --max_replicas above --min_replicas"}
_LORA = {"adapters=none adapter_root=none models=none": "only with --adapters or --adapter_root"}
_NO_TLS = {"command=eval": "only this command asks its deployment, on 127.0.0.1"}


@dataclass(init=False, repr=False, eq=False)
class ResultArguments(Arguments):
    """Batch inference: which rows, and where the answers go."""

    topic: ClassVar[str] = "Results"

    result_path: str | None = arg(None, "jsonl file of the answers", shown="<checkpoint>/infer_result/<date>.jsonl")
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
        [], "web pages whose scripts may ask (CORS), * for all", shown="none", example="https://chat.example.com"
    )
    served_model_name: str | None = arg(
        None, "name of the model for clients", shown="the last part of --model", decides="answers"
    )
    owned_by: str = arg("rayswift", "owner shown by /v1/models")
    models: dict[str, Any] = arg(
        {}, "several models, as JSON or in a YAML: name to its flags", example='\'{"small": {"model": "DIR"}}\'',
        decides="answers",
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
    log_interval: int = arg(20, "seconds between lines with requests and tokens/s", ge=1)
    log_level: str = arg(
        "info",
        "what the server logs",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
        no_effect="LOG_LEVEL in the environment says what is logged",
    )
    verbose: bool = arg(False, "log each request")
    dry_run: bool = arg(False, "print the Ray Serve configuration and stop")

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
        yield "--adapters: an endpoint loads its own adapters; name one of those it serves with --model"


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
        "sample", "sample, or distil from a stronger model", choices=("sample", "distill"), decides="answers"
    )
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
    num_sampling_batch_size: int = arg(1, "prompts per batch", ge=1, decides="answers")
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
    resume: bool = arg(False, "go on with the newest unfinished run of the same settings in --output_dir")
    min_replicas: int | None = arg(None, "fewest engines", ge=1, shown="one per GPU, else 1")
    max_replicas: int | None = arg(None, "most engines; they come and go with the work", ge=1, shown="--min_replicas")
    max_requests_per_minute: int | None = arg(None, "rate limit of --sampler_engine client", ge=1, shown="none")
    max_parallel_requests: int = arg(32, "requests under way at a time with --sampler_engine client", ge=1)
    judge_base_url: str | None = arg(
        None, "endpoint of --prm_model client", example="http://127.0.0.1:8000/v1", decides="scores"
    )
    judge_model: str | None = arg(None, "model that judges there", shown="the first it serves", decides="scores")
    judge_max_tokens: int = arg(1024, "longest judgement, in tokens", ge=1, decides="scores")
    judge_api_key: str | None = arg(None, "key of that endpoint", shown="OPENAI_API_KEY", example="KEY")

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
    eval_base: bool = arg(False, "with --adapters: evaluate the model without them too, side by side")
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


@dataclass(init=False, repr=False, eq=False)
class QuantizeArguments(Arguments):
    """Merging, quantising, converting and pushing."""

    topic: ClassVar[str] = "Export"

    output_dir: str | None = arg(None, "folder of the result", shown="beside the model, named after what was done")
    exist_ok: bool = arg(False, "write into a folder that is already there")
    merge_lora: bool = arg(False, "merge the adapter into the weights")
    quant_method: str | None = arg(
        None, "quantise the weights", choices=("awq", "gptq", "bnb", "fp8", "int8"), swift_only=("gptq_v2",)
    )
    quant_bits: int | None = arg(None, "bits per weight", ge=1, le=8, example="4", shown="4; 8 for fp8 and int8")
    quant_n_samples: int = arg(256, "rows of --dataset to calibrate with", ge=1)
    quant_batch_size: int = arg(1, "calibration rows computed together", ge=1)
    group_size: int = arg(
        128, "weights that share a scale (-1: a whole row)", ge=-1, shown="128, or the largest that divides the rows"
    )
    quant_sym: bool = arg(
        True, "gptq: levels lie evenly around zero, as vLLM needs them; false follows the weights closer"
    )
    to_cached_dataset: bool = arg(False, "encode --dataset once, for later training")
    template_mode: str = arg("train", "what the encoded dataset is for", choices=("train", "rlhf"), swift_only=("kto",))
    to_gguf: str | None = arg(
        None, "write one GGUF file (llama.cpp, Ollama) with weights of this type", value_aliases={"true": "q8_0"},
        choices=("q8_0", "f32", "f16", "bf16", "q5_1", "q5_0", "q4_1", "q4_0"),
    )  # fmt: skip
    to_ollama: bool = arg(False, "write an Ollama Modelfile (with --to_gguf, for that file)")
    ollama_num_ctx: int | None = arg(
        None, "context that the Modelfile asks for, in tokens", ge=1, shown="--max_length or the model's, 8192 at most"
    )
    to_peft_format: bool = arg(False, "convert a SWIFT adapter, or with --base_model a merged model, to a PEFT adapter")
    base_model: str | None = arg(None, "model or folder that the merged --model was fine-tuned from")
    lora_rank: int | None = arg(None, "rank of the adapter made from them", ge=1, shown="that of the model's run")
    push_to_hub: bool = arg(False, "push the result to the hub")
    hub_model_id: str | None = arg(None, "name on the hub", example="organisation/name")
    hub_private_repo: bool = arg(False, "make it private")
    commit_message: str = arg("update files", "message of the push")
    max_shard_size: str = arg("5GB", "largest weight file")

    _ACTIONS: ClassVar[tuple[str, ...]] = (
        "merge_lora", "quant_method", "to_cached_dataset", "to_gguf", "to_ollama", "to_peft_format", "push_to_hub",
    )  # fmt: skip
    #: Bits that each method can do; the first is the default.
    _BITS: ClassVar[dict[str, tuple[int, ...]]] = {
        "gptq": (4, 2, 3, 8), "awq": (4,), "bnb": (4, 8), "fp8": (8,), "int8": (8,),
    }  # fmt: skip

    def problems(self) -> Iterator[str]:
        if not any(getattr(self, action) for action in self._ACTIONS):
            yield "nothing to do: give " + ", ".join(f"--{name}" for name in self._ACTIONS)
        yield from self._quantize_problems()
        yield from self._adapter_problems()
        if self.push_to_hub and not self.hub_model_id:
            yield "--push_to_hub true needs --hub_model_id, for example --hub_model_id organisation/name"
        if not re.fullmatch(r"\d+(\.\d+)?([KMGT]i?B)?", self.max_shard_size, re.IGNORECASE):
            yield f"--max_shard_size {self.max_shard_size}: expected a size such as 5GB or 500MB"

    def _quantize_problems(self) -> Iterator[str]:
        method, dataset = self.quant_method, getattr(self, "dataset", None) or getattr(self, "cached_dataset", None)
        if not method:
            if self.quant_bits:
                yield "--quant_bits needs --quant_method, for example --quant_method awq"
            return
        if method in ("awq", "gptq") and not dataset:
            yield f"--quant_method {method} needs --dataset to calibrate with"
        if self.quant_bits and self.quant_bits not in self._BITS[method]:
            bits = ", ".join(map(str, sorted(self._BITS[method])))
            yield f"--quant_bits {self.quant_bits}: --quant_method {method} does {bits}"
        if not self.quant_sym and method != "gptq":
            yield f"--quant_sym false: is for --quant_method gptq; {method} has its own levels"
        if self.to_gguf or self.to_ollama:
            yield "--quant_method does not go with --to_gguf and --to_ollama: GGUF has types of its own, see --to_gguf"
        if self.group_size == 0:
            yield "--group_size 0: expected -1 (a whole row) or at least 1, for example --group_size 64"

    def _adapter_problems(self) -> Iterator[str]:
        adapters = getattr(self, "adapters", None) or []
        if self.merge_lora and not adapters:
            yield "--merge_lora true needs --adapters"
        if self.to_peft_format and bool(adapters) == bool(self.base_model):
            yield "--to_peft_format true needs --adapters, or a merged --model and its --base_model"
        if self.ollama_num_ctx and not self.to_ollama:
            yield "--ollama_num_ctx is for --to_ollama true"
        if self.base_model and not self.to_peft_format:
            yield "--base_model is for --to_peft_format true"
        if self.lora_rank and not self.base_model:
            yield "--lora_rank is for --base_model: an adapter that exists keeps its rank"
        if len(adapters) > 1:
            yield "--adapters: export takes one adapter; merge several one after the other"
        made = [f"--{name}" for name in ("quant_method", "to_gguf", "to_ollama") if getattr(self, name)]
        if adapters and made and not self.merge_lora:
            yield f"{', '.join(made)} of an adapter needs --merge_lora true: the merged model is what is converted"
        if self.to_peft_format and (self.merge_lora or made):
            yield "--to_peft_format true: an adapter stays one; leave out " + ", ".join(made or ["--merge_lora"])
        others = [f"--{name}" for name in self._ACTIONS if name != "to_cached_dataset" and getattr(self, name)]
        if self.to_cached_dataset and others:
            yield f"--to_cached_dataset true: one at a time; leave out {', '.join(others)}"
        if self.to_cached_dataset and not getattr(self, "dataset", None):
            yield "--to_cached_dataset true needs --dataset"

    def resolve(self) -> None:
        if self.to_cached_dataset:
            self.streaming = False
        if self.quant_method and self.quant_bits is None:
            self.quant_bits = self._BITS[self.quant_method][0]
