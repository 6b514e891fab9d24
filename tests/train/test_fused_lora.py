"""LoRA as one operation is PEFT's LoRA: results, gradients, and the share that dropout keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rayswift.train import fused_lora
from rayswift.train.fused_lora import fuse_lora


def adapted(p: float = 0.0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Two linear layers with an adapter that has an effect."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.GELU(), torch.nn.Linear(96, 32, bias=False))
    settings = {"r": 4, "lora_alpha": 16, "lora_dropout": p, "target_modules": ["0", "2"], "init_lora_weights": False}
    return get_peft_model(model.to(dtype), LoraConfig(**(settings | changes))).train()


def outcome(model: Any, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The result, the gradient of the input and those of the adapter."""
    torch.manual_seed(1)
    values = torch.randn(3, 7, 64).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = model(values)
    result.float().square().sum().backward()
    return [result, values.grad, *(one.grad for one in model.parameters() if one.grad is not None)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_results_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    peft, fused = adapted(dtype=dtype), adapted(dtype=dtype)
    fuse_lora(fused)
    for wanted, found in zip(outcome(peft, dtype), outcome(fused, dtype), strict=True):
        assert found.dtype == wanted.dtype
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_dropout_drops_what_its_mask_says_and_scales_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[torch.Tensor] = []

    def remembered(values: torch.Tensor, seed: Any, p: float, make: Any = fused_lora._mask) -> Any:
        mask = make(values, seed, p)
        masks.append(mask != 0)
        return mask

    class Remembered(torch.nn.Module):
        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return values * masks.pop(0).view(values.shape) / 0.75

    monkeypatch.setattr(fused_lora, "_mask", remembered)
    fused, peft = adapted(0.25), adapted()
    fuse_lora(fused)
    found = outcome(fused)
    assert torch.equal(masks[0], masks.pop())  # the backward pass has the same
    assert torch.equal(masks[1], masks.pop())
    assert len(masks) == 2
    for layer in peft.modules():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = Remembered()
    for one, other in zip(found, outcome(peft), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_values_are_kept_independently_and_as_often_as_asked(p: float) -> None:
    values = torch.empty(1000, 1001)

    def drawn() -> torch.Tensor:
        mask = fused_lora._mask(values, fused_lora._draw(values, p), p)
        assert mask is not None
        return mask != 0

    torch.manual_seed(0)
    share, keep = fused_lora._kept_share(values, p), drawn()
    assert share == pytest.approx(1 - p, abs=1 / 2**16)
    kept = keep.double()
    spread = (p * (1 - p)) ** 0.5
    assert abs(float(kept.mean()) - (1 - p)) < 5 * spread / 1000
    for step in (1, 2, 3, 4):  # four values come of one draw
        a, b = kept.flatten()[:-step], kept.flatten()[step:]
        assert abs(float(((a - share) * (b - share)).mean()) / spread**2) < 5 / 1000
    assert not torch.equal(keep, drawn())
    torch.manual_seed(0)
    assert torch.equal(keep, drawn())


def test_other_layers_and_other_uses_stay_pefts() -> None:
    dora = adapted(use_dora=True)
    fuse_lora(dora)
    assert "forward" not in vars(dora.base_model.model[0])
    model = adapted(0.5)
    values = torch.randn(4, 64)
    plain = model.get_base_model()
    with torch.no_grad(), model.disable_adapter():
        without = plain(values)
    evaluated = model.eval()(values)
    fuse_lora(model)
    assert torch.equal(model(values), evaluated)
    with model.train().disable_adapter():
        assert torch.equal(model(values), without)
    merged = model.merge_and_unload()
    assert torch.allclose(merged(values), evaluated, rtol=1e-4, atol=1e-4)
