"""``--eval_async true`` finds what evaluation by the workers finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import QUICK, losses, read_rows, run, run_directory

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_scores_are_those_of_the_workers(tiny_dir: str, tmp_path: Path, train_type: str) -> None:
    command = [
        "sft", "--model", tiny_dir, "--dataset", "identity#60", "--model_name", "x", "--model_author", "y",
        "--train_type", train_type, "--max_steps", "6", "--save_steps", "2", "--eval_steps", "2",
        "--split_dataset_ratio", "0.2", "--learning_rate", "1e-3", "--num_workers", "1", *QUICK,
    ]  # fmt: skip
    found, trained = {}, []
    for way in ("false", "true"):
        limit = ["--save_total_limit", "1", "--load_best_model_at_end", "true"] if way == "true" else []
        output = tmp_path / way
        command_line = [*command, "--eval_async", way, *limit, "--output_dir", str(output)]
        printed = run(*command_line, log=tmp_path / f"{way}.log")
        rows = read_rows(run_directory(output))
        trained.append(losses(run_directory(output)))
        found[way] = {int(row["global_step/max_steps"].split("/")[0]): row["eval_loss"] for row in rows
                      if "eval_loss" in row}  # fmt: skip
    assert sorted(found["true"]) == [2, 4, 6]
    assert found["true"] == pytest.approx(found["false"], rel=1e-5)
    assert trained[1] == pytest.approx(trained[0], rel=1e-6)
    best = min(found["true"], key=lambda step: found["true"][step])
    kept = {path.parent.name: json.loads(path.read_text()) for path in output.glob("v*/checkpoint-*/manifest.json")}
    assert set(kept) == {f"checkpoint-{best}", "checkpoint-6"}
    for name, manifest in kept.items():
        step = int(name.removeprefix("checkpoint-"))
        assert manifest["scores"]["eval_loss"] == pytest.approx(found["true"][step], abs=1e-7)
    last = read_rows(run_directory(output))[-1]
    assert last["best_model_checkpoint"].endswith(f"checkpoint-{best}")
    assert last["best_metric"] == pytest.approx(found["true"][best], abs=1e-7)
    assert f"checkpoint-{best} is the best: its weights are loaded" in printed
