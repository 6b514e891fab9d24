"""Causal attention of joined rows on CPUs, written out: matrix products by oneDNN, softmax in float32.

PyTorch's own kernel for CPUs takes twice as long, forward and backward, for rows of some hundred tokens; both keep
only queries, keys, values and the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

#: Queries of a row that are scored at once, so that what a long row needs grows with its length, not its square.
_BLOCK = 512


class RowAttention(torch.autograd.Function):
    """``apply(query, key, value, lengths, scaling, window)``: each row of a joined sequence attends to itself.

    ``query`` (heads, tokens, head size), ``key`` and ``value`` (key heads, tokens, head size), one floating dtype;
    ``lengths`` of the rows; ``window``: tokens that a position sees back, itself included, None for all. Returns
    (heads, tokens, head size), in memory token by token, as the output projection reads it. Scores, softmax and their
    gradients are float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        lengths: list[int],
        scaling: float,
        window: int | None,
    ) -> torch.Tensor:
        heads, tokens, _ = query.shape
        result = query.new_empty(tokens, heads, value.shape[-1]).transpose(0, 1)
        with torch.autocast("cpu", enabled=False), _products_by_onednn(query.dtype):
            for rows, seen in _blocks(lengths, window):
                weights = _weights(query, key, rows, seen, scaling, window).to(value.dtype)
                result[:, rows] = torch.bmm(weights, value[:, seen]).view(result[:, rows].shape)
        ctx.save_for_backward(query, key, value, result)
        ctx.settings = lengths, scaling, window
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, result = ctx.saved_tensors
        lengths, scaling, window = ctx.settings
        grad = grads[0].to(value.dtype)
        groups, heads, size = len(key), len(query), query.shape[-1]
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros(side.shape, dtype=torch.float32) for side in (key, value))
        with _products_by_onednn(query.dtype):
            for rows, seen in _blocks(lengths, window):
                weights = _weights(query, key, rows, seen, scaling, window)
                of_rows = grad[:, rows].reshape(groups, -1, value.shape[-1])
                means = (of_rows.float() * result[:, rows].reshape(of_rows.shape)).sum(dim=-1, keepdim=True)
                of_value[:, seen] += torch.bmm(weights.to(grad.dtype).transpose(1, 2), of_rows)
                of_weights = torch.bmm(of_rows.float(), value[:, seen].float().transpose(1, 2))
                of_scores = of_weights.sub_(means).mul_(weights).mul_(scaling).to(query.dtype)
                of_query[:, rows] = torch.bmm(of_scores, key[:, seen]).view(heads, -1, size)
                of_key[:, seen] += torch.bmm(of_scores.transpose(1, 2), query[:, rows].reshape(groups, -1, size))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


@contextmanager
def _products_by_onednn(dtype: torch.dtype) -> Iterator[None]:
    """Float32 products of ``dtype`` values by oneDNN, which is a fifth faster than MKL where both compute in float32.

    PyTorch gives it those that it may compute from bfloat16 parts, summed in float32: of bfloat16 values, the same.
    """
    mkldnn: Any = torch.backends.mkldnn
    settings = mkldnn.matmul
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _blocks(lengths: list[int], window: int | None) -> Iterator[tuple[slice, slice]]:
    """Queries of a row, and the keys that some of them see."""
    first = 0
    for length in lengths:
        for start in range(first, first + length, _BLOCK):
            end = min(start + _BLOCK, first + length)
            yield slice(start, end), slice(first if window is None else max(first, start - window + 1), end)
        first += length


def _weights(
    query: torch.Tensor, key: torch.Tensor, rows: slice, seen: slice, scaling: float, window: int | None
) -> torch.Tensor:
    """Softmax of the scores, float32 (key heads, query heads of one × queries, keys)."""
    groups, queries, keys = len(key), rows.stop - rows.start, seen.stop - seen.start
    by_group = query[:, rows].unflatten(0, (groups, -1)).to(torch.float32, memory_format=torch.contiguous_format)
    products = torch.bmm(by_group.flatten(1, 2), key[:, seen].float().transpose(1, 2)).view(-1, queries, keys)
    ahead = rows.start - seen.start
    hidden = torch.full((queries, keys), -math.inf).triu_(ahead + 1)
    if window is not None:
        hidden += torch.full((queries, keys), -math.inf).tril_(ahead - window)
    return torch.softmax(torch.add(hidden, products, alpha=scaling), dim=-1).view(groups, -1, keys)
