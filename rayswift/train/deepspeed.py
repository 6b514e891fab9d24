"""``--deepspeed``: a preset name, a JSON text or a file, to the dict that Transformers hands to DeepSpeed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rayswift.errors import UserError
from rayswift.files import parse_json

_PRESETS = Path(__file__).with_name("deepspeed_presets.json")


def deepspeed_config(value: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """The DeepSpeed configuration, or None without ``--deepspeed``. Presets are SWIFT's.

    Raises:
        UserError: no such preset or file, or broken JSON.
    """
    if value is None or isinstance(value, dict):
        return value
    presets = json.loads(_PRESETS.read_text(encoding="utf-8"))
    if value in presets:
        return presets[value]
    try:
        config = parse_json(value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        raise UserError(f"--deepspeed {value}: choose {', '.join(presets)}, a JSON text or a file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed: broken JSON at line {error.lineno}: {error.msg}") from None
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed {value}: holds a JSON {type(config).__name__}, not a DeepSpeed configuration")
    return config


def zero_stage(config: dict[str, Any] | None) -> int:
    """The ZeRO stage of a configuration; 0 without DeepSpeed."""
    return int((config or {}).get("zero_optimization", {}).get("stage", 0))


def prepare_deepspeed(use_gpu: bool, local_world_size: int) -> None:
    """Make DeepSpeed use the process group that Ray Train set up; call before a model is loaded.

    Without ``init_distributed`` ZeRO-3's ``zero.Init`` sees a world of one process. Every worker calls it.
    """
    if not use_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["LOCAL_SIZE"] = str(local_world_size)
    import deepspeed
    import torch

    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo")
    if not use_gpu:
        torch.distributed.barrier()  # now all have opened each other's
        address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        unlink_shared_memory(address, port, torch.distributed.get_rank())


def unlink_shared_memory(address: str, port: str, rank: int) -> None:
    """Take the name from the 66 MiB of shared memory through which a worker on CPUs adds up with others of its machine.

    Who has it open keeps it, and it goes with the last of them, however that one ends. DeepSpeed leaves it for ever.
    """
    Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def check_precision(config: dict[str, Any] | None, dtype: str) -> None:
    """Refuse a DeepSpeed file that computes in another precision than ``--torch_dtype``, or wrongly in this one.

    Raises:
        UserError: names both.
    """
    for section, meant in (("bf16", "bfloat16"), ("fp16", "float16")):
        enabled = (config or {}).get(section, {}).get("enabled", "auto")
        if enabled != "auto" and bool(enabled) != (dtype == meant):
            state = "on" if enabled else "off"
            raise UserError(f"--deepspeed switches {section} {state} but --torch_dtype is {dtype}; make them agree")
    if config is not None and dtype == "bfloat16" and zero_stage(config) == 0:
        raise UserError(
            "--deepspeed: ZeRO stage 0 in bfloat16 begins with a step of zero gradients (DeepSpeed#7839), so its first "
            "updates are too small; leave --deepspeed out, which is the same training, or set stage 1"
        )
