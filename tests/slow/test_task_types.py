"""SmolLM2 learns to tell questions of three kinds apart, by the command line: train, infer, merge, deploy with both
engines; and its vectors and ranks are trained and answered too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import read_rows, run, run_directory
from serving import deployed

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[1] / "data"
QUICK = [
    "--gradient_accumulation_steps", "1", "--logging_steps", "1", "--gradient_checkpointing", "false", "--report_to",
    "none", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--max_length", "96",
    "--truncation_strategy", "right", "--system", "", "--lora_dropout", "0",
]  # fmt: skip


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def message(text: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": text}


def kinds() -> list[dict[str, Any]]:
    """Sums in words, questions of science, and answers to these."""
    sums = [one["question"] for one in read("gsm8k_40.jsonl")[:24]]
    science = read("arc_challenge_24.jsonl")
    texts = [sums, [one["question"] for one in science], [" / ".join(one["choices"]["text"]) for one in science]]
    return [{"messages": [message(text)], "label": label} for row in zip(*texts, strict=True)
            for label, text in enumerate(row)]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_classes_from_training_to_deployment(smollm2_dir: str, tmp_path: Path) -> None:
    rows = kinds()
    train, asked = write(tmp_path / "train.jsonl", rows[:54]), write(tmp_path / "test.jsonl", rows[54:])
    flags = ["--task_type", "seq_cls", "--num_labels", "3", "--dataset", train, "--val_dataset", asked]
    flags += ["--max_steps", "10", "--save_steps", "10", "--output_dir", str(tmp_path / "out"), *QUICK]
    run("sft", "--model", smollm2_dir, *flags, log=tmp_path / "sft.log")
    folder = run_directory(tmp_path / "out")
    assert next(row["eval_acc"] for row in read_rows(folder) if "eval_acc" in row) >= 0.8
    checkpoint = str(folder / "checkpoint-10")
    told = tmp_path / "told.jsonl"
    output = run(
        "infer", "--adapters", checkpoint, "--val_dataset", asked, "--result_path", str(told), "--metric", "acc",
        log=tmp_path / "infer.log",
    )  # fmt: skip
    answers = [json.loads(line) for line in told.read_text().splitlines()]
    right = [one["response"] == one["labels"] for one in answers]
    assert sum(right) / len(right) >= 0.8
    assert "'acc'" in output
    run("export", "--adapters", checkpoint, "--merge_lora", "true", log=tmp_path / "export.log")
    merged = f"{checkpoint}-merged"
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.float32)
    assert model.config.num_labels == 3
    found: dict[str, list[dict[str, Any]]] = {}
    texts = [one["messages"][0]["content"] for one in answers]
    for engine in ("transformers", "vllm"):
        (tmp_path / engine).mkdir()
        with deployed(merged, tmp_path / engine, "--infer_backend", engine, "--torch_dtype", "float32") as server:
            status, body = server.request("POST", "/classify", {"input": texts})
            assert status == 200, body
            found[engine] = json.loads(body)["data"]
        classes = [int(one["label"].removeprefix("LABEL_")) for one in found[engine]]
        assert sum(map(int.__eq__, classes, [one["response"] for one in answers])) >= len(answers) - 1
    for one, other in zip(found["transformers"], found["vllm"], strict=True):
        assert one["probs"] == pytest.approx(other["probs"], abs=2e-2)


@pytest.mark.parametrize(
    ("task", "loss", "metric"),
    [
        ("embedding", "infonce", "margin"),
        ("reranker", "listwise_reranker", "mrr"),
        ("generative_reranker", "pointwise_reranker", "mrr"),
    ],
)
def test_vectors_and_ranks(task: str, loss: str, metric: str, smollm2_dir: str, tmp_path: Path) -> None:
    """Which worked-out answer belongs to a sum."""
    sums, role = read("gsm8k_40.jsonl"), "user" if task == "embedding" else "assistant"
    rows = [
        {"messages": [message(one["question"])], "positive_messages": [[message(one["answer"], role)]],
         "negative_messages": [[message(sums[(number + 7) % 40]["answer"], role)]]}
        for number, one in enumerate(sums)
    ]  # fmt: skip
    data, asked = write(tmp_path / "train.jsonl", rows[:32]), write(tmp_path / "test.jsonl", rows[32:])
    flags = ["--task_type", task, "--loss_type", loss, "--dataset", data, "--val_dataset", asked]
    flags += ["--max_steps", "6", "--save_steps", "6", "--eval_on_start", "true", "--output_dir", str(tmp_path / "out")]
    run("sft", "--model", smollm2_dir, *flags, *QUICK, log=tmp_path / "sft.log")
    folder = run_directory(tmp_path / "out")
    before, *_, after = [row for row in read_rows(folder) if "eval_loss" in row]
    assert after["eval_loss"] < before["eval_loss"], (before, after)
    assert after[f"eval_{metric}"] >= before[f"eval_{metric}"]
    told = tmp_path / "told.jsonl"
    questions = [{"messages": [*row["messages"], *(row["positive_messages"][0] if role == "assistant" else [])]}
                 for row in rows[32:]]  # fmt: skip
    asked = write(tmp_path / "asked.jsonl", questions)
    run(
        "infer", "--adapters", str(folder / "checkpoint-6"), "--val_dataset", asked,
        "--result_path", str(told), log=tmp_path / "infer.log",
    )  # fmt: skip
    answers = [json.loads(line)["response"] for line in told.read_text().splitlines()]
    assert len(answers) == 8
    if task == "embedding":
        assert sum(value**2 for value in answers[0]) == pytest.approx(1, abs=1e-2)
    else:
        assert all(0 < score < 1 for score in answers)
