"""Steps and batches of a run."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.arguments import Arguments, make_arguments
from rayswift.errors import UserError
from rayswift.train.schedule import StepSchedule, plan_steps


def arguments(**given: Any) -> Arguments:
    return make_arguments("sft", model="org/model", dataset=["x"], **given)


# The steps of SWIFT's log: 48,330 rows, 3 epochs, batch 16.
@pytest.mark.parametrize(
    ("given", "world_size", "num_rows", "expected"),
    [
        ({}, 1, 48330, StepSchedule(16, 1, 9060, 3020)),
        ({}, 2, 48330, StepSchedule(16, 1, 9060, 3020)),
        ({"gradient_accumulation_steps": 16}, 1, 48330, StepSchedule(16, 1, 9060, 3020)),
        ({"per_device_train_batch_size": 4}, 2, 48330, StepSchedule(16, 4, 9060, 3020)),
        ({"per_device_train_batch_size": 4}, 3, 1000, StepSchedule(24, 4, 123, 41)),
        ({"per_device_train_batch_size": 32}, 1, 100, StepSchedule(32, 32, 9, 3)),
        ({"num_train_epochs": 0.5}, 1, 160, StepSchedule(16, 1, 5, 10)),
        ({"num_train_epochs": 1.25}, 1, 160, StepSchedule(16, 1, 13, 10)),
        ({"max_steps": 7}, 1, 48330, StepSchedule(16, 1, 7, 3020)),
        ({"max_steps": 9000, "max_epochs": 2}, 1, 160, StepSchedule(16, 1, 20, 10)),
        ({"gradient_accumulation_steps": 1}, 4, 100, StepSchedule(4, 1, 75, 25)),
        # Fewer rows than a global batch make one smaller step per epoch.
        ({}, 1, 5, StepSchedule(5, 1, 3, 1)),
        ({}, 2, 5, StepSchedule(6, 1, 3, 1)),
        ({"per_device_train_batch_size": 8}, 1, 3, StepSchedule(8, 8, 3, 1)),
    ],
)
def test_plan_of_a_dataset(given: dict[str, Any], world_size: int, num_rows: int, expected: StepSchedule) -> None:
    assert plan_steps(arguments(**given), world_size, num_rows) == expected


def test_plan_of_a_stream() -> None:
    args = arguments(streaming=True, max_steps=10000, per_device_train_batch_size=4)
    plan = plan_steps(args, 8, None)
    assert plan == StepSchedule(32, 4, 10000, None)
    assert plan.epoch_of(2500) == 0.25


def test_a_stream_without_a_length_is_refused() -> None:
    args = arguments()
    with pytest.raises(UserError, match=r"--streaming true: .* --max_steps"):
        plan_steps(args, 1, None)


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_the_global_batch_stays_on_other_worker_counts(world_size: int, accumulation: int) -> None:
    assert StepSchedule(24, 2, 10, 10).accumulation(world_size) == accumulation


@pytest.mark.parametrize(("world_size", "accumulation"), [(5, 3), (7, 2), (24, 1)])
def test_a_worker_count_that_does_not_divide_leaves_some_micro_batches_empty(
    world_size: int, accumulation: int
) -> None:
    assert StepSchedule(24, 2, 10, 10).accumulation(world_size) == accumulation


def test_packs_make_no_step_larger_than_asked() -> None:
    assert plan_steps(arguments(), 1, 100, packed=True) == StepSchedule(16, 1, 21, 7)


def test_a_resumed_run_keeps_its_global_batch() -> None:
    plan = plan_steps(arguments(), 3, 48330, global_batch_size=16)
    assert plan == StepSchedule(16, 1, 9060, 3020)
    assert plan.accumulation(3) == 6


@pytest.mark.parametrize(
    ("plan", "workers", "items", "line"),
    [
        (StepSchedule(16, 1, 9060, 3020), 1, 48330,
         "9060 steps of 16 rows (1 workers × 1 rows × 16 accumulated), 10 of 3020 with one more"),
        (StepSchedule(16, 1, 40, 20), 2, 320, "40 steps of 16 rows (2 workers × 1 rows × 8 accumulated)"),
        # A checkpoint's batch of 4 with --per_device_train_batch_size 8.
        (StepSchedule(4, 8, 8, 4), 1, 16, "8 steps of 4 rows (1 workers × 1 forward passes of at most 8 rows)"),
        (StepSchedule(16, 2, 20, 10), 3, 160, "20 steps of 16 rows (3 workers × 3 forward passes of at most 2 rows)"),
        (StepSchedule(16, 1, 1, 1), 1, 31, "1 steps of 31 rows (1 workers × 16 forward passes of at least 1 rows)"),
        (StepSchedule(8, 8, 3, 1), 1, 3, "3 steps of 3 rows (1 workers × 1 forward passes of at most 8 rows)"),
        (StepSchedule(32, 4, 100, None), 8, None, "100 steps of 32 rows (8 workers × 4 rows × 1 accumulated)"),
    ],
)  # fmt: skip
def test_the_line_of_a_plan_is_arithmetic_that_holds(
    plan: StepSchedule, workers: int, items: int | None, line: str
) -> None:
    assert plan.describe(workers, items, "rows") == line


def test_epoch_of_a_step() -> None:
    assert StepSchedule(16, 1, 9060, 3020).epoch_of(4530) == 1.5
