"""Packages and devices that only some flags need, looked for before anything starts."""

from __future__ import annotations

import importlib.util
from typing import Any

from rayswift.errors import UserError


def check_packages(args: Any) -> None:
    """UserError for a flag whose package is not installed, with the command that installs it."""
    flags = {
        "--quant_method bnb": ("bitsandbytes", args.quant_method == "bnb"),
        "--quant_method hqq": ("hqq", args.quant_method == "hqq"),
        "--use_galore true": ("galore_torch", args.use_galore),
        "--fp8 true": ("torchao", args.fp8),
        "--galore_quantization true": ("bitsandbytes", args.use_galore and args.galore_quantization),
    }
    for flag, (package, needed) in flags.items():
        if needed and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag}: needs the package {package}, which is not installed: pip install {package}")


def check_device(args: Any, use_gpu: bool) -> None:
    """UserError for a flag that needs GPUs, where there are none, or a package of theirs that is not installed."""
    if args.training_args.get("use_liger_kernel") and not (use_gpu and importlib.util.find_spec("liger_kernel")):
        raise UserError("--use_liger_kernel true: needs GPUs and the package liger-kernel; leave it out here")
    if args.fp8 and not use_gpu:
        raise UserError("--fp8 true: needs GPUs that have float8 (Ada, Hopper or newer); leave it out here")
    if args.use_galore and args.galore_quantization and not use_gpu:
        raise UserError("--galore_quantization true: 8-bit optimisers are for GPUs; leave it out here")
