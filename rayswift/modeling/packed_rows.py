"""Rows joined to one sequence in any model: which attention keeps them apart, and which layers take them one by one.

Attention is kept within rows by an attention function or a mask. Layers with a state or a convolution of their own
(linear attention, Mamba, …) are not: Transformers' CUDA kernels for them take the rows' bounds, its PyTorch code does
not. Those layers, and attention that a model brings itself, are given one row after the other here.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rayswift.modeling.varlen_attention import row_lengths  # its attention is known to Transformers from here on

#: What a batch of joined rows says about them; models that know nothing of it are not told.
ROW_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def keep_rows_apart(model: torch.nn.Module, by_row: Sequence[str]) -> None:
    """Have a model take batches of joined rows, and its layers of the classes ``by_row`` one row at a time."""
    forward, layers = model.forward, [module for module in model.modules() if type(module).__name__ in by_row]
    parameters = inspect.signature(forward).parameters
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if takes_all and not layers:
        return
    # Of the batch that is computed now; gradient checkpointing computes it again before the next.
    bounds: list[int] = []

    @functools.wraps(forward)
    def of_rows(*args: Any, **kwargs: Any) -> Any:
        joined = kwargs.get("cu_seq_lens_q")
        bounds[:] = [] if joined is None or not layers else itertools.accumulate(row_lengths(joined), initial=0)
        return forward(*args, **{k: v for k, v in kwargs.items() if takes_all or k in parameters or k not in ROW_KEYS})

    model.forward = of_rows
    for layer in layers:
        layer.forward = _row_by_row(layer.forward, bounds)


def _row_by_row(forward: Callable[..., Any], bounds: list[int]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def each_row(*args: Any, **kwargs: Any) -> Any:
        if len(bounds) <= 2:
            return forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ROW_KEYS}
        parts = []
        for start, end in itertools.pairwise(bounds):
            cut = functools.partial(_cut, length=bounds[-1], start=start, end=end)
            parts.append(forward(*map(cut, args), **{name: cut(value) for name, value in kwargs.items()}))
        return _joined(parts)

    return each_row


def _cut(value: Any, length: int, start: int, end: int) -> Any:
    """The part of an argument that belongs to some of ``length`` tokens: of (1, tokens, …), (…, tokens, tokens) masks,
    and (…, tokens) positions."""
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(one, length, start, end) for one in value)
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    if value.shape[1] == length:
        return value[:, start:end]
    if value.ndim == 2 and value.shape[0] == length:
        return value[start:end]
    if value.ndim >= 3 and value.shape[-1] == length and (value.ndim == 4 or not value.is_floating_point()):
        value = value[..., start:end]
        return value[..., start:end, :] if value.ndim == 4 and value.shape[-2] == length else value
    return value


def _joined(parts: list[Any]) -> Any:
    """What a layer gives for all rows; weights of attention, (…, tokens, tokens), cannot be joined and are left out."""
    first = parts[0]
    if isinstance(first, (tuple, list)):
        return type(first)(_joined(list(one)) for one in zip(*parts, strict=True))
    if not isinstance(first, torch.Tensor) or (first.ndim == 4 and first.shape[-1] == first.shape[-2]):
        return None
    return torch.cat(parts, dim=0 if first.ndim == 2 else 1)
