"""What the version before the house plan wrote is read by this one: args.json and a LoRA checkpoint.

The run directory in tests/data/before/run is of commit dacbd6d; result files and journals: tests/inference.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem
from tiny_models import llama, word_tokenizer

import rayswift
from rayswift.arguments import parse_arguments, read_saved_arguments
from rayswift.train.checkpoints import manifest as checkpoints

RUN = "v0-20261129-030904"
CHECKPOINT = f"{RUN}/checkpoint-2"
LOCAL = LocalFileSystem()


@pytest.fixture(autouse=True)
def left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run directory with the rows it was trained on; --model was ``tiny``."""
    monkeypatch.delenv("USE_HF", raising=False)
    shutil.copytree(Path(__file__).resolve().parents[1] / "data" / "before" / "run", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny() -> str:
    """The model of the run, made again."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    llama(vocab_size=64, **sizes).save_pretrained("tiny")
    word_tokenizer(64).save_pretrained("tiny")
    return "tiny"


def test_its_arguments_are_read_by_other_commands(caplog: pytest.LogCaptureFixture) -> None:
    saved = read_saved_arguments(CHECKPOINT)
    assert saved is not None
    args = parse_arguments("infer", ["--adapters", CHECKPOINT, "--load_data_args", "true"]).with_saved(saved)
    assert (args.model, args.dataset, args.split_dataset_ratio) == ("tiny", ["rows.jsonl"], 0)
    assert caplog.messages == []


def test_its_arguments_are_a_configuration_of_this_version(caplog: pytest.LogCaptureFixture) -> None:
    saved = json.loads(Path(RUN, "args.json").read_text())
    again = parse_arguments("sft", [f"{RUN}/args.json"]).to_dict()
    kept = {name: value for name, value in saved.items() if name not in ("command", "rayswift_version")}
    assert {name: again[name] for name in kept} == kept
    assert (again["max_steps"], again["lora_rank"], again["target_modules"]) == (2, 1, ["q_proj"])


def test_its_checkpoint_is_whole(left_over: Path) -> None:
    (found,) = checkpoints.list_checkpoints(LOCAL, str(left_over / RUN))
    assert checkpoints.find_checkpoints(LOCAL, str(left_over)) == [found]
    assert (found.step, found.path) == (2, str(left_over / CHECKPOINT))
    manifest = checkpoints.read_manifest(LOCAL, found.path)
    assert manifest is not None
    assert checkpoints.verify(found.path, manifest) is None
    position = checkpoints.read_position(LOCAL, found.path)
    assert position == checkpoints.Position(1, "78ba5f61d2827f8ee2844844206d937cc177fa6f")


def test_its_adapter_answers(tiny: str) -> None:
    answered = rayswift.infer(adapters=[CHECKPOINT], val_dataset=["rows.jsonl"], max_new_tokens=2, result_path="out")
    assert [(row["labels"], row.get("error")) for row in answered] == [(f"w{number}", None) for number in range(30, 38)]
    assert all(row["response"] for row in answered)


@pytest.mark.slow
def test_training_goes_on_from_it_and_says_what_cannot_be_checked(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "model": tiny, "dataset": ["rows.jsonl"], "split_dataset_ratio": 0, "lora_rank": 1, "max_length": 32,
        "target_modules": ["q_proj"], "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "output_dir": "out", "torch_dtype": "float32",
    }  # fmt: skip
    done = rayswift.sft(**given, max_steps=3, resume_from_checkpoint=CHECKPOINT)
    assert done["global_step"] == 3
    assert "is of another version of RaySwift" in capsys.readouterr().out
    again = rayswift.sft(**given, max_steps=4, resume_from_checkpoint=done["last_model_checkpoint"])
    assert again["global_step"] == 4
    assert "another version" not in capsys.readouterr().out
