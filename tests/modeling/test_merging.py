"""A merged model computes what base and adapter compute, and is whole or not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, lora_args, randomise_lora, word_tokenizer

from rayswift.errors import UserError
from rayswift.modeling import merging
from rayswift.modeling.adapters import add_lora, load_adapter
from rayswift.modeling.loading import add_special_tokens, load_model, load_tokenizer
from rayswift.modeling.merging import merge_adapter

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def base_and_adapter(tmp_path: Path) -> tuple[str, str]:
    """A base model folder and a checkpoint folder as a LoRA run leaves it (no tokenizer, but args.json)."""
    llama().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    model = add_lora(llama(), lora_args())
    randomise_lora(model)
    model.save_pretrained(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "args.json").write_text(json.dumps({"template": "chatml"}))
    return str(tmp_path / "base"), str(tmp_path / "checkpoint-3")


def test_merged_logits_equal_base_plus_adapter(base_and_adapter: tuple[str, str]) -> None:
    base, adapter = base_and_adapter
    merged = merge_adapter(adapter, base)
    assert merged == adapter + "-merged"
    with torch.no_grad():
        expected = load_adapter(load_model(base, torch_dtype="float32"), adapter).eval()(IDS).logits
        found = load_model(merged, torch_dtype="float32").eval()(IDS).logits
        plain = load_model(base, torch_dtype="float32").eval()(IDS).logits
    assert torch.allclose(found, expected, atol=1e-5, rtol=0)
    assert (found - plain).abs().max() > 1e-2  # the adapter does something


def test_merged_folder_holds_all_that_serving_needs(base_and_adapter: tuple[str, str]) -> None:
    base, adapter = base_and_adapter
    merged = Path(merge_adapter(adapter, base, torch_dtype="bfloat16"))
    assert {path.name for path in merged.iterdir()} >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "args.json",
    }  # fmt: skip
    assert load_tokenizer(str(merged)).chat_template == word_tokenizer().chat_template
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"
    assert not [path for path in merged.parent.iterdir() if path.name.startswith(".")]


def test_a_whole_merged_model_is_reused_and_a_broken_or_old_one_replaced(base_and_adapter: tuple[str, str]) -> None:
    base, adapter = base_and_adapter
    weights = Path(merge_adapter(adapter, base)) / "model.safetensors"
    first = weights.stat()
    merge_adapter(adapter, base)
    assert weights.stat() == first
    weights.write_bytes(weights.read_bytes()[:-10])
    merge_adapter(adapter, base)
    assert weights.stat().st_size == first.st_size
    # An adapter in its place, older than the merged model; another base; another dtype.
    second = weights.read_bytes()
    changed = load_file(Path(adapter) / "adapter_model.safetensors")
    save_file({name: tensor * 2 for name, tensor in changed.items()}, Path(adapter) / "adapter_model.safetensors")
    os.utime(Path(adapter) / "adapter_model.safetensors", (1, 1))
    merge_adapter(adapter, base)
    third = weights.read_bytes()
    assert third != second
    tensors = load_file(Path(base) / "model.safetensors")
    save_file(
        {name: tensor * 2 for name, tensor in tensors.items()}, Path(base) / "model.safetensors", {"format": "pt"}
    )
    merge_adapter(adapter, base)
    assert weights.read_bytes() != third
    merge_adapter(adapter, base, torch_dtype="float32")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}


def test_what_a_killed_merge_left_is_removed_and_a_living_one_kept(
    base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    base, adapter = base_and_adapter
    left, living = (Path(f"{Path(adapter).parent}/.{Path(adapter).name}-merged-{name}") for name in ("dead", "alive"))
    for folder in (left, living):
        (folder / "new").mkdir(parents=True)
        os.utime(folder, (1, 1))
    lock = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", lock, str(living)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    merge_adapter(adapter, base)
    holder.communicate("\n")
    assert (left.exists(), living.exists()) == (False, True)


def test_a_model_that_another_process_merged_meanwhile_stays(
    base_and_adapter: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = base_and_adapter
    other = Path(merge_adapter(adapter, base, str(tmp_path / "other")))
    target, write = Path(f"{adapter}-merged"), merging.write_model

    def finished_first(*args: Any) -> None:
        write(*args)
        other.rename(target)

    monkeypatch.setattr(merging, "write_model", finished_first)
    first = (other / "model.safetensors").stat().st_ino
    assert merge_adapter(adapter, base) == str(target)
    assert (target / "model.safetensors").stat().st_ino == first
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_folder_of_the_user_is_never_replaced(base_and_adapter: tuple[str, str], tmp_path: Path) -> None:
    base, adapter = base_and_adapter
    before = sorted(os.listdir(base))
    with pytest.raises(UserError, match="--output_dir"):
        merge_adapter(adapter, base, output_dir=base)
    assert sorted(os.listdir(base)) == before
    assert merge_adapter(adapter, base, output_dir=str(tmp_path / "new" / "place")) == str(tmp_path / "new" / "place")


def test_new_special_tokens_of_the_run_are_part_of_the_merged_model(
    base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    base, _ = base_and_adapter
    tokenizer = load_tokenizer(base)
    model = load_model(base, torch_dtype="float32")
    add_special_tokens(model, tokenizer, ["<a>"])
    trained = add_lora(model, lora_args(modules_to_save=["embed_tokens"]))
    trained.save_pretrained(tmp_path / "with-token")
    merged = merge_adapter(str(tmp_path / "with-token"), base, new_special_tokens=["<a>"])
    assert load_tokenizer(merged).convert_tokens_to_ids("<a>") == 160
    assert load_model(merged).get_input_embeddings().weight.shape[0] == 192


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["all-linear", "all-embedding"]},
        {"target_modules": ["all-linear", "lm_head"]},
        {"target_modules": ["all-embedding", "lm_head"]},
        {"target_modules": ["all-embedding"], "use_dora": True},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
)
def test_embeddings_and_head_that_share_weights_are_two_where_one_was_trained(
    targets: dict[str, Any], base_and_adapter: tuple[str, str], tmp_path: Path
) -> None:
    """`llama` ties them. Each is merged with what was trained on it, not with the other's."""
    base, _ = base_and_adapter
    trained = add_lora(llama(), lora_args(**targets))
    torch.manual_seed(1)
    for parameter in trained.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    trained.save_pretrained(tmp_path / "tied")
    merged = merge_adapter(str(tmp_path / "tied"), base)
    with torch.no_grad():
        expected = trained.eval()(IDS).logits
        assert torch.allclose(load_model(merged, torch_dtype="float32").eval()(IDS).logits, expected, atol=1e-4)
    assert json.loads(Path(merged, "config.json").read_text())["tie_word_embeddings"] is False


def test_merging_a_folder_without_adapter_is_refused(base_and_adapter: tuple[str, str]) -> None:
    base, _ = base_and_adapter
    with pytest.raises(UserError, match="give it as --model"):
        merge_adapter(base, base)
    assert not Path(base + "-merged").exists()
