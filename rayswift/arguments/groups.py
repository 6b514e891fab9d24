"""The settings that several commands share: model, dataset, template, tuner, Ray, generation, engines."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg, read_lines, read_text_file, specs_of

_DTYPES = ("bfloat16", "float16", "float32")
_HUB_ENV = "USE_HF"


@dataclass(init=False, repr=False, eq=False)
class ModelArguments(Arguments):
    """Which model, from where, in which precision."""

    topic: ClassVar[str] = "Model"
    decides: ClassVar[str] = "answers"

    model: str | None = arg(None, "model id on the hub, or a local folder")
    model_type: str | None = arg(None, "model family", shown="found from the model's config")
    model_revision: str | None = arg(None, "branch, tag or commit on the hub", shown="the hub's default branch")
    task_type: str = arg(
        "causal_lm",
        "what the model is trained or run for",
        choices=("causal_lm",),
        swift_only=("seq_cls", "embedding", "reranker", "generative_reranker", "decision"),
    )
    torch_dtype: str | None = arg(
        None, "precision of the loaded weights", choices=_DTYPES, shown="as in the model's config"
    )
    attn_impl: str | None = arg(
        None, "attention implementation", shown="Transformers' choice",
        value_aliases={"flash_attn": "flash_attention_2", "flash_attention": "flash_attention_2"},
        choices=("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"),
    )  # fmt: skip
    new_special_tokens: list[str] = arg(
        [], "tokens to add to the vocabulary, or a .txt file with one per line", parse=read_lines
    )
    model_kwargs: dict[str, Any] = arg({}, "further keyword arguments for loading the model, as JSON")
    adapters: list[str] = arg([], "LoRA checkpoint folders or ids (deploy: name=path)", aliases=("lora_modules",))
    load_args: bool = arg(True, "read model, template and system from the checkpoint's args.json")
    load_data_args: bool = arg(False, "read the dataset settings from it too")
    use_hf: bool = arg(False, "use the Hugging Face hub instead of ModelScope", shown="false; true if USE_HF=1 is set")
    hub_token: str | None = arg(None, "access token for the hub", example="TOKEN", decides="")
    trust_remote_code: bool = arg(False, "run Python code that comes with a model")
    external_plugins: list[str] = arg(
        [], "Python files to import first (they register models, templates, ...)", aliases=("custom_register_path",)
    )

    def problems(self) -> Iterator[str]:
        for path in self.external_plugins:
            if not os.path.isfile(path):
                yield f"--external_plugins {path}: no such file"

    def resolve(self) -> None:
        if not self.is_set("use_hf"):
            self.use_hf = os.environ.get(_HUB_ENV, "").strip().lower() in ("1", "true", "yes")

    @property
    def model_suffix(self) -> str:
        """The last part of the model's id or path (of the adapter's without a model): names output folders."""
        name = self.model or next(iter(self.adapters), "")
        return os.path.basename(name.rstrip("/\\")) or "model"


@dataclass(init=False, repr=False, eq=False)
class DatasetArguments(Arguments):
    """Which rows, how many, in which order."""

    topic: ClassVar[str] = "Dataset"
    decides: ClassVar[str] = "answers"

    dataset: list[str] = arg(
        [], "dataset ids, files or folders, each [HF::|MS::]NAME[:SUBSET][#ROWS]", example="train.jsonl"
    )
    cached_dataset: list[str] = arg(
        [], "folders of encoded rows (rayswift export --to_cached_dataset true)", example="cached_dataset"
    )
    val_dataset: list[str] = arg([], "validation datasets, written like --dataset", example="val.jsonl")
    split_dataset_ratio: float = arg(0.01, "share of --dataset held out where no --val_dataset is given", ge=0, lt=1)
    dataset_shuffle: bool = arg(True, "shuffle the training rows")
    val_dataset_shuffle: bool = arg(False, "shuffle the validation rows")
    data_seed: int = arg(42, "seed of sampling, splitting and shuffling")
    dataset_num_proc: int = arg(1, "processes that preprocess rows", ge=1, decides="", no_effect="all cores are used")
    streaming: bool = arg(False, "read the dataset as a stream; needs --max_steps")
    shuffle_buffer_size: int = arg(1000, "rows held for shuffling a stream", ge=1)
    interleave_prob: list[float] | None = arg(
        None,
        "mix the datasets with these probabilities, one each",
        ge=0,
        le=1,
        shown="one after the other",
        example="0.7 0.3",
    )
    stopping_strategy: str = arg("first_exhausted", "when mixing ends", choices=("first_exhausted", "all_exhausted"))
    interleave_by: str = arg("rows", "what --interleave_prob is a share of", choices=("rows", "tokens"))
    columns: dict[str, Any] = arg(
        {}, "columns to rename before the row format is recognised, as JSON", example='\'{"text1": "query"}\''
    )
    strict: bool = arg(False, "stop at the first bad row instead of counting and skipping it", decides="")
    model_name: list[str] = arg([], "self-cognition: the model's name (Chinese, English)")
    model_author: list[str] = arg([], "self-cognition: the author's name (Chinese, English)")
    custom_dataset_info: list[str] = arg([], "dataset_info.json files, or JSON text")
    download_mode: str = arg(
        "reuse_dataset_if_exists",
        "what to do with a dataset already downloaded",
        choices=("reuse_dataset_if_exists", "force_redownload"),
        no_effect="what changed on the hub is downloaded again, the rest never",
    )
    load_from_cache_file: bool = arg(
        True, "reuse rows and tokens of unchanged data", aliases=("enable_cache",), decides=""
    )
    remove_unused_columns: bool = arg(True, "drop columns that the model does not take")

    def remarks(self) -> Iterator[str]:
        if self.streaming and "stopping_strategy" in self.given:
            yield ("--stopping_strategy: no effect with --streaming true, where each dataset begins again when it ends "
                   "and --max_steps ends the run")  # fmt: skip

    def problems(self) -> Iterator[str]:
        weights, names = self.interleave_prob, self.dataset
        if weights is not None and len(weights) != len(names):
            yield (f"--interleave_prob has {len(weights)} values but --dataset names {len(names)}: "
                   "give one probability per dataset")  # fmt: skip
        elif weights is not None and abs(sum(weights) - 1) > 1e-3:
            yield f"--interleave_prob adds up to {sum(weights):g}: the probabilities must add up to 1"
        if self.interleave_by == "tokens":
            if getattr(self, "lazy_tokenize", False):
                yield "--interleave_by tokens contradicts --lazy_tokenize true: it needs every row's length; drop one"
            if self.streaming and not getattr(self, "packing", False):
                yield ("--interleave_by tokens contradicts --streaming true: a stream's lengths are not known; add "
                       "--packing true, whose packs are of one length")  # fmt: skip
        for info in self.custom_dataset_info:
            if not info.lstrip().startswith(("[", "{")) and not os.path.isfile(info):
                yield f"--custom_dataset_info {info}: no such file"


@dataclass(init=False, repr=False, eq=False)
class TemplateArguments(Arguments):
    """How a conversation becomes token ids."""

    topic: ClassVar[str] = "Template"
    decides: ClassVar[str] = "answers"

    template: str | None = arg(None, "chat template name", shown="found from the model")
    system: str | None = arg(
        None, "system prompt, or a .txt file that holds it", parse=read_text_file, shown="the template's"
    )
    max_length: int | None = arg(None, "longest sequence, in tokens", ge=1, shown="the model's maximum")
    truncation_strategy: str = arg(
        "delete", "what happens to longer rows", choices=("delete", "left", "right", "split")
    )
    use_chat_template: bool = arg(True, "apply the chat template; false trains on plain text")
    template_backend: str = arg("swift", "template engine", choices=("swift", "jinja"))
    template_date: str | None = arg(
        None, "day (YYYY-MM-DD) that templates with a date in their prompt show", shown="2024-07-26"
    )
    loss_scale: str = arg("default", "which tokens are trained, and how strongly")
    enable_thinking: bool | None = arg(None, "thinking mode of the template", shown="the model's")
    add_non_thinking_prefix: bool = arg(True, "add the empty thinking block to answers without one")
    agent_template: str | None = arg(
        None, "format of tools and tool calls", aliases=("tools_prompt",), shown="the model's"
    )
    response_prefix: str | None = arg(None, "text that every answer starts with", shown="the template's")
    padding_side: str = arg(
        "right",
        "where short rows are padded",
        choices=("left", "right"),
        no_effect="training pads on the right, generation on the left",
    )


@dataclass(init=False, repr=False, eq=False)
class RayArguments(Arguments):
    """Where the work runs."""

    topic: ClassVar[str] = "Ray"

    address: str | None = arg(
        None, "Ray cluster to join", shown="this machine, or the cluster of the Ray job", example="auto"
    )
    use_gpu: bool | None = arg(None, "run on GPUs", shown="true if the cluster has any")
    resources_per_worker: dict[str, Any] = arg(
        {}, "resources of each worker, as JSON", example='\'{"CPU": 4, "GPU": 1}\''
    )
    storage_path: str | None = arg(
        None,
        "folder or URI that every node can reach, for results",
        shown="the output folder",
        example="s3://bucket/runs",
    )

    def problems(self) -> Iterator[str]:
        for name, amount in self.resources_per_worker.items():
            if isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0:
                yield (f"--resources_per_worker: {name} is {amount!r}, expected a number of at least 0, "
                       "for example '{\"CPU\": 4, \"GPU\": 1}'")  # fmt: skip
        if self.use_gpu is False and self.resources_per_worker.get("GPU"):
            yield "--use_gpu false contradicts --resources_per_worker, which asks for a GPU: drop one of the two"


def read_workers(raw: Any) -> int | tuple[int, int]:
    """``4``, or ``1,4`` for an elastic run: at least 1 and at most 4 workers."""
    parts = raw if isinstance(raw, (list, tuple)) else str(raw).split(",")
    try:
        counts = [int(part) for part in parts]
    except ValueError:
        counts = []
    if len(counts) not in (1, 2) or counts[0] < 1 or counts[-1] < counts[0]:
        raise ValueError("expected N or MIN,MAX with 1 <= MIN <= MAX")
    return counts[0] if len(counts) == 1 else (counts[0], counts[1])


@dataclass(init=False, repr=False, eq=False)
class WorkerArguments(RayArguments):
    """How many workers share the work."""

    num_workers: int | tuple[int, int] | None = arg(
        None, "worker processes, N or MIN,MAX (elastic)", parse=read_workers, example="4",
        shown="NPROC_PER_NODE x NNODES if set, else one per GPU, else 1",
    )  # fmt: skip
    num_nodes: int | None = arg(None, "nodes the workers are spread over", ge=1, shown="NNODES if set")
    max_failures: int = arg(3, "how often a failed run starts again from its last checkpoint (-1: always)", ge=-1)

    def resolve(self) -> None:
        nodes, per_node = _count_from_env("NNODES"), _count_from_env("NPROC_PER_NODE")
        if self.num_nodes is None:
            self.num_nodes = nodes
        if self.num_workers is None and (per_node or nodes):
            self.num_workers = (per_node or 1) * (self.num_nodes or 1)


def _count_from_env(name: str) -> int | None:
    text = os.environ.get(name, "").strip()
    return int(text) if text.isdigit() and int(text) > 0 else None


@dataclass(init=False, repr=False, eq=False)
class GenerationArguments(Arguments):
    """How answers are sampled."""

    topic: ClassVar[str] = "Generation"
    decides: ClassVar[str] = "answers"

    max_new_tokens: int | None = arg(None, "longest answer, in tokens", ge=1, shown="until the context is full")
    temperature: float | None = arg(None, "sampling temperature, 0 for greedy", ge=0, shown="the model's")
    top_k: int | None = arg(None, "sample among the k likeliest tokens (-1: all)", ge=-1, shown="the model's")
    top_p: float | None = arg(
        None, "sample among the likeliest tokens of this joint probability", gt=0, le=1, shown="the model's"
    )
    repetition_penalty: float | None = arg(None, "above 1, repeated tokens get less likely", gt=0, shown="the model's")
    num_beams: int = arg(1, "beams of beam search", ge=1)
    stop_words: list[str] = arg([], "texts that end an answer")
    stream: bool | None = arg(
        None, "show tokens as they come", shown="true in a terminal, false over a dataset", decides=""
    )
    seed: int = arg(42, "seed of sampling")
    logprobs: bool = arg(False, "return the log probabilities of the tokens")
    top_logprobs: int | None = arg(None, "how many alternatives per token to return with --logprobs", ge=0)

    def problems(self) -> Iterator[str]:
        if self.top_logprobs and not self.logprobs:
            yield "--top_logprobs needs --logprobs true"


@dataclass(init=False, repr=False, eq=False)
class VllmArguments(Arguments):
    """Settings of the vLLM engine."""

    topic: ClassVar[str] = "vLLM"

    vllm_tensor_parallel_size: int = arg(1, "GPUs that share each layer", ge=1, aliases=("tensor_parallel_size", "tp"))
    vllm_pipeline_parallel_size: int = arg(
        1, "groups of GPUs that share the layers", ge=1, aliases=("pipeline_parallel_size",)
    )
    vllm_data_parallel_size: int = arg(1, "copies of the engine", ge=1, aliases=("data_parallel_size",))
    vllm_gpu_memory_utilization: float = arg(
        0.9, "share of GPU memory to use", gt=0, le=1, aliases=("gpu_memory_utilization",)
    )
    vllm_max_num_seqs: int = arg(256, "requests run together", ge=1, aliases=("max_num_seqs",))
    vllm_max_model_len: int | None = arg(
        None, "longest prompt and answer together", ge=1, aliases=("max_model_len",), shown="the model's"
    )
    vllm_enforce_eager: bool = arg(False, "no CUDA graphs", aliases=("enforce_eager",))
    vllm_disable_custom_all_reduce: bool = arg(True, "no custom all-reduce", aliases=("disable_custom_all_reduce",))
    vllm_enable_prefix_caching: bool | None = arg(
        None, "share the cache of common prefixes", aliases=("enable_prefix_caching",), shown="vLLM's"
    )
    vllm_enable_expert_parallel: bool = arg(
        False, "spread the experts of a mixture over the GPUs", aliases=("enable_expert_parallel",)
    )
    vllm_max_lora_rank: int = arg(16, "highest rank of an adapter", ge=1, aliases=("max_lora_rank",))
    vllm_limit_mm_per_prompt: dict[str, Any] = arg(
        {}, "images, videos and audios per prompt, as JSON", aliases=("limit_mm_per_prompt",)
    )
    vllm_quantization: str | None = arg(
        None, "quantisation of the weights", aliases=("quantization",), shown="as in the model's config"
    )
    vllm_speculative_config: dict[str, Any] = arg({}, "speculative decoding, as JSON", aliases=("speculative_config",))
    vllm_reasoning_parser: str | None = arg(
        None, "parser that splits thinking from the answer", aliases=("reasoning_parser",)
    )
    vllm_use_async_engine: bool | None = arg(
        None,
        "asynchronous engine",
        aliases=("use_async_engine",),
        shown="as the command needs",
        no_effect="the command takes the engine that it needs",
    )
    vllm_engine_kwargs: dict[str, Any] = arg({}, "any other engine setting, as JSON")


@dataclass(init=False, repr=False, eq=False)
class EngineArguments(VllmArguments):
    """Which engine generates, and the settings of the other engines."""

    topic: ClassVar[str] = "Engine"

    infer_backend: str = arg(
        "transformers",
        "engine that generates",
        value_aliases={"pt": "transformers"},
        choices=("transformers", "vllm", "sglang", "lmdeploy"),
        decides="answers",
    )
    max_batch_size: int = arg(1, "rows per batch of the transformers engine (-1: no limit)", ge=-1)
    merge_lora: bool = arg(False, "merge the adapter into the weights first, into ADAPTER-merged", decides="answers")
    sglang_tp_size: int = arg(1, "SGLang: GPUs that share each layer", ge=1)
    sglang_pp_size: int = arg(1, "SGLang: groups of GPUs that share the layers", ge=1)
    sglang_dp_size: int = arg(1, "SGLang: copies of the engine", ge=1)
    sglang_context_length: int | None = arg(None, "SGLang: longest sequence", ge=1, shown="the model's")
    sglang_mem_fraction_static: float | None = arg(None, "SGLang: share of GPU memory", gt=0, le=1, shown="SGLang's")
    lmdeploy_tp: int = arg(1, "LMDeploy: GPUs that share each layer", ge=1)
    lmdeploy_session_len: int | None = arg(None, "LMDeploy: longest sequence", ge=1, shown="the model's")
    lmdeploy_cache_max_entry_count: float = arg(0.8, "LMDeploy: share of free GPU memory for the cache", gt=0, le=1)
    lmdeploy_quant_policy: int = arg(0, "LMDeploy: bits of the cache, 0 for none", ge=0)

    #: Engines of SWIFT's in whose place vLLM runs, and what their settings are called there.
    _ON_VLLM: ClassVar[dict[str, dict[str, str]]] = {
        "sglang": {
            "sglang_tp_size": "vllm_tensor_parallel_size", "sglang_pp_size": "vllm_pipeline_parallel_size",
            "sglang_dp_size": "vllm_data_parallel_size", "sglang_context_length": "vllm_max_model_len",
            "sglang_mem_fraction_static": "vllm_gpu_memory_utilization",
        },
        "lmdeploy": {"lmdeploy_tp": "vllm_tensor_parallel_size", "lmdeploy_session_len": "vllm_max_model_len"},
    }  # fmt: skip

    def problems(self) -> Iterator[str]:
        if self.max_batch_size == 0:
            yield "--max_batch_size 0: expected -1 (no limit) or at least 1"
        if self.merge_lora and not getattr(self, "adapters", None):
            yield "--merge_lora true needs --adapters: there is nothing to merge"

    @property
    def _engine_flag(self) -> str:
        return "sampler_engine" if hasattr(self, "sampler_engine") else "infer_backend"

    def remarks(self) -> Iterator[str]:
        flag, engine = self._engine_flag, getattr(self, self._engine_flag)
        runs = "vllm" if engine in self._ON_VLLM else engine
        for own in ("vllm", "sglang", "lmdeploy"):
            names = {
                name for name in self.given if name.startswith(f"{own}_") and not specs_of(type(self))[name].no_effect
            }
            if own == engine:
                names -= set(self._ON_VLLM.get(engine, ()))
            if names and own != runs:
                flags = ", ".join(f"--{name}" for name in sorted(names))
                why = ", vLLM has no such setting" if own == engine else f" without --{flag} {own}"
                yield f"{flags}: no effect{why}"
        if runs != engine:
            taken = [f"--{name} counts as --{self._ON_VLLM[engine][name]}" for name in self._translated()]
            yield "; ".join([f"--{flag} {engine}: vLLM runs in its place", *taken])

    def _translated(self) -> list[str]:
        """The settings of another engine that count for vLLM: those that are given where vLLM's are not."""
        names = self._ON_VLLM[getattr(self, self._engine_flag)]
        return [name for name, ours in names.items() if name in self.given and ours not in self.given]

    def resolve(self) -> None:
        engine = getattr(self, self._engine_flag)
        if engine in self._ON_VLLM:
            for name in self._translated():
                setattr(self, self._ON_VLLM[engine][name], getattr(self, name))
                self.given |= {self._ON_VLLM[engine][name]}
            self.given -= {name for name in self.given if name.startswith(f"{engine}_")}
            setattr(self, self._engine_flag, "vllm")
