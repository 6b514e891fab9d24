"""SWIFT's spelling rules, configuration files, names old and new, and help."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import COMMANDS, format_help, make_arguments, parse_arguments
from rayswift.arguments.commands import flags_of
from rayswift.arguments.fields import specs_of
from rayswift.errors import UserError

SFT = ["--model", "m", "--dataset", "d"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("USE_HF", "NPROC_PER_NODE", "NNODES", "RAYSWIFT_HUB_TOKEN", "RAYSWIFT_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--max_steps 7", "max_steps", 7),
        ("--max-steps 7", "max_steps", 7),
        ("--max-steps=7", "max_steps", 7),
        ("--num_train_e 1", "num_train_epochs", 1.0),
        ("--learn 1e-5", "learning_rate", 1e-5),
        ("--max_steps -1", "max_steps", -1),
        ("--packing", "packing", True),
        ("--packing yes", "packing", True),
        ("--packing 0", "packing", False),
        ("--packing auto", "packing", None),
        ("--gradient_checkpointing AUTO", "gradient_checkpointing", None),
        ("--no_add_version", "add_version", False),
        ("--no-gradient-checkpointing", "gradient_checkpointing", False),
        ("--target_modules q_proj v_proj", "target_modules", ["q_proj", "v_proj"]),
        ("--dataset a#5 b --seed 1", "dataset", ["a#5", "b"]),
        ('--lr_scheduler_kwargs {"num_cycles":2}', "lr_scheduler_kwargs", {"num_cycles": 2}),
        ("--max_length null", "max_length", None),
        ("--system none", "system", None),
        ("--report_to none", "report_to", ["none"]),
        ("--lora_bias none", "lora_bias", "none"),
        ("--num_workers 4", "num_workers", 4),
        ("--num_workers 1,4", "num_workers", (1, 4)),
        ("--resume_from_checkpoint true", "resume_from_checkpoint", "true"),
        ("--resume_from_checkpoint out/checkpoint-3", "resume_from_checkpoint", "out/checkpoint-3"),
        ("--resume_from_checkpoint false", "resume_from_checkpoint", None),
        ("--save_steps 0.1", "save_steps", 0.1),
        ("--save_steps 50", "save_steps", 50),
        ("--seed 9007199254740993", "seed", 9007199254740993),
        # Old names beside new ones.
        ("--tuner_type full", "train_type", "full"),
        ("--evaluation_strategy epoch", "eval_strategy", "epoch"),
        ("--enable_cache true", "load_from_cache_file", True),
        ("--tools_prompt react_en", "agent_template", "react_en"),
        ("--metric acc", "eval_metric", "acc"),
        ("--attn_impl flash_attn", "attn_impl", "flash_attention_2"),
    ],
)
def test_a_flag_is_read(words: str, name: str, value: object) -> None:
    arguments = parse_arguments("sft", [*SFT, *words.split(" ")])
    assert getattr(arguments, name) == value
    assert type(getattr(arguments, name)) is type(value)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--tensor_parallel_size 2", "vllm_tensor_parallel_size", 2),
        ("--tp 2", "vllm_tensor_parallel_size", 2),
        ("--gpu_memory_utilization 0.5", "vllm_gpu_memory_utilization", 0.5),
        ("--max_num_seqs 8", "vllm_max_num_seqs", 8),
        ("--max_model_len 100", "vllm_max_model_len", 100),
        ("--enforce_eager", "vllm_enforce_eager", True),
        ("--max_lora_rank 64", "vllm_max_lora_rank", 64),
        ("--lora_modules a b", "adapters", ["a", "b"]),
        ("--infer_backend pt", "infer_backend", "transformers"),
    ],
)
def test_old_names_of_the_engines(words: str, name: str, value: object) -> None:
    arguments = parse_arguments("infer", ["--model", "m", "--infer_backend", "vllm", *words.split(" ")])
    assert getattr(arguments, name) == value


def test_old_names_of_rlhf_and_eval() -> None:
    rlhf = [*SFT, "--rlhf_type", "grpo", "--reward_funcs", "format"]
    assert parse_arguments("rlhf", [*rlhf, "--response_length", "9"]).max_completion_length == 9
    evaluated = parse_arguments(
        "eval", ["--model", "m", "--eval_datasets", "arc", "--eval_datasets_args", '{"arc": {}}']
    )
    assert (evaluated.eval_dataset, evaluated.eval_dataset_args) == (["arc"], {"arc": {}})


def test_no_name_means_two_things() -> None:
    for command, cls in COMMANDS.items():
        names = [name for spec in specs_of(cls).values() for name in (spec.name, *spec.aliases)]
        assert len(names) == len(set(names)), command


def test_system_from_a_file_and_with_escapes(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Be kind.\nBe brief.\n")
    assert make_arguments("infer", model="m", system=str(prompt)).system == "Be kind.\nBe brief."
    assert make_arguments("infer", model="m", system=r"one\ntwo").system == "one\ntwo"
    tokens = tmp_path / "tokens.txt"
    tokens.write_text("<a>\n\n<b>\n")
    arguments = parse_arguments("sft", [*SFT, "--new_special_tokens", str(tokens), "<c>"])
    assert arguments.new_special_tokens == ["<a>", "<b>", "<c>"]


def test_deepspeed_is_a_preset_json_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3}}')
    for value in (str(path), path.read_text()):
        arguments = parse_arguments("sft", [*SFT, "--deepspeed", value])
        assert arguments.deepspeed == {"zero_optimization": {"stage": 3}}
        assert arguments.zero_stage == 3
    assert make_arguments("sft", model="m", dataset="d", deepspeed="zero2_offload").zero_stage == 2


def test_training_arguments_pass_through_with_their_types() -> None:
    words = "--bf16 true --label_smoothing_factor 0.1 --ddp_bucket_cap_mb 60 --run_name r --label_names a b"
    words += " --neftune_noise_alpha 5"
    arguments = parse_arguments("sft", [*SFT, *words.split()])
    assert arguments.training_args == {
        "bf16": True, "label_smoothing_factor": 0.1, "ddp_bucket_cap_mb": 60, "run_name": "r",
        "label_names": ["a", "b"], "neftune_noise_alpha": 5,
    }  # fmt: skip
    assert {"bf16", "run_name"} <= arguments.given
    with pytest.raises(UserError, match="--hub_strategy often: choose from end, every_save"):
        parse_arguments("sft", [*SFT, "--hub_strategy", "often"])
    with pytest.raises(UserError, match="rayswift sft"):
        parse_arguments("infer", ["--model", "m", "--bf16", "true"])


def test_config_file_then_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SET_BEFORE", "mine")
    monkeypatch.setenv("SET_BY_CONFIG", "")
    monkeypatch.delenv("SET_BY_CONFIG")
    config = tmp_path / "sft.yaml"
    config.write_text(
        "model: m\ndataset: [a, b]\nlearning_rate: 1e-5\nmax-length: 128\ntemplate: null\nsave_strategy: no\n"
        "lora_rank: 16\nlr_scheduler_kwargs: {num_cycles: 2}\nrun_name: 7\n"
        "ENV:\n  SET_BEFORE: theirs\n  SET_BY_CONFIG: 1\n"
    )
    for words in ([str(config), "--lora_rank", "4"], ["--lora_rank", "4", "--config", str(config)]):
        arguments = parse_arguments("sft", words)
        assert arguments.to_dict() | {
            "dataset": ["a", "b"], "learning_rate": 1e-5, "max_length": 128, "template": None, "save_strategy": "no",
            "lora_rank": 4, "lr_scheduler_kwargs": {"num_cycles": 2}, "training_args": {"run_name": "7"},
        } == arguments.to_dict()  # fmt: skip
        assert arguments.config_file == str(config)
        assert "template" not in arguments.given
    assert (os.environ["SET_BEFORE"], os.environ["SET_BY_CONFIG"]) == ("mine", "1")


def test_null_on_the_command_line_unsets_what_the_config_set(tmp_path: Path) -> None:
    config = tmp_path / "sft.json"
    config.write_text(json.dumps({"model": "m", "dataset": "d", "max_length": 128}))
    assert parse_arguments("sft", [str(config), "--max_length", "null"]).max_length is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "model: m\n  dataset: d\n", r"a\.yaml:2: not valid YAML"),
        ("a.json", '{"model": "m",\n}', r"a\.json:2: not valid JSON"),
        ("a.yaml", "- model\n", r"a\.yaml: expected settings"),
        (
            "a.yaml",
            "model: m\ndataset: d\nlerning_rate: 1\n",
            r"a\.yaml: unknown flag --lerning_rate; did you mean --learning_rate",
        ),
        ("a.yaml", "model: m\ndataset: d\nENV: x\n", r"a\.yaml: ENV"),
    ],
)
def test_bad_config_files(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        parse_arguments("sft", [str(tmp_path / name)])


def test_missing_config_file() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot read"):
        parse_arguments("sft", ["nowhere.yaml"])


def test_worker_counts_from_swifts_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_arguments("sft", SFT).num_workers is None
    monkeypatch.setenv("NPROC_PER_NODE", "8")
    assert parse_arguments("sft", SFT).num_workers == 8
    monkeypatch.setenv("NNODES", "2")
    assert parse_arguments("sft", SFT).num_workers == 16
    assert parse_arguments("sft", [*SFT, "--num_workers", "3"]).num_workers == 3


def test_use_hf_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_HF", "1")
    assert parse_arguments("sft", SFT).use_hf is True
    assert parse_arguments("sft", [*SFT, "--use_hf", "false"]).use_hf is False


def test_defaults_that_depend_on_other_settings() -> None:
    arguments = make_arguments("sft", model="org/Qwen2.5-0.5B/", dataset=["d"], train_type="full", save_steps=20)
    assert (arguments.learning_rate, arguments.eval_steps) == (1e-5, 20)
    assert arguments.output_dir == os.path.join("output", "Qwen2.5-0.5B")


@pytest.mark.parametrize(
    ("given", "dtype", "use_gpu"),
    [
        ({}, None, None),
        ({"fp16": True}, "float16", None),
        ({"bf16": True}, "bfloat16", None),
        ({"bf16": True, "torch_dtype": "bfloat16"}, "bfloat16", None),
        ({"fp16": False}, None, None),
        ({"use_cpu": True}, None, False),
    ],
)
def test_precision_and_device_of_the_trainer_are_our_own_flags(
    given: dict[str, Any], dtype: str | None, use_gpu: bool | None
) -> None:
    arguments = make_arguments("sft", model="m", dataset=["d"], **given)
    assert (arguments.torch_dtype, arguments.use_gpu) == (dtype, use_gpu)


def test_a_rate_of_zero_is_given() -> None:
    assert make_arguments("sft", model="m", dataset=["d"], learning_rate=0).learning_rate == 0


def test_lists_are_not_shared_between_arguments() -> None:
    first, second = make_arguments("sft", model="m", dataset="d"), make_arguments("sft", model="m", dataset="d")
    first.target_modules.append("x")
    assert second.target_modules == ["all-linear"]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_explains_every_flag_with_its_default(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = format_help(command)
    for name, spec in flags_of(command).items():
        line = re.search(rf"^  --{name}\b.*(?:\n {{20,}}.*)?", text, re.MULTILINE)
        assert line, name
        assert spec.help.replace("%%", "%") in line.group(), name
        assert "(default: " in line.group(), name
    assert all(f"\n{spec.topic}:\n" in text for spec in flags_of(command).values())


def test_scripts_have_their_own_defaults_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    defaults = {"model": "m", "dataset": ["d"], "lora_rank": 64}
    assert parse_arguments("sft", ["--lora_alpha", "1"], defaults=defaults).lora_rank == 64
    assert parse_arguments("sft", ["--lora_rank", "2"], defaults=defaults).lora_rank == 2
    with pytest.raises(SystemExit) as stop:
        parse_arguments("sft", ["--help"], defaults=defaults, prog="job.py")
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "usage: job.py" in printed
    assert re.search(
        r"--lora_rank INT +rank of the adapter; only with --train_type lora; .* \(default: 64\)",
        " ".join(printed.split()),
    )
