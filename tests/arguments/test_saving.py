"""args.json: what is written, what is masked, what is read back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayswift.arguments import make_arguments, parse_arguments, read_saved_arguments, redact_argv
from rayswift.errors import UserError

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"


def test_saved_and_read_back(tmp_path: Path) -> None:
    trained = make_arguments(
        "sft", model="org/m", dataset=["d#5"], system="Be kind.", num_workers="1,2", torch_dtype="bfloat16", bf16=True
    )
    run, checkpoint = tmp_path / "v0", tmp_path / "v0" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    trained.save(run)
    assert [path.name for path in run.glob("args*")] == ["args.json"]
    saved = read_saved_arguments(checkpoint)
    assert saved is not None
    assert (saved["command"], saved["train_type"], saved["num_workers"]) == ("sft", "lora", [1, 2])
    assert saved["training_args"] == {"bf16": True}

    inferred = parse_arguments("infer", ["--adapters", str(checkpoint), "--temperature", "0"]).with_saved(saved)
    assert (inferred.model, inferred.system, inferred.torch_dtype) == ("org/m", "Be kind.", "bfloat16")
    assert inferred.dataset == []
    assert "model" not in inferred.given


def test_the_command_line_wins_over_the_checkpoint() -> None:
    saved = {"model": "a", "system": "old", "template": "qwen2_5", "train_type": "full", "lora_rank": 64}
    arguments = parse_arguments("infer", ["--adapters", "x", "--system", "new"]).with_saved(saved)
    assert (arguments.model, arguments.system, arguments.template) == ("a", "new", "qwen2_5")
    # train_type is forced, whatever the command line says.
    forced = make_arguments("sft", model="m", dataset="d", train_type="lora", load_args=True).with_saved(saved)
    assert (forced.train_type, forced.lora_rank) == ("full", 8)
    assert forced.learning_rate == 1e-5


def test_load_args_false_reads_nothing() -> None:
    arguments = parse_arguments("infer", ["--model", "m", "--load_args", "false"])
    assert arguments.with_saved({"system": "x"}).system is None


def test_load_data_args_restores_the_dataset() -> None:
    saved = {"model": "m", "dataset": ["a", "b"], "split_dataset_ratio": 0.2, "data_seed": 7}
    arguments = parse_arguments("infer", ["--adapters", "x", "--load_data_args", "true", "--data_seed", "9"])
    restored = arguments.with_saved(saved)
    assert (restored.dataset, restored.split_dataset_ratio, restored.data_seed) == (["a", "b"], 0.2, 9)


def test_a_checkpoint_of_pretraining_keeps_plain_text() -> None:
    saved = make_arguments("pt", model="m", dataset="d").to_dict()
    assert parse_arguments("infer", ["--adapters", "x"]).with_saved(saved).use_chat_template is False


def test_ms_swifts_args_json_is_understood(caplog: pytest.LogCaptureFixture) -> None:
    saved: dict[str, object] = {
        "tuner_type": "lora",
        "model": "Qwen/Qwen2.5-0.5B",
        "torch_dtype": "torch.bfloat16",
        "tools_prompt": "react_en",
        "template": "qwen2_5",
        "truncation_strategy": None,
        "model_info": "ModelInfo(...)",
        "training_args": "Seq2Seq(...)",
        "model_author": [None, None],
        "max_memory": {},
        "attn_impl": "something_new",
        "hub_token": "***",
    }
    arguments = parse_arguments("infer", ["--adapters", "x", "--load_data_args", "true"]).with_saved(saved)
    assert (arguments.torch_dtype, arguments.agent_template) == ("bfloat16", "react_en")
    assert (arguments.truncation_strategy, arguments.model_author) == ("delete", [])
    assert arguments.attn_impl is None
    assert "args.json of the checkpoint is not used: --attn_impl something_new" in caplog.text


def test_a_saved_run_is_a_config_file(tmp_path: Path) -> None:
    first = make_arguments("sft", model="m", dataset="d", hub_token=TOKEN, lora_rank=4, run_name="r")
    first.save(tmp_path / "args.json")
    again = parse_arguments("sft", [str(tmp_path / "args.json")])
    assert again.to_dict() == first.to_dict() | {"hub_token": None}


def test_no_or_broken_args_json(tmp_path: Path) -> None:
    assert read_saved_arguments(tmp_path) is None
    (tmp_path / "args.json").write_text('{"model": ')
    with pytest.raises(UserError, match="cannot read the saved arguments"):
        read_saved_arguments(tmp_path)


def test_tokens_are_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = make_arguments(
        "export",
        model="m",
        push_to_hub=True,
        hub_model_id="o/n",
        hub_token=TOKEN,
        model_kwargs={"token": "xyzzy-secret"},
    )
    arguments.save(tmp_path)
    for text in (repr(arguments), json.dumps(arguments.to_dict()), (tmp_path / "args.json").read_text(), caplog.text):
        assert TOKEN not in text
        assert "xyzzy-secret" not in text
    assert arguments.hub_token == TOKEN
    with pytest.raises(UserError) as error:
        parse_arguments("deploy", ["--model", "m", "--port", TOKEN, "--api_key", "k", TOKEN])
    assert TOKEN not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--hub_token", "abc", "--seed", "1"], ["--hub_token", "***", "--seed", "1"]),
        (["--hub-token=abc"], ["--hub-token=***"]),
        (["--hub_tok", "abc"], ["--hub_tok", "***"]),
        (["--api_key", "a b", "c"], ["--api_key", "***", "***"]),
        (["--wandb_api_key", "abc"], ["--wandb_api_key", "***"]),
        (["--model_kwargs", '{"token": "abc", "x": 1}'], ["--model_kwargs", '{"token": "***", "x": 1}']),
        (["--dataset", "https://user:abc@host/d.jsonl"], ["--dataset", "https://***@host/d.jsonl"]),
        (["--hub_tokne", TOKEN], ["--hub_tokne", "***"]),
        (
            ["--max_new_tokens", "5", "--new_special_tokens", "<a>"],
            ["--max_new_tokens", "5", "--new_special_tokens", "<a>"],
        ),
        (["HF_TOKEN=abc"], ["HF_TOKEN=***"]),
    ],
)
def test_redacted_command_lines(argv: list[str], expected: list[str]) -> None:
    assert redact_argv(argv) == expected


def test_secrets_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYSWIFT_API_KEY", "correct horse\ndef")  # a key a line: it may hold any character
    assert parse_arguments("deploy", ["--model", "m"]).api_key == ["correct horse", "def"]
    assert parse_arguments("deploy", ["--model", "m", "--api_key", "k"]).api_key == ["k"]


def test_a_checkpoint_never_says_what_code_is_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugin = tmp_path / "helper.py"
    plugin.write_text("raise SystemExit('ran')")
    saved = {"external_plugins": [str(plugin)], "custom_register_path": [str(plugin)], "trust_remote_code": True}
    for line in (["infer", "--load_data_args", "true"], ["sample", "--dataset", "d"]):
        restored = parse_arguments(line[0], ["--adapters", "x", *line[1:]]).with_saved(saved)
        assert (restored.external_plugins, restored.trust_remote_code) == ([], False)
    assert "--external_plugins, which runs code" in caplog.text
    caplog.clear()
    mine = parse_arguments(
        "infer", ["--adapters", "x", "--val_dataset", "v", "--external_plugins", str(plugin)]
    ).with_saved(saved)
    assert mine.external_plugins == [str(plugin)]
    assert "external_plugins" not in caplog.text
