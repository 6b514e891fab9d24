"""Layers that are compiled (``--torch_compile``), and their products in float8 (``--fp8``).

Each layer is compiled by itself: what PyTorch makes of the first serves all that are alike, so compiling takes seconds
whatever the depth is, and checkpoints, adapters and gradient checkpointing see the modules they know.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rayswift.errors import UserError
from rayswift.train.config import PackedPlan

#: From here on (Ada, Hopper, Blackwell) GPUs have products of float8.
FLOAT8_CAPABILITY = (8, 9)


def compile_layers(model: nn.Module, backend: str | None, mode: str | None, packing: PackedPlan | None = None) -> int:
    """Have every layer of ``model`` compiled when it is first called; returns how many there are.

    Args:
        backend: PyTorch's name of what compiles; None: ``inductor``.
        mode: of inductor, ``default``, ``max-autotune``, …
        packing: how joined rows are trained. Their bounds differ from batch to batch: what reads them runs as it is.

    Raises:
        UserError: there is no such backend, or inductor misses its compiler.
    """
    backend = backend or "inductor"
    if backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UserError(f"--torch_compile_backend {backend}: choose from {', '.join(known)}")
    if backend == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("--torch_compile true: needs a C++ compiler (g++ or clang++); install one, or leave it out")
    if packing is not None:
        _leave_bounds_alone(model, packing)
    layers = list(layers_of(model))
    for layer in layers:
        layer.compile(backend=backend, mode=mode)
    return len(layers)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model, one after the other: the members of its outermost lists."""
    for module in model.children():
        yield from module if isinstance(module, nn.ModuleList) else layers_of(module)


def _leave_bounds_alone(model: nn.Module, packing: PackedPlan) -> None:
    from transformers import AttentionInterface

    from rayswift.modeling import varlen_attention

    attention = torch.compiler.disable(varlen_attention.varlen_attention)
    AttentionInterface.register(varlen_attention.NAME, attention)
    for module in model.modules():
        if type(module).__name__ in packing.by_row:
            module.forward = torch.compiler.disable(module.forward)


def check_float8() -> None:
    """UserError on a worker whose GPU has no products of float8."""
    capability = torch.cuda.get_device_capability()
    if capability < FLOAT8_CAPABILITY:
        name, has = torch.cuda.get_device_name(), ".".join(map(str, capability))
        raise UserError(f"--fp8 true: {name} (compute capability {has}) has no float8, which begins with 8.9; drop it")


def to_float8(model: Any, **config: Any) -> int:
    """Have the linear layers inside the layers of ``model`` compute in float8 (torchao: weights stay as they are, a
    scale is found at each product); returns how many. ``config``: of ``Float8LinearConfig``."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    inside = {module for layer in layers_of(model) for module in layer.modules()}

    def takes(module: Any, _name: str) -> bool:
        return module in inside and module.in_features % 16 == 0 == module.out_features % 16

    convert_to_float8_training(model, module_filter_fn=takes, config=Float8LinearConfig(**config))
    return sum(isinstance(module, Float8Linear) for module in model.modules())
