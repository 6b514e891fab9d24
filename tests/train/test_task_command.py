"""``rayswift sft --task_type …`` as a command, its worker in this process: from rows in a file to answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments, parse_arguments

sys.path.insert(0, str(Path(__file__).parents[1] / "arguments"))
from reads import training_here

pytestmark = pytest.mark.slow

U, A = "user", "assistant"


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def rows_of(task: str) -> list[dict[str, Any]]:
    found = []
    for number in range(16):
        word = ("red", "green")[number % 2]
        row: dict[str, Any] = {"messages": [message(U, f"{word} {number}")]}
        role = U if task == "embedding" else A
        if task == "seq_cls":
            row["label"] = number % 2
        else:
            row["positive_messages"] = [[message(role, f"{word} again")]]
            row["negative_messages"] = [[message(role, f"blue {number}")]]
        found.append(row)
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("train_type", ["lora", "full"])
@pytest.mark.parametrize("task", ["seq_cls", "embedding", "reranker", "generative_reranker"])
def test_from_rows_to_answers(task: str, train_type: str, tiny_dir: str, tmp_path: Path) -> None:
    from rayswift import infer, train

    data = write(tmp_path / "rows.jsonl", rows_of(task))
    words = ["--model", tiny_dir, "--task_type", task, "--dataset", data, "--split_dataset_ratio", "0.25",
             "--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--torch_dtype", "float32", "--report_to",
             "none", "--train_type", train_type, "--gradient_accumulation_steps", "1", "--max_length", "128",
             "--per_device_train_batch_size", "4", "--learning_rate", "0.01"]  # fmt: skip
    words += ["--num_labels", "2"] if task == "seq_cls" else []
    with training_here():
        outcome = train.sft(parse_arguments("sft", words).resolved())
    checkpoint = outcome["last_model_checkpoint"]
    log = json.loads(Path(checkpoint, "trainer_state.json").read_text())["log_history"]
    names = {"seq_cls": "acc", "embedding": "margin"}
    assert any(f"eval_{names.get(task, 'mrr')}" in row for row in log)
    asked = [{"messages": [message(U, "red 1"), *([message(A, "red again")] if task.endswith("reranker") else [])],
              "label": 1}]  # fmt: skip
    flags: dict[str, Any] = {"model": checkpoint} if train_type == "full" else {"adapters": [checkpoint]}
    told = [
        infer(
            val_dataset=[write(tmp_path / "asked.jsonl", asked)], result_path=str(tmp_path / f"{merge}.jsonl"),
            torch_dtype="float32", **flags, **({"merge_lora": True} if merge else {}),
        )[0]
        for merge in ((False, True) if train_type == "lora" else (False,))
    ]  # fmt: skip
    kind = {"seq_cls": int, "embedding": list}.get(task, float)
    assert all(isinstance(one["response"], kind) and one["labels"] == 1 for one in told)
    assert told[0]["response"] == pytest.approx(told[-1]["response"], abs=1e-4)


def test_an_encoded_dataset_keeps_its_targets(tiny_dir: str, tmp_path: Path) -> None:
    from rayswift import train
    from rayswift.exporting.cached import export_cached_dataset

    data = write(tmp_path / "rows.jsonl", rows_of("seq_cls"))
    same: dict[str, Any] = {"model": tiny_dir, "task_type": "seq_cls", "num_labels": 2, "max_length": 128,
                            "problem_type": "single_label_classification"}  # fmt: skip
    with training_here():
        folder = export_cached_dataset(
            make_arguments(
                "export", dataset=[data], to_cached_dataset=True, output_dir=str(tmp_path / "cached"), **same
            )
        )
        args = make_arguments(
            "sft", cached_dataset=[folder], output_dir=str(tmp_path / "out"), max_steps=1, torch_dtype="float32",
            report_to="none", **same,
        )  # fmt: skip
        outcome = train.sft(args.resolved())
    assert outcome["global_step"] == 1
