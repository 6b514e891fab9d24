"""Which failures are tried again, and what the line says that a run ends with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError
from tiny_models import llama

from rayswift.errors import RunFailedError, UserError
from rayswift.train.checkpoints.snapshot import checkpoint_bytes
from rayswift.train.checkpoints.store import CheckpointStore
from rayswift.train.failures import Failures, StepFailedError, at_step, ended_by
from rayswift.train.loader import Rank
from rayswift.train.model import check_savable

LONG = ValueError("the settings cannot be saved:\n- first reason\n- second reason\n\nFix these issues.")
FIRST, AGAIN, LATER = (at_step(LONG, step, has_begun=True) for step in (5, 5, 6))
DIED = RayActorError()
LOST = at_step(RuntimeError("[gloo/transport/tcp/pair.cc:598] Connection closed by peer [127.0.0.1]:5"), 5, True)


@pytest.mark.parametrize(
    ("attempts", "final"),
    [
        ([{0: FIRST}, {1: AGAIN}], [False, True]),
        ([{0: FIRST}, {0: LATER}, {0: AGAIN}, {0: AGAIN}], [False, False, False, True]),
        # Another worker fails because of it; or a worker died twice at the same step.
        ([{0: FIRST, 1: LOST}, {0: LOST, 1: AGAIN}], [False, True]),
        ([{0: LOST, 1: DIED}, {0: LOST, 1: DIED}], [False, False]),
        ([{0: LOST}, {0: LOST}], [False, False]),
        ([{0: FIRST, 1: DIED}, {0: AGAIN, 1: DIED}], [False, False]),
        ([{1: UserError("--dataset x")}], [True]),
        ([{0: LOST, 1: RunFailedError("the loss is NaN")}], [True]),
        ([{0: at_step(LONG, 4, has_begun=False)}], [True]),
        ([{0: at_step(RuntimeError("no address"), 4, has_begun=False)}], [False]),
        ([{}, {}], [False, False]),
    ],
)
def test_what_would_come_again_is_not_tried_again(attempts: list[dict[int, Exception]], final: list[bool]) -> None:
    from rayswift.train.start.lean_trainer import _RetriesWhatMayChange

    failures = Failures()
    assert [failures.is_final(attempt) for attempt in attempts] == final
    # As Ray Train asks.
    policy = _RetriesWhatMayChange(FailureConfig(max_failures=9))
    decisions = [policy.make_decision(WorkerGroupError("", attempt)) for attempt in attempts]
    assert [decision is FailureDecision.RAISE for decision in decisions] == final


def test_the_line_that_ends_a_run_holds_the_whole_message() -> None:
    whole = "the settings cannot be saved: - first reason - second reason Fix these issues."
    error = RuntimeError("Training failed")
    ended = ended_by({1: LOST, 0: DIED, 2: FIRST}, error)
    assert str(ended) == f"training failed in worker 2 after step 5: ValueError: {whole}"
    assert str(ended_by({0: LONG}, error)) == f"training failed in worker 0: ValueError: {whole}"
    assert str(ended_by({}, error)) == "training failed in the training controller: RuntimeError: Training failed"
    assert "The actor experienced an error" in str(ended_by({0: DIED, 1: LOST}, error))
    refused = UserError("--dataset x: gone")
    assert ended_by({0: StepFailedError("x"), 1: refused}, error) is refused


def test_settings_that_cannot_be_saved_are_refused_before_the_first_step() -> None:
    model = llama()
    check_savable(model, "m")
    model.generation_config.temperature = 0.5  # without do_sample
    with pytest.raises(UserError, match=r"m/generation_config.json: .*temperature.*mend it there"):
        check_savable(model, "m")


def test_room_for_two_checkpoints_is_looked_at_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, said = llama(), []
    args = SimpleNamespace(save_only_model=False)
    weights = sum(weight.numel() for weight in model.parameters()) * 4
    assert checkpoint_bytes(model, args) == 3 * weights
    events = SimpleNamespace(tell=lambda name, event: said.append(event["line"]))
    config: Any = SimpleNamespace(args=args, run_uri=str(tmp_path), events=events)
    for free, lines in ((6 * weights, 0), (6 * weights - 1, 1)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        CheckpointStore(config, Rank(0, 1), 0, 1).check_room(model)
        assert len(said) == lines
    assert said[0].startswith(f"warning: {tmp_path} has room for")
