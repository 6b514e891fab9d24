"""RMSNorm and gated MLPs as one operation each, for training on CPUs: fewer passes over memory, less that is kept.

Transformers' RMSNorm keeps its input twice in float32; a gated MLP keeps what its activation gives beside its inputs;
and the linear layers behind both keep their results. Here the inputs alone are kept. Which layers these are is tried
out on random numbers: no list of classes says so.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from rayswift.train.made_again import MadeAgain, made_again


def fuse_layers(model: Any) -> None:
    """Train the RMSNorm layers and gated MLPs of ``model`` as one operation each, where that gives what they give, to
    the bit."""
    norms = []
    with torch.no_grad():
        for layer in model.modules():
            # Each for itself: layers of one class differ (DeepSeek's norms in eps, Gemma 3n's MLPs in what they drop).
            if "forward" in vars(layer):
                continue
            if type(layer).__name__.endswith("RMSNorm"):
                if (form := _norm_form(layer)) is not None:
                    layer.rms_norm, layer.forward = form, MethodType(_norm, layer)
                    norms.append(layer)
            elif _is_gated(layer):
                layer.forward = MethodType(_mlp, layer)
        if any(norm.weight.dtype == torch.float32 for norm in norms):
            _find_products(model, norms)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "forward" in vars(base):  # hooks of Accelerate's; results are kept then
        return

    @functools.wraps(type(base).forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with made_again():
            return type(self).forward(self, *args, **kwargs)

    base.forward = MethodType(forward, base)


@dataclass(frozen=True)
class _Norm:
    """How an RMSNorm differs from ``weight · x / rms(x)``.

    Args:
        eps: what is added to the mean square.
        offset: what is added to the weight (Gemma: 1).
        late: whether the weight is multiplied in float32, before the result gets the input's dtype.
        for_products: whether linear layers alone read the result: autocast would give it their dtype anyway.
    """

    eps: float
    offset: float
    late: bool
    for_products: bool = False


def _norm_form(layer: Any) -> _Norm | None:
    """The form of an RMSNorm; None where it is another layer."""
    eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None))
    weight = getattr(layer, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
        return None
    values = _random(4, weight.shape[-1])
    for offset, late in ((0.0, False), (0.0, True), (1.0, True)):
        form = _Norm(eps, offset, late)
        if all(_is_same(layer, _RmsNorm.apply, values.to(dtype), weight, form) for dtype in _DTYPES):
            return form
    return None


def _is_gated(layer: Any) -> bool:
    """Whether an MLP is ``down(activation(gate) * up)``, and its activation without weights of its own."""
    if not all(hasattr(layer, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    base = getattr(layer.gate_proj, "base_layer", layer.gate_proj)
    own = list(layer.act_fn.parameters()) if isinstance(layer.act_fn, nn.Module) else []
    if type(base) is not nn.Linear or own:
        return False
    training = layer.training
    layer.eval()  # dropout is random
    same = _is_same(layer, _mlp, layer, _random(4, base.in_features).to(base.weight.dtype))
    layer.train(training)
    return same


#: What a norm may be given.
_DTYPES = (torch.float32, torch.bfloat16)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _is_same(layer: Any, fused: Any, *args: Any) -> bool:
    """Whether a layer and its fused form give the same of the first tensor."""
    given = next(one for one in args if isinstance(one, torch.Tensor))
    try:
        own, other = layer(given), fused(*args)
    except Exception:  # whatever a model's code does: it stays as it is
        return False
    return isinstance(own, torch.Tensor) and own.dtype == other.dtype and torch.equal(own, other)


def _norm(layer: Any, values: torch.Tensor) -> torch.Tensor:
    return _RmsNorm.of(values, layer.weight, layer.rms_norm)


class _RmsNorm(MadeAgain):
    """``(weight + offset) · values / rms(values)`` over the last dimension; float32 inside."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, form: _Norm) -> torch.Tensor:
        scale = torch.rsqrt(values.float().pow(2).mean(-1, keepdim=True) + form.eps)
        ctx.save_for_backward(values, weight, scale)
        narrow = form.for_products and torch.is_autocast_enabled("cpu")
        ctx.form, ctx.dtype = form, torch.get_autocast_dtype("cpu") if narrow else None
        return _RmsNorm.make(ctx, values, weight, scale)[0]

    @staticmethod
    def make(ctx: Any, *kept: Any) -> tuple[torch.Tensor, Any]:
        """The result and the values over their root mean square."""
        values, weight, scale = kept
        normal = values.float() * scale
        if ctx.form.late:
            result = (normal * (weight.float() + ctx.form.offset)).to(values.dtype)
        else:
            result = normal.to(values.dtype) * weight
        return result if ctx.dtype is None else result.to(ctx.dtype), normal

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, weight, scale = ctx.saved_tensors
        normal, gradient = _RmsNorm.take(ctx), grads[0].float()
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normal).flatten(0, -2).sum(0).to(weight.dtype)
        of_normal = gradient * (weight.float() + ctx.form.offset if ctx.form.offset else weight)
        mean = (of_normal * normal).mean(-1, keepdim=True)
        return of_normal.addcmul_(normal, mean, value=-1).mul_(scale).to(values.dtype), of_weight, None


