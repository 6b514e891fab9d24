"""jobs/sft_eval_deploy.py: its stages in order, what is deployed replaced only if the score rose. Nothing trains."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from rayswift.cli import main as cli

JOB = Path(__file__).resolve().parents[2] / "jobs" / "sft_eval_deploy.py"


def stages(monkeypatch: pytest.MonkeyPatch, tuned_score: float, *words: str) -> list[Any]:
    """The arguments of the commands that the job starts, with these scores for base (0.25) and tuned."""
    caught: list[Any] = []
    answers: dict[str, Any] = {
        "sft": {"last_model_checkpoint": "output/v0/checkpoint-9"},
        "eval": {"base": {"gsm8k": 0.25}, "tuned": {"gsm8k": tuned_score}},
        "export": "output/v0/checkpoint-9-merged",
    }

    def run(arguments: Any) -> Any:
        caught.append(arguments)
        return answers.get(arguments.command)

    monkeypatch.setattr(cli, "run_command", run)
    monkeypatch.setattr(sys, "argv", ["sft_eval_deploy.py", "--model", "m", "--dataset", "d.jsonl", *words])
    runpy.run_path(str(JOB), run_name="__main__")
    return caught


def test_a_better_model_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--max_steps", "3", "--", "--eval_limit", "5", "--", "--app_name", "chat"]
    sft, evaluated, export, deploy = stages(monkeypatch, 0.5, *words)
    assert (sft.command, sft.model, sft.dataset, sft.max_steps) == ("sft", "m", ["d.jsonl"], 3)
    assert (evaluated.eval_dataset, evaluated.eval_limit) == (["gsm8k"], 5)
    assert evaluated.models["base"] == {"model": "m"}
    assert evaluated.models["tuned"]["adapters"] == ["output/v0/checkpoint-9"]
    assert (export.adapters, export.merge_lora) == (["output/v0/checkpoint-9"], True)
    assert (deploy.model, deploy.app_name) == ("output/v0/checkpoint-9-merged", "chat")


@pytest.mark.parametrize("score", [0.25, 0.1])
def test_what_is_deployed_stays_when_the_score_did_not_rise(monkeypatch: pytest.MonkeyPatch, score: float) -> None:
    assert [one.command for one in stages(monkeypatch, score)] == ["sft", "eval", "export"]
