"""The settings of generation, and of the engines that generate."""

# ruff: noqa: RUF009 (arg() makes a dataclass field: it is meant to be called in the class body)
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from rayswift.arguments.base import Arguments
from rayswift.arguments.fields import arg
from rayswift.arguments.groups import ASKED_ROWS, SERVED_ELSEWHERE

_SERVES = "command=deploy|app|eval"
#: Rules of what only engines of one's own take.
_ONLY_VLLM = {"engine!=vllm": "only with the vLLM engine"}
_VLLM_OR_SERVED = {"engine!=vllm": "", "engine!=vllm command!=deploy|app|eval": "only with the vLLM engine"}
_REQUEST = "each request says it"
_NOT_SHOWN = {"command=deploy": _REQUEST, "command=app|eval|sample": "nothing shows them", **ASKED_ROWS}
_TWO_ONLY = "OpenCompass sends temperature and length, nothing else"
_THERE = {"eval_url!=none eval_backend=opencompass": _TWO_ONLY}
_ELSEWHERE = "vLLM runs in its place and has no such setting"


def _in_place_of(name: str, engine: str) -> str:
    return f"only in place of --vllm_{name}, with --infer_backend {engine}"


@dataclass(init=False, repr=False, eq=False)
class GenerationArguments(Arguments):
    """How answers are sampled."""

    topic: ClassVar[str] = "Generation"
    decides: ClassVar[str] = "answers"

    max_new_tokens: int | None = arg(None, "longest answer, in tokens", ge=1, shown="until the context is full")
    temperature: float | None = arg(None, "sampling temperature, 0 for greedy", ge=0, shown="the model's")
    top_k: int | None = arg(
        None, "sample among the k likeliest tokens (-1: all)", ge=-1, shown="the model's", no_effect=_THERE
    )
    top_p: float | None = arg(
        None, "sample among the likeliest tokens of this joint probability", gt=0, le=1, shown="the model's",
        no_effect=_THERE,
    )  # fmt: skip
    repetition_penalty: float | None = arg(
        None, "above 1, repeated tokens get less likely", gt=0, shown="the model's", no_effect=_THERE
    )
    num_beams: int = arg(
        1, "beams of beam search", ge=1,
        no_effect={
            "command=deploy|eval": "OpenAI's interface has no beam search",
            "command=infer engine=vllm": "vLLM's answers are sampled, not searched for",
        },
    )  # fmt: skip
    stop_words: list[str] = arg(
        [], "texts that end an answer", no_effect={"command=deploy": _REQUEST, "eval_backend=opencompass": _TWO_ONLY}
    )
    stream: bool | None = arg(
        None,
        "show tokens as they come",
        shown="true in a terminal, false over a dataset",
        decides="",
        no_effect={"command=deploy": _REQUEST, "command=sample|eval": "answers are written when they are whole"},
    )
    seed: int = arg(
        42, "seed of sampling",
        no_effect={
            "command=app base_url!=none": "the server at --base_url decides",
            "eval_url!=none eval_backend=opencompass": _TWO_ONLY,
            "command=infer base_url!=none val_dataset=none dataset=none": "the server at --base_url decides",
        },
    )  # fmt: skip
    logprobs: bool = arg(False, "return the log probabilities of the tokens", no_effect=_NOT_SHOWN)
    top_logprobs: int | None = arg(
        None, "how many alternatives per token to return with --logprobs", ge=0, no_effect=_NOT_SHOWN
    )

    def problems(self) -> Iterator[str]:
        if self.top_logprobs and not self.logprobs:
            yield "--top_logprobs needs --logprobs true"


