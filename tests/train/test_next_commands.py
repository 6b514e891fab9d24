"""What a run says at its end: which checkpoint is the result, and the next commands."""

from __future__ import annotations

import pytest

from rayswift.arguments import make_arguments
from rayswift.train.summary import say_end

OUTCOME = {"last_model_checkpoint": "run/checkpoint-9", "best_model_checkpoint": "run/checkpoint-6"}


@pytest.mark.parametrize(("best_at_end", "result"), [(False, "run/checkpoint-9"), (True, "run/checkpoint-6")])
@pytest.mark.parametrize(("train_type", "flag"), [("lora", "--adapters"), ("full", "--model")])
def test_the_result_is_the_last_checkpoint_or_the_best(
    best_at_end: bool, result: str, train_type: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = make_arguments(
        "sft", model="m", dataset=["d"], train_type=train_type, load_best_model_at_end=best_at_end
    )  # fmt: skip
    say_end(args, OUTCOME)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == ["last_model_checkpoint: run/checkpoint-9", "best_model_checkpoint: run/checkpoint-6"]
    assert f"  rayswift infer {flag} {result} --stream true" in printed
    assert any("--merge_lora" in line for line in printed) == (train_type == "lora")
