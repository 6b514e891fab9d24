"""LoRA on linear layers as one operation, for training: fewer passes over memory, and a third of what is kept.

PEFT's layer keeps a dropped copy of its input for the adapter of every layer, and adds the adapter's part to the
result in passes of its own. Here the input is kept once, whichever layers share it, and a mask of one byte a value
beside it; on CPUs only the mask's seed. There drawing a random float for each value takes a quarter of a training
step: a mask takes 16 random bits a value.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import Linear
from torch import nn

#: Values that 16 random bits have.
_VALUES = 2**16
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fuse_lora(model: Any) -> None:
    """Train the plain LoRA layers of ``model`` (one adapter on an ``nn.Linear``, no variant such as DoRA) as one
    operation each. In evaluation, with adapters switched off or merged they stay PEFT's."""
    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear and len(layer.lora_A) == 1:
            name = next(iter(layer.lora_A))
            is_plain = name not in layer.lora_variant and layer.lora_B[name].bias is None and not layer.fan_in_fan_out
            if is_plain:  # a method, as --torch_compile has one code for all layers then
                layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]


def _forward(layer: Any, values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = next(iter(layer.lora_A))
    as_trained = layer.training and not layer.merged and not layer.disable_adapters and layer.active_adapters == [name]
    if args or kwargs or not as_trained:
        return Linear.forward(layer, values, *args, **kwargs)
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return _LoraLinear.apply(
        values, base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], p
    )


class _LoraLinear(torch.autograd.Function):
    """``values @ weight.T + bias + scaling · dropout(values) @ a.T @ b.T``; the frozen weight gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        device = values.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        with torch.autocast(device, enabled=False):
            flat = values.reshape(-1, values.shape[-1]).to(dtype)
            down, up = a.to(dtype), b.to(dtype)
            matrix = weight.to(dtype)
            seed, scale = _draw(flat, p), scaling / _kept_share(flat, p)
            inner = _kept(flat, _mask(flat, seed, p)) @ down.t()
            result = flat @ matrix.t() if bias is None else torch.addmm(bias.to(dtype), flat, matrix.t())
            result.addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(flat, seed, inner, weight, down, up)
        ctx.scale, ctx.p, ctx.dtypes = scale, p, (values.dtype, a.dtype, b.dtype)
        return result.view(*values.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        flat, seed, inner, weight, down, up = ctx.saved_tensors
        mask = _mask(flat, seed, ctx.p)
        of_values, of_a, of_b = ctx.dtypes
        gradient = grads[0].reshape(-1, grads[0].shape[-1]).to(flat.dtype)
        of_inner = (gradient @ up).mul_(ctx.scale)
        grad_b = (gradient.t() @ inner).to(of_b).mul_(ctx.scale)
        grad_a = (of_inner.t() @ _kept(flat, mask)).to(of_a)
        grad_values = None
        if ctx.needs_input_grad[0]:
            grad_values = gradient @ weight.to(flat.dtype)
            if mask is None:
                grad_values.addmm_(of_inner, down)
            else:
                grad_values.add_(_kept(of_inner @ down, mask))
            grad_values = grad_values.view(*grads[0].shape[:-1], -1).to(of_values)
        return grad_values, None, None, grad_a, grad_b, None, None


def _draw(values: torch.Tensor, p: float) -> torch.Tensor | None:
    """What decides which values are dropped: on CPUs a seed, from which the mask is made anew in the backward pass;
    else the mask itself (bool, True where kept); None for no dropout."""
    if p == 0:
        return None
    if values.device.type == "cpu":
        return torch.randint(2**63 - 1, (1,))
    return torch.rand(values.shape, device=values.device) >= p


def _dropped(p: float) -> int:
    """How many of the values that 16 bits have stand for a dropped one."""
    return min(round(p * _VALUES), _VALUES - 1)


def _kept_share(values: torch.Tensor, p: float) -> float:
    """The share of values that is kept in the long run."""
    return 1 - (_dropped(p) / _VALUES if values.device.type == "cpu" else p)


def _mask(values: torch.Tensor, seed: torch.Tensor | None, p: float) -> torch.Tensor | None:
    """Which values are kept: on CPUs all bits of an integer as wide as a value or none, else bool; None for all.

    PyTorch draws random integers, compares them to booleans and multiplies by those one value at a time; NumPy draws
    64 bits in a nanosecond, and comparisons in place and bits go by vectors.
    """
    if seed is None or seed.dtype == torch.bool:
        return seed
    count = values.numel()
    # Without a Generator around it, which takes half as long again; the numbers are the same.
    random = torch.from_numpy(np.random.SFC64(seed.numpy()).random_raw((count + 3) // 4)).view(torch.int16)[:count]
    mask = random.ge_(_dropped(p) - _VALUES // 2).neg_()
    return mask.to(_BITS[values.element_size()]).view(values.shape)


def _kept(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Values with zeros for those that are dropped."""
    if mask is None:
        return values
    if mask.dtype == torch.bool:
        return values * mask
    return (values.view(mask.dtype) & mask).view(values.dtype)
