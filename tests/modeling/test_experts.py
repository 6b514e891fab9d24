"""``--experts_impl``: how the experts of a mixture are computed, on a tiny one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import llama

from rayswift.arguments import make_arguments
from rayswift.modeling.loading import load_model


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("mixture")
    MixtralForCausalLM(MixtralConfig(**sizes)).save_pretrained(folder)
    return folder


def test_experts_are_computed_as_asked_and_give_the_same(mixture: Path) -> None:
    import torch

    ids, found = torch.arange(8)[None], {}
    for asked in ("eager", "batched_mm"):
        args = make_arguments("sft", model=str(mixture), dataset=["d"], experts_impl=asked)
        model = load_model(str(mixture), torch_dtype="float32", model_kwargs=args.model_kwargs)
        assert model.config._experts_implementation == asked
        with torch.no_grad():
            found[asked] = model(input_ids=ids).logits
    torch.testing.assert_close(found["eager"], found["batched_mm"], rtol=1e-4, atol=1e-5)


def test_a_model_without_experts_says_that_the_flag_changes_nothing(mixture: Path) -> None:
    from rayswift.train.model import remarks

    args = make_arguments("sft", model="m", dataset=["d"], experts_impl="eager", train_type="full")
    assert remarks(llama(), args) == ["--experts_impl has no effect here: the model is no mixture of experts"]
    assert remarks(load_model(str(mixture), torch_dtype="float32"), args) == []
