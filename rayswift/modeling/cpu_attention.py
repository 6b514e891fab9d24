"""Causal attention of joined rows on CPUs, written out: matrix products by MKL and oneDNN, softmax in float32.

PyTorch's own kernel for CPUs takes a third longer, forward and backward, for rows of some hundred tokens; both keep
only queries, keys, values and the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

#: Queries of a row that are scored at once, so that what a long row needs grows with its length, not its square.
_BLOCK = 512


class RowAttention(torch.autograd.Function):
    """``apply(query, key, value, lengths, scaling, window)``: each row of a joined sequence attends to itself.

    ``query`` (heads, tokens, head size), ``key`` and ``value`` (key heads, tokens, head size), one floating dtype;
    ``lengths`` of the rows; ``window``: tokens that a position sees back, itself included, None for all. Returns
    (heads, tokens, head size). Scores, softmax and their gradients are float32.
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
        result = query.new_empty(*query.shape[:2], value.shape[-1])
        with torch.autocast("cpu", enabled=False):
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
        heads, _, size = query.shape
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros(side.shape, dtype=torch.float32) for side in (key, value))
        means = (grad.float() * result.float()).sum(dim=-1)
        for rows, seen in _blocks(lengths, window):
            weights = _weights(query, key, rows, seen, scaling, window)
            of_rows = grad[:, rows].reshape(len(key), -1, value.shape[-1])
            of_value[:, seen] += torch.bmm(weights.to(grad.dtype).transpose(1, 2), of_rows)
            of_weights = torch.bmm(of_rows.float(), value[:, seen].float().transpose(1, 2))
            of_weights.sub_(means[:, rows].reshape(len(key), -1, 1))
            of_scores = of_weights.mul_(weights).mul_(scaling).to(query.dtype)
            of_query[:, rows] = torch.bmm(of_scores, key[:, seen]).view(heads, -1, size)
            of_key[:, seen] += torch.bmm(of_scores.transpose(1, 2), query[:, rows].reshape(len(key), -1, size))
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None, None


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
    scaled = query[:, rows].float().mul(scaling).reshape(groups, -1, query.shape[-1])
    scores = torch.bmm(scaled, key[:, seen].float().transpose(1, 2)).view(-1, queries, keys)
    back = torch.arange(rows.start, rows.stop)[:, None] - torch.arange(seen.start, seen.stop)
    hidden = back < 0 if window is None else (back < 0) | (back >= window)
    scores += torch.zeros(queries, keys).masked_fill_(hidden, -math.inf)
    return torch.softmax(scores, dim=-1).view(groups, -1, keys)
