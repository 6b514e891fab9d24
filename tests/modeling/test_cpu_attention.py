"""Attention of joined rows, written out for CPUs, against PyTorch's in float64."""

from __future__ import annotations

import pytest
import torch

from rayswift.modeling import cpu_attention
from rayswift.modeling.cpu_attention import RowAttention


def expected(sides: list[torch.Tensor], lengths: list[int], scaling: float, window: int | None) -> torch.Tensor:
    """Row by row, with a mask."""
    parts = []
    for query, key, value in zip(*(side.split(lengths, dim=1) for side in sides), strict=True):
        back = torch.arange(query.shape[1])[:, None] - torch.arange(query.shape[1])
        mask = (back >= 0) & (back < (window or len(back)))
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=mask, scale=scaling, enable_gqa=True
            )[0]
        )
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_results_and_gradients(
    dtype: torch.dtype, tolerance: float, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "_BLOCK", 16)  # rows of one block, of several, of just one token
    torch.manual_seed(0)
    lengths = [16, 1, 37, 5]
    # As models make them: heads behind tokens; values of a width of their own.
    sides = [torch.randn(59, heads, size, dtype=dtype).transpose(0, 1).requires_grad_()
             for heads, size in ((6, 8), (2, 8), (2, 4))]  # fmt: skip
    exact = [side.detach().double().requires_grad_() for side in sides]
    found, wanted = RowAttention.apply(*sides, lengths, 0.3, window), expected(exact, lengths, 0.3, window)
    weight = torch.randn(wanted.shape, dtype=dtype)
    found_grads = torch.autograd.grad(found, sides, weight)
    wanted_grads = torch.autograd.grad(wanted, exact, weight.double())
    for one, other in zip((found, *found_grads), (wanted, *wanted_grads), strict=True):
        assert one.dtype == dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()
