"""Every command line of the guide to SWIFT that this project follows, with ``swift`` replaced by ``rayswift``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import parse_arguments
from rayswift.arguments.swift import swift_defaults, swift_table

QWEN = "Qwen/Qwen2.5-7B-Instruct"
LOCAL = "/root/.cache/modelscope/hub/models/Qwen/Qwen2.5-0.5B-Instruct"
ZH = "AI-ModelScope/alpaca-gpt4-data-zh"
CHECKPOINT = "output/vx-xxx/checkpoint-xxx"
PUSH = {
    "adapters": [CHECKPOINT], "push_to_hub": True, "hub_model_id": "<your-model-id>", "hub_token": "<your-sdk-token>",
    "use_hf": False, "model": None,
}  # fmt: skip
CHAT = {"stream": True, "temperature": 0.0, "max_new_tokens": 2048, "adapters": [CHECKPOINT], "model": None}

# What each command line must mean, in the order of the file.
EXPECTED: list[tuple[str, dict[str, Any]]] = [
    ("pt", {"model": "Qwen/Qwen2.5-7B", "dataset": ["swift/chinese-c4"], "streaming": True, "train_type": "full",
            "deepspeed": "zero2", "output_dir": "output", "max_steps": 10000, "num_workers": 8,
            "use_chat_template": False, "loss_scale": "all", "learning_rate": 1e-5}),
    ("sft", {"model": QWEN, "dataset": [ZH], "train_type": "lora", "output_dir": "output", "learning_rate": 1e-4}),
    ("rlhf", {"rlhf_type": "dpo", "model": QWEN, "dataset": ["hjh0119/shareAI-Llama3-DPO-zh-en-emoji"],
              "train_type": "lora", "output_dir": "output", "beta": 0.1, "loss_scale": "last_round"}),
    ("infer", {"model": QWEN, "stream": True, "infer_backend": "transformers", "max_new_tokens": 2048, "adapters": []}),
    ("infer", {"model": QWEN, "adapters": ["swift/test_lora"], "stream": True, "infer_backend": "transformers",
               "temperature": 0.0, "max_new_tokens": 2048}),
    ("app", {"model": QWEN, "stream": True, "infer_backend": "transformers", "max_new_tokens": 2048, "lang": "zh"}),
    ("deploy", {"model": QWEN, "infer_backend": "vllm", "host": "127.0.0.1", "port": 8000}),
    ("sample", {"model": "LLM-Research/Meta-Llama-3.1-8B-Instruct", "sampler_engine": "transformers",
                "num_return_sequences": 5, "dataset": [f"{ZH}#5"]}),
    ("eval", {"model": QWEN, "infer_backend": "vllm", "eval_backend": "OpenCompass", "eval_dataset": ["ARC_c"]}),
    ("export", {"model": QWEN, "quant_bits": 4, "quant_method": "awq", "dataset": [ZH],
                "output_dir": "Qwen2.5-7B-Instruct-AWQ"}),
    ("export", PUSH),
    ("sft", {"model": QWEN, "train_type": "lora", "torch_dtype": "bfloat16", "num_train_epochs": 1.0,
             "dataset": [f"{ZH}#500", "AI-ModelScope/alpaca-gpt4-data-en#500", "swift/self-cognition#500"],
             "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "learning_rate": 1e-4, "lora_rank": 8,
             "lora_alpha": 32.0, "target_modules": ["all-linear"], "gradient_accumulation_steps": 16, "eval_steps": 50,
             "save_steps": 50, "save_total_limit": 2, "logging_steps": 5, "max_length": 2048, "output_dir": "output",
             "system": "You are a helpful assistant.", "warmup_ratio": 0.05, "dataloader_num_workers": 4,
             "model_author": ["swift"], "model_name": ["swift-robot"]}),
    ("infer", CHAT),
    ("infer", {**CHAT, "merge_lora": True, "infer_backend": "vllm", "vllm_max_model_len": 8192}),
    ("export", PUSH),
    ("sft", {"model": LOCAL, "dataset": [ZH], "train_type": "lora", "output_dir": "/root/workspace/output"}),
    ("sft", {"model": LOCAL, "dataset": [ZH], "train_type": "lora", "output_dir": "/root/workspace/output"}),
    ("sft", {"model": LOCAL, "dataset": [ZH], "train_type": "lora", "output_dir": "output"}),
]  # fmt: skip


def command_lines() -> list[tuple[dict[str, str], list[str]]]:
    """(environment, words after ``rayswift``) of each command in the file, split as a shell splits words."""
    text = (Path(__file__).parent / "seed_commands.txt").read_text(encoding="utf-8")
    found = []
    for paragraph in text.split("\n\n"):
        # A line that starts with # is a comment; `#` inside a word is not, so shlex must not look for comments.
        lines = [line for line in paragraph.split("\n") if not line.startswith("#")]
        # shlex does not know that a shell drops a backslash before the end of a line.
        words = shlex.split("\n".join(lines).replace("\\\n", " "), comments=False)
        if "rayswift" in words:
            start = words.index("rayswift")
            environment = dict(word.split("=", 1) for word in words[:start])
            found.append((environment, words[start + 1 :]))
    return found


def test_the_file_holds_every_expected_command() -> None:
    assert [words[0] for _, words in command_lines()] == [command for command, _ in EXPECTED]


@pytest.mark.parametrize("number", range(len(EXPECTED)))
def test_command_line_parses_unchanged(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, words = command_lines()[number]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command, expected = EXPECTED[number]
    arguments = parse_arguments(words[0], words[1:])
    assert arguments.command == command
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_strays_of_a_copied_command_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    _, words = command_lines()[15]
    parse_arguments(words[0], words[1:])
    assert "a backslash must be the last character of its line" in caplog.text
    assert "ignored a comment: #" in caplog.text


def test_the_arguments_of_the_seeds_run_are_a_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All that SWIFT 3 saves of a run: its defaults, masked tokens, and flags that RaySwift does not have."""
    names = {name for part in ("defaults", "earlier") for name in swift_table()[part]}
    saved = {name: found[-1] for name in names if (found := swift_defaults(name, "sft"))}
    own = {"model": LOCAL, "dataset": [ZH], "hub_token": "<HUB_TOKEN>", "swanlab_token": "<SWANLAB_TOKEN>",
           "torch_dtype": "torch.bfloat16", "logging_dir": "/root/workspace/output/runs"}  # fmt: skip
    path = tmp_path / "args.json"
    path.write_text(json.dumps(saved | own))
    arguments = parse_arguments("sft", [str(path)])
    assert (arguments.torch_dtype, arguments.hub_token, arguments.lora_rank) == ("bfloat16", None, 8)
    assert [text.partition(" ")[0] for text in caplog.messages] == ["--logging_dir"]
