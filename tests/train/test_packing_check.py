"""Joined rows are exact in every architecture, or refused before anything is encoded, naming the layer that mixes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rayswift.cluster import Workers
from rayswift.data.tokens.table import TokenizedRow
from rayswift.errors import UserError
from rayswift.modeling.packed_rows import keep_rows_apart
from rayswift.modeling.varlen_attention import NAME
from rayswift.train import packing
from rayswift.train.collate import flatten
from rayswift.train.config import PackedPlan
from rayswift.train.packing_check import check_packing

CHOICES = [NAME, "sdpa", "eager"]
SMALL = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


def config_of(name: str, **changes: Any) -> Any:
    return AutoConfig.for_model(name, **(SMALL | changes))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the check runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plan_of(config: Any, choices: list[str] = CHOICES, longest: int | None = None) -> PackedPlan:
    return check_packing(config, choices, torch.float32, "cpu", longest)


@torch.no_grad()
def error_of(config: Any, plan: PackedPlan) -> float:
    """How far the logits of three joined rows are from those of each alone, of the largest: with the same attention,
    and with the model's own. The rows are others than the check's, and longer."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    rows = [torch.randint(5, 100, (length,)) for length in (29, 5, 17)]
    own = torch.cat([model(input_ids=row[None], use_cache=False).logits[0] for row in rows])
    model.set_attn_implementation(plan.attention)
    keep_rows_apart(model.train(), plan.by_row)

    def joined(together: list[torch.Tensor]) -> torch.Tensor:
        batch = flatten([TokenizedRow(row.numpy().astype(np.int32), row.numpy()) for row in together])
        batch.pop("labels")
        return model(**batch, use_cache=False).logits[0]

    found, alone = joined(rows), torch.cat([joined([row]) for row in rows])
    errors = [float((found - other).abs().max() / own.abs().max()) for other in (alone, own)]
    return max(errors[0], errors[1] / 10)  # ten times as much for another way of attention


