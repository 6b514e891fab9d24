"""How joined rows (``--packing``, ``--padding_free``) are trained: tried once for each model and set of libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.cluster import wait_for_task
from rayswift.console import say
from rayswift.data.tokens.arrow_files import default_root
from rayswift.errors import UserError, one_line
from rayswift.files import write_whole
from rayswift.train.config import PackedPlan, RunData
from rayswift.train.deepspeed import deepspeed_config, zero_stage

if TYPE_CHECKING:
    import numpy as np

    from rayswift.cluster import Workers
    from rayswift.train.schedule import StepSchedule

#: Tokens of a forward pass that joined rows aim at: more gain nothing on CPUs, and take memory.
JOINED_TOKENS, JOINED_TOKENS_GPU = 1024, 8192
#: What computes joined rows, beside our own code.
_LIBRARIES = ("torch", "transformers", "kernels", "flash-attn", "flash-linear-attention", "fla-core", "causal-conv1d",
              "mamba-ssm")  # fmt: skip
_CODE = (
    "train/collate.py",
    "train/packing_check.py",
    "modeling/packed_rows.py",
    "modeling/varlen_attention.py",
    "modeling/cpu_attention.py",
)


@dataclass(frozen=True)
class _Trial:
    """What decides how a model trains joined rows. ``longest``: tokens of a joined sequence; ``model``: its folder, or
    its hub id where nodes fetch it themselves."""

    model: str
    model_revision: str | None
    use_hf: bool
    trust_remote_code: bool
    model_kwargs: dict[str, Any]
    attn_impl: str | None
    dtype: str
    use_gpu: bool
    longest: int | None


def packing_plan(args: Any, model_dir: str, dtype: str, workers: Workers) -> PackedPlan | None:
    """How the model trains joined rows where the user asks for them; None where not.

    Raises:
        UserError: it would train them otherwise than alone; says which layers do.
    """
    from rayswift.modeling import positions
    from rayswift.modeling.loading import read_config

    if not (args.packing or args.padding_free):
        return None
    row = args.max_length or positions.longest(read_config(model_dir), args.positions)
    packed = args.packing_length if args.packing and args.packing_length else row
    longest = packed and packed * args.per_device_train_batch_size
    verdict = _verdict(args, model_dir, dtype, workers, longest, [])
    if "refused" in verdict:
        raise UserError(verdict["refused"])
    plan = PackedPlan(verdict["attention"], tuple(verdict["by_row"]))
    if plan.by_row and zero_stage(deepspeed_config(args.deepspeed)) == 3:
        # It gathers a layer's weights at each call, on all workers: they would wait for each other, or for weights.
        raise UserError(
            f"--packing/--padding_free: {', '.join(plan.by_row)} takes one row at a time, which ZeRO-3 does not allow; "
            "use --deepspeed zero2, or drop the flag"
        )
    say(f"joined rows: attention {plan.attention}" + (f"; one row at a time in {', '.join(plan.by_row)}" if plan.by_row
                                                      else ""))  # fmt: skip
    return plan


def join_rows(
    args: Any,
    model_dir: str,
    dtype: str,
    workers: Workers,
    lengths: np.ndarray,
    schedule: StepSchedule,
    warm: list[Any],
) -> tuple[PackedPlan | None, StepSchedule]:
    """Short rows of a step in fewer forward passes, where the model trains them as alone (``--packing`` unset).

    Every step trains the rows it would train anyway, with the same weights: what changes is how many of its micro-
    batches are computed at once.

    Args:
        lengths: tokens of the rows.
        schedule: the run's steps.
        warm: workers that have imported what the trial needs.

    Returns:
        How they are joined, and the schedule whose micro-batches are the joined ones; (None, ``schedule``) where they
        are not worth it or not exact.
    """
    size, accumulation = schedule.per_device_batch_size, schedule.accumulation(workers.largest)
    mean, spread = float(lengths.mean()), float(lengths.std())

    def fits(count: int) -> bool:
        if workers.use_gpu:  # its memory may just do for rows of --max_length: no pass may need more
            return longest_pass(lengths, count * size) <= min(JOINED_TOKENS_GPU, (args.max_length or math.inf) * size)
        return count * size * mean + (count * size) ** 0.5 * spread <= JOINED_TOKENS

    fitting = [count for count in range(2, accumulation + 1) if fits(count)]
    # Rows of like length in one step would make some passes many times as long as the others.
    by_length = args.training_args.get("train_sampling_strategy") == "group_by_length"
    if not fitting or by_length or args.attn_impl not in (None, "sdpa"):
        return None, schedule
    passes = math.ceil(accumulation / fitting[-1])
    rows = size * math.ceil(accumulation / passes)
    longest = 1 << int(rows * lengths.max()).bit_length()  # one trial for most datasets
    verdict = _verdict(args, model_dir, dtype, workers, longest, warm)
    if "refused" in verdict or verdict["by_row"]:
        return None, schedule
    say(f"{rows} rows (about {rows * mean:.0f} tokens) share a forward pass, each trained as if alone; --packing false "
        f"gives each {size} its own")  # fmt: skip
    return PackedPlan(verdict["attention"]), replace(schedule, per_device_batch_size=rows)


def largest_pass(args: Any, data: RunData, packing: PackedPlan | None, schedule: StepSchedule) -> int | None:
    """Tokens of the largest forward pass of a worker; None where nothing bounds them."""
    rows = data.token_parts.get("train_dataset")
    longest = data.encoder.max_length if rows is None else int(rows.lengths.max())
    if args.packing:
        longest = args.packing_length or data.encoder.max_length
    elif packing is not None and rows is not None:
        return longest_pass(rows.lengths, schedule.per_device_batch_size)
    return longest and longest * schedule.per_device_batch_size


def longest_pass(lengths: np.ndarray, rows: int) -> int:
    """Tokens of the longest pass that so many joined rows can make, whatever the order is."""
    import numpy as np

    return int(np.sort(lengths)[-rows:].sum())


def _verdict(
    args: Any, model_dir: str, dtype: str, workers: Workers, longest: int | None, warm: list[Any]
) -> dict[str, Any]:
    """What a trial found, kept in this machine's cache. A new one takes seconds, in a process on a machine that trains.
    ``longest``: tokens of a joined sequence."""
    trial = _Trial(
        model_dir if os.path.isdir(args.model) else args.model, args.model_revision, args.use_hf,
        args.trust_remote_code, args.model_kwargs or {}, args.attn_impl, dtype, workers.use_gpu, longest,
    )  # fmt: skip
    kept = Path(default_root()) / "packing" / f"{_key(trial, model_dir)}.json"
    try:
        return json.loads(kept.read_text("utf-8"))
    except (OSError, ValueError):
        verdict = _tried(trial, workers, args.hub_token, warm)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(verdict))
        return verdict


def _key(trial: _Trial, model_dir: str) -> str:
    """What a verdict depends on: the model's configuration and code, the libraries, this program, the settings."""
    own = Path(__file__).parents[1]
    files = [Path(model_dir, "config.json"), *sorted(Path(model_dir).glob("*.py")), *(own / name for name in _CODE)]
    settings = asdict(trial) | {"model": None, "versions": list(_versions())}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:40]


