"""RMSNorm and gated MLPs as one operation each give what the model's own give, in every architecture, and keep less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_loss_head import FEW, MORE, OTHERS, SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rayswift.train.fused_layers import fuse_layers
from tests.tiny_models import llama

#: How many norms and MLPs of two layers are fused, where it is not five and two: two norms a layer and one at the end.
COUNTS = {
    "bloom": (0, 0), "cohere": (0, 2), "falcon_h1": (5, 2), "gemma2": (9, 2), "gemma3_text": (13, 2), "glm": (5, 0),
    "gpt2": (0, 0), "gpt_neox": (0, 0), "gpt_oss": (5, 0), "mixtral": (5, 0), "olmo2": (9, 2), "opt": (0, 0),
    "phi": (0, 0), "phi3": (5, 0), "qwen3": (9, 2), "qwen3_moe": (9, 0), "stablelm": (0, 2), "starcoder2": (0, 0),
}  # fmt: skip


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SMALL | MORE.get(name, {}))))
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()  # some have dropout


def passed(model: Any, autocast: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of their summed squares."""
    input_ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=input_ids).logits
    logits.float().square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return logits.detach(), gradients


def fused(model: Any) -> tuple[int, int]:
    """How many norms and MLPs are."""
    layers = [layer for layer in model.modules() if layer is not model and "forward" in vars(layer)]
    norms = sum(hasattr(layer, "rms_norm") for layer in layers)
    return norms, len(layers) - norms


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_logits_are_the_models_own_and_gradients_too(name: str) -> None:
    model = model_of(name)
    ways = {"float32": (torch.float32, False), "mixed": (torch.float32, True), "bfloat16": (torch.bfloat16, False)}

    def all_ways() -> dict[str, Any]:
        return {way: passed(copy.deepcopy(model).to(dtype), autocast) for way, (dtype, autocast) in ways.items()}

    wanted = all_ways()
    fuse_layers(model)
    assert fused(model) == COUNTS.get(name, (5, 2))
    for way, (logits, gradients) in all_ways().items():
        own_logits, own_gradients = wanted[way]
        assert torch.equal(logits, own_logits), way
        assert gradients.keys() == own_gradients.keys()
        bound = 1e-5 if way == "float32" else 0.03
        for key, value in own_gradients.items():
            assert float((gradients[key] - value).float().norm()) <= bound * float(value.float().norm()) + 1e-9, key


def test_half_of_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a gated MLP gate and up, of a norm its input: not what the layers behind them read."""
    from rayswift.train import made_again

    found = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other gets its place
        return tensor

    def kept(model: Any) -> int:
        found.clear()
        parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16),
        ):
            model(input_ids=torch.zeros(1, 512, dtype=torch.int64), use_cache=False)
        return sum(one.untyped_storage().nbytes() for place, one in found.items() if place not in parameters)

    wide = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    model = llama(**wide)
    before = kept(model)
    fuse_layers(model)
    own = made_again._keep

    def keep(tensor: torch.Tensor) -> Any:
        known = own(tensor)
        return note(known) if isinstance(known, torch.Tensor) else known

    monkeypatch.setattr(made_again, "_keep", keep)
    after = kept(model)
    assert after < 0.55 * before


def test_a_result_that_was_changed_is_kept() -> None:
    """What would be made again is the result as it was before."""
    from rayswift.train.made_again import made_again

    norm = llama(num_hidden_layers=1).model.norm
    layer = nn.ModuleList([norm])
    layer.get_base_model = lambda: layer
    fuse_layers(layer)
    values = torch.randn(3, norm.weight.shape[0], requires_grad=True)
    with made_again():
        changed = norm(values).mul_(2)
        changed.pow(3).sum().backward()
    (own,) = torch.autograd.grad((2 * type(norm).forward(norm, values)).pow(3).sum(), values)
    assert values.grad is not None and torch.allclose(values.grad, own, rtol=1e-4, atol=1e-6)


def test_a_forward_of_the_models_own_stays() -> None:
    """Accelerate's hooks are one."""
    model, asked = llama(num_hidden_layers=1), []
    own = model.forward
    model.forward = lambda **inputs: (asked.append(1), own(**inputs))[1]
    fuse_layers(model)
    model(input_ids=torch.zeros(1, 4, dtype=torch.int64)).logits.sum().backward()
    assert asked
    assert fused(model) == (3, 1)


def test_only_what_linear_layers_read_gets_their_dtype() -> None:
    """The norms of queries and keys go on to the rotation, which is float32 where the norm is."""
    model = model_of("qwen3")
    fuse_layers(model)
    layer = model.model.layers[0]
    assert layer.input_layernorm.rms_norm.for_products
    assert layer.post_attention_layernorm.rms_norm.for_products
    assert not layer.self_attn.q_norm.rms_norm.for_products
    assert not model.model.norm.rms_norm.for_products  # the model gives it to whoever asks


def test_what_is_another_layer_stays() -> None:
    class HalfRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.weight * values * torch.rsqrt(values.abs().mean(-1, keepdim=True) + self.eps)

    model = llama(num_hidden_layers=1, hidden_size=32)
    model.model.norm = HalfRMSNorm()
    model.model.layers[0].mlp.act_fn = nn.PReLU()  # its weight is trained
    fuse_layers(model)
    assert fused(model) == (2, 0)


def test_layers_of_one_class_are_looked_at_one_by_one() -> None:
    """DeepSeek's norms differ in eps; Gemma 3n's MLPs, in what their first layers drop."""
    model = llama(num_hidden_layers=2)
    first, second = model.model.layers
    first.input_layernorm.variance_epsilon = 0.5
    del second.input_layernorm.weight
    second.input_layernorm.weight = None
    own = type(second.mlp).forward
    second.mlp.__class__ = type(
        "OtherMLP", (type(second.mlp),), {"forward": lambda self, x: own(self, x) * self.factor}
    )
    first.mlp.__class__ = second.mlp.__class__
    first.mlp.factor, second.mlp.factor = 1.0, 2.0
    del first.mlp.act_fn
    first.mlp.act_fn = torch.nn.functional.silu  # a function, in models with code of their own
    fuse_layers(model)
    assert first.input_layernorm.rms_norm.eps == 0.5
    assert not hasattr(second.input_layernorm, "rms_norm")
    assert ("forward" in vars(first.mlp), "forward" in vars(second.mlp)) == (True, False)
