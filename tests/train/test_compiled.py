"""`--torch_compile` compiles layers, one code for all that are alike, and changes neither losses nor checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import Run, row
from tiny_models import llama

from rayswift.arguments import make_arguments
from rayswift.errors import UserError
from rayswift.modeling.packed_rows import keep_rows_apart
from rayswift.modeling.varlen_attention import NAME
from rayswift.train import compiled
from rayswift.train.collate import Collator
from rayswift.train.compiled import compile_layers
from rayswift.train.config import PackedPlan
from rayswift.train.fused_lora import fuse_lora
from rayswift.train.needs import check_device, check_packages

LAYERS = 4


def trained(folder: Path, lora: bool, joined: bool, twice: bool, compile: bool) -> Any:
    """Three steps of a model of four layers, and what its compiler made: graphs, and graphs of one layer alone."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    class FourLayers(Run):
        def model(self) -> Any:
            model = llama(num_hidden_layers=LAYERS, attn_implementation=NAME if joined else "sdpa")
            model.config.use_cache = False
            if joined:
                keep_rows_apart(model, ())
            if lora:
                from peft import LoraConfig, get_peft_model

                model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
                fuse_lora(model)
            if twice:
                model.enable_input_require_grads()
                model.gradient_checkpointing_enable({"use_reentrant": True})
            return model

        def prepare(self, folder: Path) -> None:
            if joined:
                self.trainer.loader[:] = [Collator(0, flat=True)(rows) for step in steps for rows in step]
            if compile:
                plan = PackedPlan(NAME) if joined else None
                assert compile_layers(self.trainer.model, "aot_eager", None, plan) == LAYERS

    steps = [[[row(0), row(1)]], [[row(2), row(3), row(4)]], [[row(5), row(6), row(7), row(8)]]]
    run = FourLayers(folder, steps, save_strategy="steps", save_steps=3, learning_rate=0.01)
    return run, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lora", "joined", "twice"),
    [(False, False, False), (True, True, True)],
    ids=["full", "lora, joined, computed twice"],
)
def test_losses_and_checkpoints_are_those_of_the_model_as_it_is(
    tmp_path: Path, lora: bool, joined: bool, twice: bool
) -> None:
    from safetensors.torch import load_file

    plain, none = trained(tmp_path / "plain", lora, joined, twice, compile=False)
    run, graphs = trained(tmp_path / "compiled", lora, joined, twice, compile=True)
    assert [row["loss"] for row in run.log] == pytest.approx([row["loss"] for row in plain.log], rel=1e-5)
    # One for the first number of rows, one for any; two where computing twice begins without gradients. Around
    # attention of joined rows a layer is four parts.
    assert none == 0 < graphs <= 2 * (1 + 3 * joined) * (1 + twice)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    wanted, found = (load_file(tmp_path / name / "checkpoint-3" / file) for name in ("plain", "compiled"))
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wanted.items())


def test_refused_before_anything_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"--torch_compile_backend inductr: choose from .*inductor"):
        compile_layers(llama(), "inductr", None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"--torch_compile true: needs a C\+\+ compiler"):
        compile_layers(llama(), None, "max-autotune")


def args_of(**flags: Any) -> Any:
    return make_arguments("sft", model="m/m", dataset=["d"], **flags)


def test_a_backend_or_a_mode_switches_it_on() -> None:
    assert not args_of().torch_compile
    assert args_of(torch_compile_backend="eager").torch_compile
    assert args_of(torch_compile_mode="max-autotune").torch_compile
    with pytest.raises(UserError, match="--torch_compile contradicts --deepspeed zero3"):
        args_of(torch_compile=True, deepspeed="zero3")
    with pytest.raises(UserError, match="--torch_compile_mode contradicts --torch_compile_backend eager"):
        args_of(torch_compile_backend="eager", torch_compile_mode="max-autotune")


def test_float8_without_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    args = args_of(fp8=True, train_type="full")
    assert args.torch_compile
    with pytest.raises(UserError, match=r"^--fp8 true: needs GPUs that have float8"):
        check_device(args, use_gpu=False)
    check_device(args, use_gpu=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--fp8 true: needs the package torchao, .* pip install torchao"):
        check_packages(args)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        if fits:
            compiled.check_float8()
        else:
            with pytest.raises(UserError, match=r"--fp8 true: NVIDIA A100 \(compute capability 8.0\) has no float8"):
                compiled.check_float8()
    for flags in ({}, {"train_type": "full", "deepspeed": "zero2"}):
        with pytest.raises(UserError, match="--fp8 true is for --train_type full without --deepspeed"):
            args_of(fp8=True, **flags)