def _versions() -> Iterator[str]:
    for name in _LIBRARIES:
        try:
            yield f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue


def _tried(trial: _Trial, workers: Workers, hub_token: str | None, warm: list[Any]) -> dict[str, Any]:
    import ray

    if warm:
        try:
            return ray.get(warm[0].try_packing.remote(trial, hub_token))
        except ray.exceptions.RayActorError:  # it did not live to see its work: elsewhere
            pass
    resources = dict(workers.resources_per_worker)
    options = {"num_cpus": resources.pop("CPU", 0), "num_gpus": resources.pop("GPU", 0), "resources": resources}
    options |= {"label_selector": workers.selector, "max_calls": 1}
    found = ray.remote(**options)(try_packing).remote(trial, hub_token)
    return wait_for_task(found, "a worker's node", workers)


def try_packing(trial: _Trial, hub_token: str | None = None) -> dict[str, Any]:
    """The plan as a dict, or ``{"refused": why}``. For a process that trains nothing meanwhile: it leaves PyTorch with
    one thread."""
    import torch
    from transformers import AutoConfig
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available
    from transformers.utils import logging as transformers_logging

    from rayswift.hub import resolve_model
    from rayswift.modeling import varlen_attention
    from rayswift.modeling.loading import ATTN_IMPLS, read_config
    from rayswift.modeling.positions import with_positions
    from rayswift.train.packing_check import check_packing

    torch.set_num_threads(1)  # many small products: threads would only wait for each other
    transformers_logging.set_verbosity_error()
    if trial.attn_impl not in (None, "sdpa"):
        choices = [ATTN_IMPLS.get(trial.attn_impl, trial.attn_impl)]
    else:
        choices = [varlen_attention.NAME, "sdpa", "eager"]
        if trial.use_gpu and trial.dtype != "float32":  # flash-attn where it is installed, else what PyTorch has of it
            choices.insert(0, varlen_attention.FUSED)
            installed = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
            if trial.attn_impl is None:
                choices = [*(name for name, is_there in installed.items() if is_there()), *choices]
    trust = {"trust_remote_code": trial.trust_remote_code}
    try:
        model_dir = resolve_model(trial.model, revision=trial.model_revision, use_hf=trial.use_hf, token=hub_token)
        config, _ = AutoConfig.from_pretrained(
            model_dir,
            local_files_only=True,
            return_unused_kwargs=True,
            **trust,
            **with_positions(read_config(model_dir), trial.model_kwargs),
        )
        dtype, device = (getattr(torch, trial.dtype), "cuda") if trial.use_gpu else (torch.float32, "cpu")
        return asdict(check_packing(config, choices, dtype, device, trial.longest, **trust))
    except Exception as error:  # whatever a configuration or its code does
        return {"refused": f"--packing/--padding_free: {one_line(error).removeprefix('--packing/--padding_free: ')}"}
