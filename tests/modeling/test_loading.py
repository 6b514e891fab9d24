"""Loading from local folders: what is accepted, what is refused, and what is counted without loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import llama, word_tokenizer

from rayswift.errors import UserError
from rayswift.modeling.loading import (
    add_special_tokens,
    load_model,
    load_tokenizer,
    parameter_counts,
    read_config,
    resolve_dtype,
    supports_bfloat16,
)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def set_config(model_dir: Path, **changes: Any) -> None:
    config = json.loads((model_dir / "config.json").read_text()) | changes
    (model_dir / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_load_model_gives_the_saved_weights_in_the_dtype_asked_for(model_dir: Path) -> None:
    model = load_model(str(model_dir), torch_dtype="bfloat16", attn_impl="eager", device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    expected = llama().model.layers[0].mlp.up_proj.weight.to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_parameter_counts_match_the_model_for_one_file_and_for_shards(model_dir: Path, tmp_path: Path) -> None:
    total = sum(parameter.numel() for parameter in llama().parameters())
    counts = parameter_counts(str(model_dir))
    assert (counts.parameters, counts.bytes) == (total, 4 * total)
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    counts = parameter_counts(str(tmp_path / "shards"))
    assert (counts.parameters, counts.bytes) == (total, 2 * total)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path, max_shard_size="20KB")
    lost = min(tmp_path.glob("model-00002-*.safetensors"))
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        load_model(str(tmp_path))


def test_resolve_dtype_takes_the_wish_then_the_config_then_what_the_device_computes_fast(model_dir: Path) -> None:
    def resolve(requested: str | None = None, *, use_gpu: bool = False, training: bool = False) -> str:
        return resolve_dtype(requested, str(model_dir), use_gpu, training=training)

    half_on_cpu = "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "float32"
    half_on_gpu = "bfloat16" if supports_bfloat16(True) else "float16"
    set_config(model_dir, dtype="float32")
    assert (resolve(), resolve(use_gpu=True)) == ("float32", "float32")
    assert (resolve(training=True), resolve(training=True, use_gpu=True)) == (half_on_cpu, half_on_gpu)
    assert resolve("float32", training=True) == "float32"
    set_config(model_dir, dtype=None, torch_dtype="float16")
    assert (resolve(), resolve(use_gpu=True)) == (half_on_cpu, "float16")
    set_config(model_dir, torch_dtype="bfloat16")
    assert (resolve(), resolve(use_gpu=True)) == (half_on_cpu, half_on_gpu)
    set_config(model_dir, torch_dtype=None)
    assert resolve() == "float32"
    with pytest.raises(UserError, match="--torch_dtype int7"):
        resolve("int7")


def test_folders_that_are_no_models_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_config(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load_tokenizer(str(tmp_path / "empty"))
    (model_dir / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read_config(str(model_dir))


def test_an_unknown_architecture_is_refused(model_dir: Path) -> None:
    set_config(model_dir, model_type="perceptron", architectures=["PerceptronForCausalLM"])
    with pytest.raises(UserError, match="perceptron"):
        load_model(str(model_dir))


def test_weights_that_do_not_fit_the_config_are_refused(model_dir: Path) -> None:
    set_config(model_dir, num_hidden_layers=3)
    with pytest.raises(UserError, match="lack 9 tensors"):
        load_model(str(model_dir))
    set_config(model_dir, num_hidden_layers=2, intermediate_size=64)
    with pytest.raises(UserError, match=r"cannot be loaded"):
        load_model(str(model_dir))


def test_truncated_weights_are_refused(model_dir: Path) -> None:
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(UserError, match="broken or incomplete"):
        parameter_counts(str(model_dir))
    with pytest.raises(UserError):
        load_model(str(model_dir))


def test_pickle_weights_are_refused_unless_the_user_trusts_them(model_dir: Path) -> None:
    model = llama()
    torch.save(model.state_dict(), model_dir / "pytorch_model.bin")
    (model_dir / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickle"):
        load_model(str(model_dir))
    trusted = load_model(str(model_dir), torch_dtype="float32", model_kwargs={"use_safetensors": False})
    assert torch.equal(trusted.model.norm.weight, model.model.norm.weight)


def test_tokenizer_pads_with_eos_when_it_has_no_pad_token(model_dir: Path) -> None:
    tokenizer = load_tokenizer(str(model_dir))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_new_special_tokens_enlarge_vocabulary_and_embeddings(model_dir: Path) -> None:
    tokenizer, model = load_tokenizer(str(model_dir)), load_model(str(model_dir))
    assert add_special_tokens(model, tokenizer, ["<a>", "<b>", "<c>"]) == 3
    assert tokenizer.encode("w9<b>w9", add_special_tokens=False) == [9, 161, 9]
    assert model.get_input_embeddings().weight.shape == (192, 32)
    assert model(torch.tensor([[162]])).logits.shape[-1] == 192
    assert add_special_tokens(model, tokenizer, ["<a>"]) == 0
