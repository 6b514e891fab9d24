"""What workers with GPUs are given: an optimiser in one pass, gradients that are sent while others are computed."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.train.hf_arguments import hf_training_arguments
from rayswift.train.schedule import StepSchedule


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Transformers' arguments are made of."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr("transformers.TrainingArguments", lambda **values: found.append(values))
    return found


def settle(use_gpu: bool, **flags: Any) -> None:
    args = make_arguments("sft", model="m/m", dataset=["d"], **flags)
    hf_training_arguments(args, StepSchedule(1, 1, 1, 1), 1, "out", "bfloat16", use_gpu, False)


@pytest.mark.parametrize("preset", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_presets_overlap_sending_and_computing(given: list[dict[str, Any]], preset: str) -> None:
    """On CPUs they are SWIFT's; a configuration of one's own is followed."""
    settle(True, deepspeed=preset)
    settle(False, deepspeed=preset)
    settle(True, deepspeed={"zero_optimization": {"stage": 2, "overlap_comm": False}})
    assert [one["deepspeed"]["zero_optimization"]["overlap_comm"] for one in given] == [True, False, False]


def test_the_optimiser_is_the_fused_one_unless_another_is_asked_for(given: list[dict[str, Any]]) -> None:
    for flags in ({}, {"optim": "adamw_torch"}, {"optim": "sgd"}, {"deepspeed": "zero2"}):
        settle(True, **flags)
        settle(False, **flags)
    wanted = ["adamw_torch_fused", "adamw_torch", "sgd", "adamw_torch"]
    assert [one["optim"] for one in given] == [name for name in wanted for _ in range(2)]