@dataclass(init=False, repr=False, eq=False)
class VllmArguments(Arguments):
    """Settings of the vLLM engine."""

    topic: ClassVar[str] = "vLLM"
    no_effect: ClassVar[dict[str, str]] = {**SERVED_ELSEWHERE, **_ONLY_VLLM}

    vllm_tensor_parallel_size: int = arg(1, "GPUs that share each layer", ge=1, aliases=("tensor_parallel_size", "tp"))
    vllm_pipeline_parallel_size: int = arg(
        1, "groups of GPUs that share the layers", ge=1, aliases=("pipeline_parallel_size",)
    )
    vllm_data_parallel_size: int = arg(
        1, "copies of the engine", ge=1, aliases=("data_parallel_size",), no_effect=_VLLM_OR_SERVED
    )
    vllm_gpu_memory_utilization: float = arg(
        0.9, "share of GPU memory to use", gt=0, le=1, aliases=("gpu_memory_utilization",)
    )
    vllm_max_num_seqs: int = arg(
        256, "requests run together", ge=1, aliases=("max_num_seqs",), no_effect=_VLLM_OR_SERVED
    )
    vllm_max_model_len: int | None = arg(
        None, "longest prompt and answer together", ge=1, shown="the model's", no_effect=_ONLY_VLLM
    )
    vllm_enforce_eager: bool = arg(False, "no CUDA graphs", aliases=("enforce_eager",))
    vllm_disable_custom_all_reduce: bool = arg(True, "no custom all-reduce", aliases=("disable_custom_all_reduce",))
    vllm_enable_prefix_caching: bool | None = arg(
        None, "share the cache of common prefixes", aliases=("enable_prefix_caching",), shown="vLLM's"
    )
    vllm_enable_expert_parallel: bool = arg(
        False, "spread the experts of a mixture over the GPUs", aliases=("enable_expert_parallel",)
    )
    vllm_max_lora_rank: int = arg(
        16, "highest rank of an adapter", ge=1, aliases=("max_lora_rank",),
        no_effect={**_VLLM_OR_SERVED, "adapters=none adapter_root=none models=none": "only with --adapters"},
    )  # fmt: skip
    vllm_limit_mm_per_prompt: dict[str, Any] = arg(
        {}, "images, videos and audios per prompt, as JSON", aliases=("limit_mm_per_prompt",)
    )
    vllm_quantization: str | None = arg(
        None, "quantisation of the weights", aliases=("quantization",), shown="as in the model's config"
    )
    vllm_speculative_config: dict[str, Any] = arg({}, "speculative decoding, as JSON", aliases=("speculative_config",))
    vllm_reasoning_parser: str | None = arg(
        None, "parser that splits thinking from the answer", aliases=("reasoning_parser",),
        no_effect=dict.fromkeys(
            ("command=sample", "command=infer val_dataset!=none stream!=true"), "an answer holds its thoughts"
        ),
    )  # fmt: skip
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
    no_effect: ClassVar[dict[str, str]] = SERVED_ELSEWHERE

    infer_backend: str = arg(
        "transformers",
        "engine that generates",
        value_aliases={"pt": "transformers"},
        choices=("transformers", "vllm", "sglang", "lmdeploy"),
        decides="answers",
        no_effect={"command=sample": "--sampler_engine says it"},
    )
    max_batch_size: int = arg(
        1, "rows per batch of the transformers engine (-1: no limit)", ge=-1,
        no_effect={
            _SERVES: "requests are put together as they come (--max_ongoing_requests)",
            "engine!=transformers": "only with the Transformers engine",
            "command=infer stream=true": "--stream true answers one row after the other",
            **ASKED_ROWS,
        },
    )  # fmt: skip
    merge_lora: bool = arg(False, "merge the adapter into the weights first, into ADAPTER-merged", decides="answers")
    sglang_tp_size: int = arg(
        1, "SGLang: GPUs that share each layer", ge=1, no_effect=_in_place_of("tensor_parallel_size", "sglang")
    )
    sglang_pp_size: int = arg(
        1,
        "SGLang: groups of GPUs that share the layers",
        ge=1,
        no_effect=_in_place_of("pipeline_parallel_size", "sglang"),
    )
    sglang_dp_size: int = arg(
        1, "SGLang: copies of the engine", ge=1, no_effect=_in_place_of("data_parallel_size", "sglang")
    )
    sglang_context_length: int | None = arg(
        None, "SGLang: longest sequence", ge=1, shown="the model's", no_effect=_in_place_of("max_model_len", "sglang")
    )
    sglang_mem_fraction_static: float | None = arg(
        None,
        "SGLang: share of GPU memory",
        gt=0,
        le=1,
        shown="SGLang's",
        no_effect=_in_place_of("gpu_memory_utilization", "sglang"),
    )
    lmdeploy_tp: int = arg(
        1, "LMDeploy: GPUs that share each layer", ge=1, no_effect=_in_place_of("tensor_parallel_size", "lmdeploy")
    )
    lmdeploy_session_len: int | None = arg(
        None,
        "LMDeploy: longest sequence",
        ge=1,
        shown="the model's",
        no_effect=_in_place_of("max_model_len", "lmdeploy"),
    )
    lmdeploy_cache_max_entry_count: float = arg(
        0.8, "LMDeploy: share of free GPU memory for the cache", gt=0, le=1, no_effect=_ELSEWHERE
    )
    lmdeploy_quant_policy: int = arg(0, "LMDeploy: bits of the cache, 0 for none", ge=0, no_effect=_ELSEWHERE)

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
        if engine in self._ON_VLLM:
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
                self.given = self.given - {name} | {self._ON_VLLM[engine][name]}
            setattr(self, self._engine_flag, "vllm")
        if "max_model_len" in self.given and "vllm_max_model_len" not in self.given:
            self.vllm_max_model_len = getattr(self, "max_model_len", None)