def _mlp(layer: Any, values: torch.Tensor) -> torch.Tensor:
    return layer.down_proj(_Gated.of(layer.gate_proj(values), layer.up_proj(values), layer.act_fn))


class _Gated(MadeAgain):
    """``activation(gate) * up``."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: Any) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def make(ctx: Any, *kept: Any) -> tuple[torch.Tensor, Any]:
        """The result, and the activation with the way back to its input."""
        gate, up = kept
        with torch.enable_grad():
            given = gate.detach().requires_grad_()
            activated = ctx.activation(given)
        return activated.detach() * up, (given, activated)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, up = ctx.saved_tensors
        given, activated = _Gated.take(ctx)
        (of_gate,) = torch.autograd.grad(activated, given, grads[0] * up)
        return of_gate, grads[0] * activated.detach(), None


class _Readers(TorchFunctionMode):
    """Notes which of some layers' results are read by anything but linear layers."""

    #: What asks about a tensor without its values.
    _QUESTIONS = ("__get__", "size", "dim", "is_floating_point", "is_contiguous")

    def __init__(self, layers: list[Any]) -> None:
        super().__init__()
        self.results: dict[int, tuple[Any, torch.Tensor]] = {}
        self.others: set[Any] = set()
        self.hooks = [layer.register_forward_hook(self._note) for layer in layers]

    def _note(self, layer: Any, _inputs: Any, result: torch.Tensor) -> None:
        self.results[id(result)] = layer, result

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_product = function is nn.functional.linear
        if not is_product and getattr(function, "__name__", "") not in self._QUESTIONS:
            for one in (*args, *(kwargs or {}).values()):
                if id(one) in self.results:
                    self.others.add(self.results[id(one)][0])
        return function(*args, **(kwargs or {}))


def _find_products(model: Any, norms: list[Any]) -> None:
    """Have the norms that linear layers alone read give what autocast would make of it for them."""
    tokens, training = torch.zeros(1, 4, dtype=torch.int64), model.training
    readers = _Readers(norms)
    model.eval()
    try:
        with torch.autocast("cpu", torch.bfloat16), readers:
            own = model(input_ids=tokens)[0]
    except Exception:  # a model that takes more than token ids
        return
    finally:
        model.train(training)
        for hook in readers.hooks:
            hook.remove()
    forms = {layer: layer.rms_norm for layer, _ in readers.results.values() if layer not in readers.others}
    for layer, form in forms.items():
        layer.rms_norm = replace(form, for_products=True)
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        is_same = torch.equal(model(input_ids=tokens)[0], own)
    model.train(training)
    if not is_same:
        for layer, form in forms.items():
            layer.rms_norm = form
