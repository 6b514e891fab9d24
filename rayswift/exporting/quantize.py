"""``--quant_method``: what is quantised how, and on which node of the cluster."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from rayswift import cluster
from rayswift.cluster.placement import NodeKind
from rayswift.errors import UserError, one_line
from rayswift.exporting.folder import building, copy_files
from rayswift.exporting.quantizers import CALIBRATED, QuantJob, check_libraries, run_job
from rayswift.modeling.loading import (
    config_dtype,
    read_config,
    read_safetensors_header,
    supports_bfloat16,
    weight_files,
)

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger("rayswift.exporting")

#: What a model folder has beside its weights and config.
SIDE_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.model",
    "generation_config.json", "args.json", "*.py",
)  # fmt: skip
#: Group sizes that every runtime has kernels for, tried in this order where --group_size is not given.
_GROUP_SIZES = (128, 64, 32)
#: GPTQModel searches AWQ's clipping in batches of so many rows.
_AWQ_ROWS = 64


def suffix(args: Any) -> str:
    """What the result's name ends with, as in SWIFT: ``-gptq-int4``, ``-fp8``, ``-int8``."""
    bits = "" if args.quant_method in ("fp8", "int8") else f"-int{args.quant_bits}"
    return f"-{args.quant_method}{bits}"


def check_quantizable(args: Any, model_dir: str) -> int:
    """The group size to use.

    Raises:
        UserError: a library is missing, the model is quantised already, or a group size that does not divide its rows.
    """
    check_libraries(args.quant_method)
    have = read_config(model_dir).get("quantization_config")
    if have:
        method = have.get("quant_method", "?") if isinstance(have, dict) else "?"
        raise UserError(f"--model {model_dir}: is quantised already ({method}); give the model it was made from")
    if args.quant_method not in CALIBRATED:
        return int(args.group_size)
    rows, width = _common_sizes(model_dir)
    if args.quant_method == "awq" and rows % _AWQ_ROWS:
        raise UserError(f"--quant_method awq: needs matrices of a multiple of {_AWQ_ROWS} rows; gptq does this model")
    if args.group_size == -1 or width % args.group_size == 0:
        return int(args.group_size)
    fitting = [size for size in _GROUP_SIZES if width % size == 0]
    if "group_size" in args.given or not fitting:
        choice = " or ".join(map(str, [*fitting, -1]))
        raise UserError(f"--group_size {args.group_size}: does not divide this model's rows; use {choice}")
    logger.info("--group_size %d does not divide this model's rows: %d is used", args.group_size, fitting[0])
    return fitting[0]


def _common_sizes(model_dir: str) -> tuple[int, int]:
    """The greatest common divisors of the numbers of rows, and of the row lengths, of the decoder's matrices."""
    rows = width = 0
    for path in weight_files(model_dir):
        for name, tensor in read_safetensors_header(path).items():
            if ".layers." in name and len(tensor["shape"]) == 2:
                rows, width = math.gcd(rows, tensor["shape"][0]), math.gcd(width, tensor["shape"][1])
    return rows, width


def quantize(args: Any, model_dir: str, target: str) -> str:
    """Quantise a plain model in a Ray task and return the result's folder.

    Raises:
        UserError: see :func:`check_quantizable`; no usable calibration row; the task failed.
    """
    group_size = check_quantizable(args, model_dir)
    found = cluster.connect(args)
    options = task_options(args, found)
    rows: list[np.ndarray] = []
    if args.quant_method in CALIBRATED:
        from rayswift.exporting.calibration import calibration_rows

        rows = calibration_rows(args, model_dir)
        logger.info("calibrating with %d rows, %d tokens", len(rows), sum(map(len, rows)))
    job = QuantJob(
        method=args.quant_method,
        bits=args.quant_bits,
        group_size=group_size,
        sym=args.quant_sym,
        model_dir=model_dir,
        dtype=(args.torch_dtype if "torch_dtype" in args.given else None) or config_dtype(model_dir),
        device="cuda" if options["num_gpus"] else "cpu",
        batch_size=args.quant_batch_size,
        max_shard_size=args.max_shard_size,
        trust_remote_code=args.trust_remote_code,
    )
    if job.method == "awq" and job.device == "cpu" and found.embedded and not supports_bfloat16(use_gpu=False):
        logger.warning("--quant_method awq computes in bfloat16, for which this CPU has no instructions: it takes "
                       "minutes for each layer even of a small model; gptq is faster here")  # fmt: skip
    with building(target) as folder:
        run_in_task(job, rows, folder, options)
        copy_files(model_dir, folder, SIDE_FILES)
    return target


def task_options(args: Any, found: cluster.Cluster) -> dict[str, Any]:
    """What the task asks Ray for: ``--resources_per_worker``, else one GPU, else the CPUs of the largest node; of
    those that ``--node_labels`` means.

    Raises:
        UserError: no node has it, so that the task would wait for ever.
    """
    import ray

    use_gpu = found.gpus > 0 if args.use_gpu is None else args.use_gpu
    if use_gpu and not found.gpus:
        raise UserError(f"--use_gpu true: {found.describe()}; leave it out, or set --address to a cluster with GPUs")
    alive = [NodeKind(node["Resources"], node.get("Labels")) for node in ray.nodes() if node["Alive"]]
    nodes = [kind.resources for kind in alive if kind.takes(args.node_labels)]
    if not nodes and not any(kind.takes(args.node_labels) for kind in found.kinds):
        wanted = ", ".join(f"{key}={value}" for key, value in args.node_labels.items())
        raise UserError(f"--node_labels {wanted}: no node here, and none that the autoscaler can start, has them")
    asked = {name: float(amount) for name, amount in args.resources_per_worker.items()}
    asked.setdefault("GPU", 1.0 if use_gpu else 0.0)
    asked.setdefault("CPU", 1.0 if use_gpu else max((node.get("CPU", 1.0) for node in nodes), default=1.0))
    limits = {"CPU": found.cpus, "GPU": found.gpus}
    fits = any(all(node.get(name, 0) >= amount for name, amount in asked.items()) for node in nodes)
    startable = all(limits.get(name, math.inf) >= amount for name, amount in asked.items())
    if not fits and (found.embedded or not startable):
        raise UserError(f"--resources_per_worker {args.resources_per_worker}: no node has that; {found.describe()}")
    return {"num_cpus": asked.pop("CPU"), "num_gpus": asked.pop("GPU"), "resources": asked, "max_retries": 0,
            "label_selector": args.node_labels}  # fmt: skip


def run_in_task(job: QuantJob, rows: list[np.ndarray], folder: str, options: dict[str, Any]) -> None:
    """Run the job on the node that Ray chooses; the folder has to be visible there and here."""
    import os

    import ray

    try:
        ray.get(ray.remote(run_job).options(**options).remote(job, rows, folder))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        logger.debug("%s", error)
        raise UserError(
            f"--quant_method {job.method}: failed ({type(error.cause).__name__}: {one_line(error.cause)});"
            " LOG_LEVEL=debug shows where"
        ) from None
    except ray.exceptions.RayError as error:
        reason = f"out of memory, or the library gave up ({one_line(error)})"
        raise UserError(f"--quant_method {job.method}: its process died: {reason}") from None
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError("--output_dir: the node that quantised does not share this folder; name one that all nodes see")
