"""LoRA placement, freezing, adapter files and the parameter line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import llama, lora_args, qwen25_half_billion_on_meta, randomise_lora

from rayswift.errors import UserError
from rayswift.modeling.adapter_folder import base_model_of, lora_rank
from rayswift.modeling.adapters import add_lora, freeze_for_full, load_adapter, parameter_info

FREEZE_DEFAULTS: dict[str, Any] = {"freeze_parameters": [], "trainable_parameters": [], "freeze_parameters_ratio": 0.0}


def freeze_args(**changes: Any) -> Any:
    return SimpleNamespace(**(FREEZE_DEFAULTS | changes))


def trainable_names(model: Any) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_qwen25_half_billion_default_lora_gives_swifts_parameter_line() -> None:
    model = add_lora(qwen25_half_billion_on_meta(), lora_args())
    line = parameter_info(model)
    assert line.startswith("PeftModelForCausalLM: 498.4319M Params (4.3991M Trainable [0.8826%]), ")
    assert line.endswith("M Buffers.")
    assert set(model.peft_config["default"].target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_all_linear_leaves_an_untied_output_head_alone() -> None:
    model = add_lora(llama(tie_word_embeddings=False), lora_args())
    assert not any("lm_head" in name for name in trainable_names(model))
    assert len(trainable_names(model)) == 2 * 7 * 2  # layers x linear layers x (A, B)


def test_target_regex_wins_over_target_modules() -> None:
    model = add_lora(llama(), lora_args(target_regex=r".*layers\.1\..*(q|v)_proj"))
    assert len(trainable_names(model)) == 4
    assert all(".layers.1." in name for name in trainable_names(model))


def test_modules_to_save_train_in_full_beside_the_adapter() -> None:
    model = add_lora(llama(), lora_args(target_modules=["q_proj"], modules_to_save=["all-norm"]))
    assert sum("norm" in name for name in trainable_names(model)) == 5


def test_lora_dtype_sets_the_dtype_of_the_adapter_only() -> None:
    model = add_lora(llama().to(torch.bfloat16), lora_args(lora_dtype="float16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float16}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_adapter_is_float32_beside_half_precision_weights_by_default() -> None:
    model = add_lora(llama().to(torch.bfloat16), lora_args())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"target_modules": ["qproj"]}, "--target_modules qproj"),
        ({"target_modules": []}, "--target_modules"),
        ({"target_regex": "nothing"}, "--target_regex nothing"),
        ({"target_regex": "(q"}, "--target_regex (q"),
        ({"modules_to_save": ["head"]}, "--modules_to_save head"),
        ({"lora_rank": 0}, "--lora_rank 0"),
        ({"lora_rank": 4096}, "--lora_rank 4096"),
        ({"init_weights": "magic"}, "--init_weights magic"),
    ],
)
def test_a_wrong_lora_setting_is_one_line_that_names_the_flag(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError) as caught:
        add_lora(llama(), lora_args(**changes))
    assert flag in str(caught.value)
    assert "\n" not in str(caught.value)


def test_full_training_trains_everything_by_default() -> None:
    model = llama()
    freeze_for_full(model, freeze_args())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freeze_by_prefix_and_trainable_wins() -> None:
    model = llama()
    freeze_for_full(model, freeze_args(freeze_parameters=["model"], trainable_parameters=["model.layers.1.mlp"]))
    assert trainable_names(model) == [f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def test_freeze_ratio_freezes_from_the_input_side() -> None:
    model = llama()
    freeze_for_full(model, freeze_args(freeze_parameters_ratio=0.5))
    frozen = [not parameter.requires_grad for parameter in model.parameters()]
    assert frozen == sorted(frozen, reverse=True)
    total = sum(p.numel() for p in model.parameters())
    share = sum(p.numel() for p in model.parameters() if not p.requires_grad) / total
    assert 0.4 < share <= 0.5


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"freeze_parameters": ["visual"]}, "--freeze_parameters visual"),
        ({"trainable_parameters": ["layers"]}, "--trainable_parameters layers"),
        ({"freeze_parameters_ratio": 1.5}, "--freeze_parameters_ratio 1.5"),
        ({"freeze_parameters_ratio": 1.0}, "--trainable_parameters"),
    ],
)
def test_a_wrong_freeze_setting_is_one_line_that_names_the_flag(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(UserError) as caught:
        freeze_for_full(llama(), freeze_args(**changes))
    assert flag in str(caught.value)


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    model = add_lora(llama(), lora_args())
    randomise_lora(model)
    model.save_pretrained(tmp_path / "checkpoint-1")
    return tmp_path / "checkpoint-1"


def test_a_saved_adapter_loads_and_computes_the_same(adapter_dir: Path) -> None:
    reference = add_lora(llama(), lora_args())
    randomise_lora(reference)
    loaded = load_adapter(llama(), str(adapter_dir))
    ids = torch.arange(3, 20)[None]
    assert torch.equal(reference.eval()(ids).logits, loaded.eval()(ids).logits)
    assert not torch.allclose(llama()(ids).logits, loaded(ids).logits)
    assert trainable_names(loaded) == []


def test_a_saved_adapter_can_go_on_training(adapter_dir: Path) -> None:
    assert len(trainable_names(load_adapter(llama(), str(adapter_dir), is_trainable=True))) == 28


@pytest.mark.parametrize(
    ("config", "rank"),
    [({"r": 8}, 8), ({"r": 8, "rank_pattern": {"q_proj": 32, "v_proj": 4}}, 32), ({"rank_pattern": None}, 0)],
)
def test_the_rank_of_an_adapter_is_the_largest_of_its_layers(config: Any, rank: int, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert lora_rank(str(tmp_path)) == rank


@pytest.mark.parametrize("config", [{"r": "big"}, {"r": 8, "rank_pattern": ["q_proj"]}, {"rank_pattern": {"q": None}}])
def test_a_rank_that_is_no_number_is_named(config: Any, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"adapter_config\.json: r and the values of rank_pattern are whole numbers"):
        lora_rank(str(tmp_path))


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_configuration_that_cannot_be_read_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "adapter_config.json").write_text(text)
    for read in (lora_rank, base_model_of):
        with pytest.raises(UserError, match=r"adapter_config\.json"):
            read(str(tmp_path))


def test_an_adapter_of_another_base_model_is_refused(adapter_dir: Path) -> None:
    with pytest.raises(UserError, match="another base model"):
        load_adapter(llama(hidden_size=64), str(adapter_dir))


def test_an_adapter_of_a_shallower_model_is_refused(adapter_dir: Path) -> None:
    with pytest.raises(UserError, match="lacks 14 weights"):
        load_adapter(llama(num_hidden_layers=3), str(adapter_dir))


def test_broken_adapter_folders_are_named(adapter_dir: Path, tmp_path: Path) -> None:
    weights = adapter_dir / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="broken or incomplete"):
        load_adapter(llama(), str(adapter_dir))
    weights.rename(adapter_dir / "adapter_model.bin")
    with pytest.raises(UserError, match="pickle"):
        load_adapter(llama(), str(adapter_dir))
    (adapter_dir / "adapter_config.json").write_text(json.dumps({"r": 8}))
    with pytest.raises(UserError, match="no peft_type"):
        load_adapter(llama(), str(adapter_dir))
    (adapter_dir / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_adapter(llama(), str(adapter_dir))
    with pytest.raises(UserError, match="no such folder"):
        load_adapter(llama(), str(tmp_path / "nowhere"))
