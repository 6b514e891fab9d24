"""Exact attention over several rows joined to one sequence, on every device.

Transformers' ``sdpa`` keeps joined rows apart with a dense (tokens × tokens) mask. Here each row attends to itself
alone: no mask, and no work across rows. Registered with Transformers as ``rayswift_varlen``; batches without
``cu_seq_lens_q`` (padded ones, in evaluation) go the usual ``sdpa`` way. ``rayswift_fused`` is the same in one call for
all rows: PyTorch's own FlashAttention, for half precision on GPUs. (Transformers takes whatever has "flash" in its name
for a package's.)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rayswift.modeling.cpu_attention import RowAttention

NAME, FUSED = "rayswift_varlen", "rayswift_fused"


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a joined sequence.

    Args:
        query: (1, heads, tokens, head size); ``key`` and ``value`` with their own number of heads.
        cu_seq_lens_q: int32 (rows + 1,), where rows start; None for an ordinary batch.
        sliding_window: tokens that a position sees back, itself included; None for all.

    Returns:
        (1, tokens, heads, head size), and no weights.
    """
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    is_plain = softcap is None and sinks is None
    is_written_out = is_plain and query.device.type == "cpu" and attention_mask is None and not dropout
    if cu_seq_lens_q is None and is_plain:
        is_causal = kwargs.get("is_causal") is not False and getattr(module, "is_causal", True)
        if not is_written_out or not is_causal or query.shape[2] != key.shape[2]:
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    lengths = [query.shape[2]] if cu_seq_lens_q is None else row_lengths(cu_seq_lens_q)
    if is_written_out:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
        sides = (side.to(dtype).transpose(0, 1).flatten(1, 2) for side in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = RowAttention.apply(*sides, lengths * len(query), scale, sliding_window)
        return attended.unflatten(1, (len(query), -1)).permute(1, 2, 0, 3).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    parts = []
    for q, k, v in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):
        mask = _window_mask(q, sliding_window) if attention_mask is None else attention_mask
        if is_plain:
            part = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
            )
        else:
            part = _written_out(q, k, v, mask, dropout, scaling, softcap, sinks)
        parts.append(part)
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def fused_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As :func:`varlen_attention`; what the kernel does not know (a bent score, a sink, dropout, float32) it refuses.

    Args:
        kwargs: with ``max_length_q``, the tokens of the longest row.
    """
    if cu_seq_lens_q is None:
        return varlen_attention(module, query, key, value, attention_mask, dropout, scaling, sliding_window, **kwargs)
    if dropout or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError(f"{FUSED}: no dropout, no soft-capping and no sinks")
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    bounds, longest = cu_seq_lens_q, kwargs["max_length_q"]
    back = -1 if sliding_window is None else sliding_window - 1
    groups = q.shape[1] != k.shape[1]
    attended: Any = varlen_attn(
        q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(back, 0), enable_gqa=groups
    )
    return attended[None], None


def row_lengths(bounds: torch.Tensor) -> list[int]:
    """The tokens of each row, of ``cu_seq_lens_q``. Where they are not noted at the tensor, the host waits for the
    device."""
    noted: list[int] | None = getattr(bounds, "row_lengths", None)
    return torch.diff(bounds).tolist() if noted is None else noted


def _written_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention whose scores are bent (Gemma 2's ``softcap``) or share their softmax with a weight of each head
    (``sinks`` (heads,) of gpt-oss): neither is known to PyTorch's."""
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(value.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ value


def _window_mask(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """Which positions see which, bool (tokens, tokens), where a window cuts a row; else None."""
    length = query.shape[2]
    if sliding_window is None or length <= sliding_window:
        return None
    positions = torch.arange(length, device=query.device)
    back = positions[:, None] - positions[None, :]
    return (back >= 0) & (back < sliding_window)


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The mask of ``sdpa`` for padded batches; rows that are joined or alone need none."""
    return None if kwargs.get("attention_mask") is None else sdpa_mask(*args, **kwargs)


for _name, _attention in ((NAME, varlen_attention), (FUSED, fused_attention)):
    AttentionInterface.register(_name, _attention)
    AttentionMaskInterface.register(_name, _mask)
