"""What a replica's engine is started with, from the arguments of ``rayswift deploy``: vLLM's settings, resources,
environment."""

from __future__ import annotations

import logging
import os
from typing import Any

from rayswift.arguments import DeployArguments
from rayswift.arguments.fields import specs_of
from rayswift.cluster import cpu_count
from rayswift.generate.preflight import cpu_cache_gib
from rayswift.generate.vllm_plugin import SWITCH

logger = logging.getLogger("rayswift.generate.engine_settings")

_POOLING = {
    "embedding": {"runner": "pooling", "convert": "embed"},
    "seq_cls": {"runner": "pooling", "convert": "classify"},
    "reranker": {"runner": "pooling", "convert": "classify"},
}


def engine_kwargs(args: DeployArguments, use_gpu: bool) -> dict[str, Any]:
    """vLLM's settings from the ``--vllm_*`` flags, ``--vllm_engine_kwargs`` last."""
    if args.infer_backend != "vllm":
        return {}
    kwargs: dict[str, Any] = {
        "enforce_eager": args.vllm_enforce_eager,
        "max_num_seqs": args.vllm_max_num_seqs,
        "max_logprobs": args.max_logprobs,
        "trust_remote_code": args.trust_remote_code,
        "seed": args.seed,
        "enable_log_requests": args.verbose,
        "enable_auto_tool_choice": True,
        "tool_call_parser": args.vllm_engine_kwargs.get("tool_call_parser", "hermes"),
    }
    kwargs |= _POOLING.get(args.task_type, {})
    if use_gpu:
        kwargs |= {
            "tensor_parallel_size": args.vllm_tensor_parallel_size,
            "pipeline_parallel_size": args.vllm_pipeline_parallel_size,
            "gpu_memory_utilization": args.vllm_gpu_memory_utilization,
            "disable_custom_all_reduce": args.vllm_disable_custom_all_reduce,
        }
    else:
        # On CPUs vLLM (0.32) dies when a prompt is computed in parts and the answer has a seed: "CPU Generator does
        # not use offset". Whole prompts need a batch that holds the longest: vLLM's default then.
        kwargs["enable_chunked_prefill"] = False
        for flag in ("vllm_gpu_memory_utilization", "vllm_disable_custom_all_reduce"):
            if flag in args.given and getattr(args, flag) != specs_of(DeployArguments)[flag].default:
                logger.warning("--%s has no effect here: there is no GPU", flag)
    optional = {
        "enable_prefix_caching": args.vllm_enable_prefix_caching,
        "quantization": args.vllm_quantization,
        "limit_mm_per_prompt": args.vllm_limit_mm_per_prompt or None,
        "speculative_config": args.vllm_speculative_config or None,
        "reasoning_parser": args.vllm_reasoning_parser,
        "enable_expert_parallel": args.vllm_enable_expert_parallel or None,
        "override_generation_config": sampling_defaults(args) or None,
    }
    kwargs |= {name: value for name, value in optional.items() if value is not None}
    return {**kwargs, **args.vllm_engine_kwargs}


def bundles(args: DeployArguments, use_gpu: bool) -> list[dict[str, float]]:
    """Ray resources of one replica: a bundle per GPU of tensor × pipeline parallelism, else CPUs."""
    asked = {key: float(value) for key, value in args.resources_per_worker.items()}
    if not use_gpu:
        return [{"CPU": 1.0, **asked}]
    count = args.vllm_tensor_parallel_size * args.vllm_pipeline_parallel_size if args.infer_backend == "vllm" else 1
    rest = {"GPU": 1.0, "CPU": 1.0, **asked}
    # The first also holds the replica itself.
    return [{**rest, "CPU": rest["CPU"] + 1}, *[dict(rest) for _ in range(count - 1)]]


def environment(args: DeployArguments, use_gpu: bool, max_replicas: int) -> dict[str, str]:
    """Environment of a replica. On CPUs vLLM needs the size of its cache (GiB), its threads and `vllm_plugin`."""
    env = {"VLLM_NO_USAGE_STATS": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0"}
    if args.verbose:
        env["RAYLLM_ENABLE_REQUEST_PROMPT_LOGS"] = "1"
    if not use_gpu:
        # Ray sets OMP_NUM_THREADS to the CPUs of the actor, 1; the engine's threads would be that one.
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cpu_count() // max_replicas))
        env |= {"OMP_NUM_THREADS": threads, "VLLM_CPU_KVCACHE_SPACE": str(cpu_cache_gib(max_replicas)), SWITCH: "1"}
        if max_replicas > 1:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # replicas that pin threads would pin them to the same cores
    for name in ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", SWITCH, "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        if os.environ.get(name):
            env[name] = os.environ[name]
    return env


def sampling_defaults(args: DeployArguments) -> dict[str, Any]:
    """The settings of generation that flags set."""
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None and args.is_set(name)}