@pytest.mark.parametrize(
    ("config", "by_row"),
    [
        (config_of("llama"), ()),
        (config_of("gemma2", query_pre_attn_scalar=32, sliding_window=8), ()),
        (config_of("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=8), ()),
        (config_of("qwen3_5_text", **DELTA_NET), ("Qwen3_5GatedDeltaNet",)),
        (config_of("lfm2", layer_types=["conv", "full_attention"]), ("Lfm2ShortConv",)),
        (config_of("stablelm"), ("StableLmAttention",)),
    ],
    ids=lambda value: getattr(value, "model_type", None) or "",
)
def test_joined_rows_are_what_they_are_alone(config: Any, by_row: tuple[str, ...]) -> None:
    plan = plan_of(config)
    assert plan == PackedPlan(NAME, by_row)
    assert error_of(config, plan) < 1e-4
    # And it is the plan that makes it so.
    assert not by_row or error_of(config, PackedPlan(NAME)) > 1e-2


@pytest.mark.parametrize(
    ("config", "choices", "message"),
    [
        (AutoConfig.for_model("bloom", n_layer=2, hidden_size=64, n_head=2, vocab_size=128), CHOICES,
         "bloom does not keep joined rows apart .a row sees the one before it, in BloomAttention.; drop the flag"),
        (config_of("llama4_text", attention_chunk_size=128, num_local_experts=2), CHOICES,
         "rows are not what they are alone, in Llama4TextAttention"),
        (config_of("llama"), ["no_such_attention"], "--attn_impl no_such_attention: "),
    ],
    ids=["bloom", "llama4", "unknown"],
)  # fmt: skip
def test_what_mixes_rows_is_named(config: Any, choices: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(config, choices)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_layers_that_take_one_row_at_a_time(checkpointing: bool) -> None:
    """Also where layers are computed again on the way back."""
    config = config_of("qwen3_5_text", **DELTA_NET)
    rows = [torch.arange(5, 34), torch.arange(40, 43), torch.arange(50, 67)]
    tokenized = [TokenizedRow(row.numpy().astype(np.int32), row.numpy()) for row in rows]
    found = []
    for batches in ([flatten(tokenized)], [{"input_ids": row[None], "labels": row[None]} for row in rows]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME).train()
        keep_rows_apart(model, ["Qwen3_5GatedDeltaNet"])
        if checkpointing:
            model.gradient_checkpointing_enable()
        for batch in batches:
            labels = batch.pop("labels").clone()
            labels[0, 0] = -100
            logits = model(**batch, use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=1e-3, atol=1e-4), name


def test_a_window_that_no_joined_sequence_reaches_does_not_count() -> None:
    config = config_of("llama4_text", attention_chunk_size=128, num_local_experts=2)
    plan = plan_of(config, longest=128)
    assert error_of(config, plan) < 1e-4


def test_a_verdict_is_tried_once_for_each_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSWIFT_CACHE", str(tmp_path / "cache"))
    tried: list[str | None] = []

    def in_this_process(trial: Any, *_: Any) -> dict[str, Any]:
        tried.append(trial.attn_impl)
        return packing.try_packing(trial)

    monkeypatch.setattr(packing, "_tried", in_this_process)
    folder = tmp_path / "model"

    def plan(**changes: Any) -> PackedPlan | None:
        values = {
            "packing": True, "padding_free": False, "packing_length": 64, "max_length": 64, "model": str(folder),
            "model_revision": None, "use_hf": None, "trust_remote_code": False, "model_kwargs": None, "hub_token": None,
            "attn_impl": None, "per_device_train_batch_size": 1, "deepspeed": None,
        }  # fmt: skip
        workers = Workers(1, False, {"CPU": 1.0})
        return packing.packing_plan(SimpleNamespace(**(values | changes)), str(folder), "bfloat16", workers)

    config_of("llama").save_pretrained(folder)
    assert plan(packing=False) is None
    assert [plan(), plan(), plan(padding_free=True)] == [PackedPlan(NAME)] * 3
    assert tried == [None]
    assert plan(attn_impl="eager") == PackedPlan("eager")
    config_of("qwen3").save_pretrained(folder)
    assert plan() == PackedPlan(NAME)
    assert tried == [None, "eager", None]
    config_of("qwen3_5_text", **DELTA_NET).save_pretrained(folder)
    assert plan(deepspeed="zero2") == PackedPlan(NAME, ("Qwen3_5GatedDeltaNet",))
    with pytest.raises(UserError, match=r"Qwen3_5GatedDeltaNet takes one row at a time, which ZeRO-3 does not allow"):
        plan(deepspeed="zero3")
    tried.clear()
    AutoConfig.for_model("bloom", n_layer=2, hidden_size=64, n_head=2, vocab_size=128).save_pretrained(folder)
    for _ in range(2):
        with pytest.raises(UserError, match=r"--packing/--padding_free: bloom .* in BloomAttention"):
            plan()
    assert len(tried) == 1
    (folder / "config.json").write_text(json.dumps({"model_type": "unheard_of", "max_position_embeddings": 64}))
    with pytest.raises(UserError, match="unheard_of"):
        plan()


#: Architecture → the layers that take one row after the other where no kernel knows of rows; None: refused.
ARCHITECTURES: dict[str, tuple[str, ...] | None] = {
    "apertus": (), "bamba": ("BambaMixer",), "bloom": None, "cohere": (), "cohere2": (), "deepseek_v3": (),
    "deepseek_v32": None, "ernie4_5_moe": (), "exaone4": (), "falcon": ("FalconAttention", "FalconMLP"),
    "falcon_h1": ("FalconH1Mixer",), "falcon_mamba": ("FalconMambaMixer",), "gemma": (), "gemma2": (),
    "gemma3_text": (), "gemma4_text": (), "glm": (), "glm4": (), "glm4_moe": (), "gpt2": (), "gpt_oss": (),
    "granitemoehybrid": ("GraniteMoeHybridMambaLayer",), "jamba": ("JambaMambaMixer",),
    "kimi_linear": ("KimiLinearDeltaAttention",), "lfm2": (), "llama": (), "llama4_text": None, "longcat_flash": (),
    "mamba": ("MambaMixer",), "mamba2": ("Mamba2Mixer",), "minimax": ("MiniMaxLightningAttention",),
    "minimax_m2": (), "mistral": (), "mixtral": (), "mpt": ("MptAttention",), "nemotron_h": ("NemotronHMamba2Mixer",),
    "olmo3": (), "phi3": (), "qwen2": (), "qwen2_moe": (), "qwen3": (), "qwen3_5": ("Qwen3_5GatedDeltaNet",),
    "qwen3_5_moe": ("Qwen3_5MoeGatedDeltaNet",), "qwen3_moe": (), "qwen3_next": ("Qwen3NextGatedDeltaNet",),
    "recurrent_gemma": ("RecurrentGemmaRecurrentBlock",), "seed_oss": (), "smollm3": (),
    "stablelm": ("StableLmAttention",),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_architecture_leaks_silently(name: str, small_copy: Callable[[Any], Any]) -> None:
    """In the size that its configuration has by itself, often that of a released model."""
    config = AutoConfig.for_model(name)
    if name == "lfm2":  # by itself it has no convolutions
        config.layer_types = ["conv", "conv", "full_attention"] * 10 + ["conv", "conv"]
    expected = ARCHITECTURES[name]
    if expected is None:
        with pytest.raises(UserError, match=rf"{name} does not keep joined rows apart \(.* in \w+\); drop the flag"):
            plan_of(config)
        assert all(error_of(small_copy(config), PackedPlan(attention)) > 1e-3 for attention in ("sdpa", "eager"))
        return
    plan = plan_of(config)
    assert plan.by_row == (("Lfm2ShortConv",) if name == "lfm2" else expected)
    assert error_of(small_copy(config), plan) < 1e-4


@pytest.fixture
def small_copy() -> Callable[[Any], Any]:
    """The configuration that the check tries, to be held against other weights and rows."""
    from rayswift.train import packing_check

    return lambda config: packing_check._shrunk(config, True, 10**9, {})
