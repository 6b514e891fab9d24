"""The loss at the output layer is the model's own, to its gradients, in every architecture; the others keep theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from rayswift.train import loss as loss_module
from rayswift.train.loss import find_loss_head
from tests.tiny_models import llama

SMALL = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.25},
    "falcon_h1": {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gemma2": {"final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "gpt2": {"n_layer": 2, "n_head": 4, "n_embd": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granite": {"logits_scaling": 8.0},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
#: Plain, bent, scaled, with a bias; the others in -m slow.
FEW = ["gemma2", "granite", "llama", "phi"]
OTHERS = [
    "bloom", "cohere", "falcon_h1", "gemma", "gemma3_text", "glm", "gpt2", "gpt_neox", "gpt_oss", "mistral", "mixtral",
    "olmo2", "opt", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip


def batch_of(vocabulary: int = 128) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows, their labels (some not trained, one row's last token among them), and weights."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, vocabulary, (2, 9))
    labels = input_ids.clone()
    labels[0, :4] = labels[1, -2:] = -100
    return input_ids, labels, torch.rand(2, 9) * 2


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def own_loss(model: Any, weights: torch.Tensor | None = None) -> torch.Tensor:
    input_ids, labels, _ = batch_of()
    logits = model(input_ids=input_ids).logits[:, :-1].float().flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="none")
    return (losses if weights is None else losses * weights[:, 1:].flatten()).sum()


def head_loss(model: Any, head: Any, weights: torch.Tensor | None = None) -> Any:
    input_ids, labels, _ = batch_of()
    with head.scoring(labels, weights) as found:
        model(input_ids=input_ids)
    return found[0]


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5 * largest), name


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_loss_and_gradients_are_those_of_all_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_BYTES_CPU", 0)  # of 16 positions, the fewest
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(SMALL | MORE.get(name, {}))))
    model.config.use_cache = False
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    wanted = own_loss(model)
    wanted.backward()
    expected = gradients(model)
    head = find_loss_head(model)
    assert head is not None
    scored = head_loss(model, head)
    assert float(scored.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    scored.loss.backward()
    same(gradients(model), expected)
    # Outside of a block the model gives its logits.
    input_ids, labels, _ = batch_of()
    logits = model(input_ids=input_ids).logits
    trained = labels[:, 1:] != -100
    assert int(scored.right) == int((logits[:, :-1].argmax(-1) == labels[:, 1:])[trained].sum())


def test_weights_and_label_smoothing() -> None:
    model = llama(vocab_size=128).train()
    weights = batch_of()[2]
    wanted = own_loss(model, weights)
    wanted.backward()
    expected = gradients(model)
    head = find_loss_head(model, label_smoothing=0.1)
    assert head is not None
    head.label_smoothing = 0.0
    scored = head_loss(model, head, weights)
    scored.loss.backward()
    assert float(scored.loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    same(gradients(model), expected)

    input_ids, labels, _ = batch_of()
    smooth = LabelSmoother(0.1)(model(input_ids=input_ids), labels, shift_labels=True, num_items_in_batch=1)
    smooth.backward()
    expected = gradients(model)
    head.label_smoothing = 0.1
    scored = head_loss(model, head)
    scored.loss.backward()
    assert float(scored.loss.detach()) == pytest.approx(float(smooth.detach()), rel=1e-5)
    same(gradients(model), expected)


def test_a_batch_that_trains_nothing_has_a_loss_of_nothing() -> None:
    model = llama(vocab_size=128)
    head = find_loss_head(model)
    assert head is not None
    with head.scoring(torch.full((1, 4), -100)) as found:
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    found[0].loss.backward()
    assert float(found[0].loss) == 0
    assert all(not value.any() for value in gradients(model).values())


def test_a_loss_with_further_parts_stays_the_models_own() -> None:
    """The balance of experts is part of it here; an adapter on the output layer is no plain layer."""
    config = AutoConfig.for_model("mixtral", **SMALL, num_local_experts=4, output_router_logits=True)
    model = AutoModelForCausalLM.from_config(config)
    before = model.lm_head.forward
    assert find_loss_head(model) is None
    assert model.lm_head.forward == before

    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(vocab_size=128), LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert find_loss_head(adapted) is None


def test_memory_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that the loss makes, of a vocabulary as large as those of today's models."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(one.numel() * one.element_size() for one in [out] if isinstance(one, torch.Tensor))
            return out

    layer = torch.nn.Linear(8, 250_000, bias=False).requires_grad_(False)
    hidden = torch.randn(150, 8, requires_grad=True)
    labels = torch.randint(250_000, (150,))
    with Sizes():
        loss_module._HeadLoss.apply(hidden, layer.weight, None, labels, None, loss_module._Bend(), 0.0)
    assert max(sizes) <= loss_module.GROUP_BYTES_CPU

    # Of weights that are trained: nothing is larger than their gradient, which few sums are made into.
    adds = 0

    class Adds(Sizes):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal adds
            adds += "add_" in str(func) and args[0].shape == layer.weight.shape
            return super().__torch_dispatch__(func, types, args, kwargs)

    layer, hidden = torch.nn.Linear(64, 20_000, bias=False), torch.randn(150, 64)
    labels, sizes[:] = torch.randint(20_000, (150,)), []
    with monkeypatch.context() as small, Adds():
        small.setattr(loss_module, "CHUNK_BYTES_CPU", 2**20)  # chunks of 16 tokens
        loss_module._HeadLoss.apply(hidden, layer.weight, None, labels, None, loss_module._Bend(), 0.0)
    assert max(sizes) <= 4 * layer.weight.numel()
    assert adds == 2
