"""Adapters of other programs: what their configuration asks of the base, of engines and of training."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import llama, word_tokenizer

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.generate.model_spec import model_specs
from rayswift.modeling.adapter_kinds import changes_base, only_merged
from rayswift.modeling.adapters import add_adapter, load_adapter
from rayswift.modeling.loading import load_model
from rayswift.modeling.merging import merge_adapter
from rayswift.train.model import find_model

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def base(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def saved_by_peft(base: str, folder: Path, **config: Any) -> tuple[str, torch.Tensor]:
    """An adapter as PEFT saves it without being told how it began, and what it says."""
    model = load_model(base, torch_dtype="float32")
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **config)
    model = get_peft_model(model, settings).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.5
    model.save_pretrained(folder)
    with torch.no_grad():
        return str(folder), model(IDS).logits


@pytest.mark.parametrize("way", ["pissa", "olora"])
def test_an_adapter_that_changes_its_base_is_merged_but_never_put_beside_others(
    way: str, base: str, tmp_path: Path
) -> None:
    adapter, expected = saved_by_peft(base, tmp_path / "adapter", init_lora_weights=way)
    merged = load_model(merge_adapter(adapter, base), torch_dtype="float32").eval()
    with torch.no_grad():
        assert torch.allclose(merged(IDS).logits, expected, atol=1e-4)
    model = load_model(base, torch_dtype="float32").eval()
    with torch.no_grad():
        plain = model(IDS).logits
        with pytest.raises(UserError, match=f"changes the base .*init_lora_weights {way}.*--merge_lora true"):
            add_adapter(model, adapter, "x")
        assert torch.equal(model(IDS).logits, plain)
    with pytest.raises(UserError, match="merge it first"):
        load_adapter(model, adapter, is_trainable=True)
    with pytest.raises(UserError, match="merge it first"):
        find_model(make_arguments("sft", model=base, dataset=["d"], adapters=[adapter]))
    for engine in ("vllm", "transformers"):
        with pytest.raises(UserError, match="changes the base"):
            model_specs(make_arguments("deploy", model=base, adapters=[adapter], infer_backend=engine, use_gpu=False))


@pytest.mark.parametrize("way", ["pissa_niter_4", "PiSSA_niter_16", "corda", "lora_ga"])
def test_an_adapter_whose_base_nobody_has_is_refused_by_every_command(way: str, base: str, tmp_path: Path) -> None:
    adapter, _ = saved_by_peft(base, tmp_path / "adapter")
    path = Path(adapter, "adapter_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": way}))
    with pytest.raises(UserError, match=f"{way.lower()}.*path_initial_model_for_weight_conversion") as refused:
        merge_adapter(adapter, base)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="no model fits it"):
        load_adapter(load_model(base), adapter)
    with pytest.raises(UserError, match="no model fits it"):
        model_specs(make_arguments("deploy", model=base, adapters=[adapter], infer_backend="vllm", use_gpu=False))


@pytest.mark.parametrize(
    ("config", "tensors", "says"),
    [
        ({}, ["q_proj.lora_A.weight"], None),
        ({"init_lora_weights": "gaussian", "use_rslora": True, "rank_pattern": {"q": 4}, "bias": "none"}, [], None),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "loftq_config": {}}, [], None),
        ({"init_lora_weights": "loftq"}, [], "loftq"),
        ({"kasa_config": {"beta": 1}}, [], "kasa"),
        ({"bias": "all"}, [], r"has biases \(bias all\)"),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, [], "has DoRA, whole layers"),
        ({"trainable_token_indices": [1]}, [], "trained tokens"),
        ({"alora_invocation_tokens": [1]}, [], "invocation tokens"),
        ({}, ["model.embed_tokens.lora_embedding_A"], "has embeddings"),
        ({}, ["q_proj.lora_A.weight", "model.embed_tokens.weight"], "has embeddings"),  # of a resized vocabulary
        ({}, ["mlp.experts.base_layer.lora_A.weight"], None),
        ({"peft_type": "IA3"}, [], "is IA3"),
    ],
)
def test_what_is_served_merged_only(config: dict[str, Any], tensors: list[str], says: str | None) -> None:
    reason = only_merged({"peft_type": "LORA", **config}, tensors)
    assert reason is None if says is None else re.search(says, str(reason)) and "--merge_lora true" in str(reason)


def test_every_initialisation_of_peft_that_changes_the_base_is_known(base: str) -> None:
    """Those that need neither data nor gradients are tried."""
    for way in (True, False, "gaussian", "orthogonal", "mica", "olora", "pissa", "pissa_niter_2", "eva"):
        model = llama()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        config = LoraConfig(r=8, target_modules=["q_proj"], init_lora_weights=way)
        inner = get_peft_model(model, config).get_base_model()
        changed = any(
            not torch.equal(parameter, before[name.replace(".base_layer", "")])
            for name, parameter in inner.named_parameters()
            if "lora_" not in name
        )
        assert changed == (changes_base(config.to_dict()) is not None), way


def test_training_says_by_the_flag_which_adapters_are_served_merged_only(caplog: pytest.LogCaptureFixture) -> None:
    for flags, says in (
        ({"lora_bias": "all"}, "--lora_bias all: no engine applies"),
        ({"target_modules": ["all-linear", "all-embedding"]}, "--target_modules with embeddings: no engine"),
        ({"use_dora": True, "modules_to_save": ["lm_head"]}, "--use_dora true, --modules_to_save: no engine"),
        ({"init_weights": "false"}, "training starts from another model"),
        ({}, ""),
    ):
        caplog.clear()
        make_arguments("sft", model="m/m", dataset=["d"], **flags)
        assert (says in caplog.text) if says else not caplog.text


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"lora_bias": "all"}, "--lora_bias all: with rlhf"),
        ({"target_modules": ["all-linear", "lm_head"]}, "--target_modules lm_head: rlhf"),
        ({"init_weights": "false"}, "--init_weights false: the reference"),
    ],
)
def test_adapters_that_cannot_be_compared_with_the_model_are_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        make_arguments("rlhf", model="m/m", dataset=["d"], **flags)


def test_an_adapter_with_biases_is_no_beginning_for_rlhf(base: str, tmp_path: Path) -> None:
    adapter, _ = saved_by_peft(base, tmp_path / "adapter", bias="all")
    with pytest.raises(UserError, match=r"--adapters .*biases"):
        find_model(make_arguments("rlhf", model=base, dataset=["d"], adapters=[adapter]))


def test_an_adapter_of_shards_alone_cannot_begin_as_a_part_of_the_base() -> None:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    with pytest.raises(UserError, match="--init_weights olora needs stage3_gather_16bit"):
        make_arguments("sft", model="m/m", dataset=["d"], init_weights="olora", deepspeed=config)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    make_arguments("sft", model="m/m", dataset=["d"], init_weights="olora", deepspeed=config)
