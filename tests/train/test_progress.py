"""From workers' events to what the user sees: terminal lines, logging.jsonl, TensorBoard, pictures."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayswift.errors import RunFailedError
from rayswift.train.events import EventQueue, EventsOfActor, start_event_queue
from rayswift.train.local_events import EventsHere
from rayswift.train.progress import Progress, format_seconds, plot_rows, read_log
from rayswift.train.reporters import TensorBoard
from rayswift.train.run_directory import RunDirectory
from rayswift.train.schedule import StepSchedule

PLAN = StepSchedule(global_batch_size=16, per_device_batch_size=1, max_steps=40, steps_per_epoch=20)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0s"),
        (53.9, "53s"),
        (60, "1m 0s"),
        (91, "1m 31s"),
        (3600, "1h 0m 0s"),
        (34216, "9h 30m 16s"),
        (360000, "100h 0m 0s"),
    ],
)
def test_format_seconds(seconds: float, expected: str) -> None:
    assert format_seconds(seconds) == expected


def training_row(step: int, loss: float) -> dict[str, Any]:
    return {
        "loss": loss,
        "grad_norm": 1.23456789012,
        "learning_rate": 1e-4,
        "token_acc": 0.5,
        "memory(GiB)": 12.3456,
        "tokens/s": 1234.567,
        "epoch": step / 20,
        "global_step": step,
    }


def eval_row(step: int, loss: float) -> dict[str, Any]:
    return {"eval_loss": loss, "eval_token_acc": 0.25, "eval_runtime": 3.5, "epoch": step / 20, "global_step": step}


Watch = Callable[..., Progress]


@pytest.fixture(scope="module")
def watch() -> Watch:
    """What the driver does around a training that sends these events. All of them share the queue."""
    queue = start_event_queue()

    def watched(
        run: RunDirectory, events: list[dict[str, Any]], reporters: Sequence[Any] = (), **options: Any
    ) -> Progress:
        with Progress(queue, PLAN, run, reporters, **options) as progress:
            for event in events:
                queue.tell("push", event)
        assert queue.ask("drain") == []
        return progress

    return watched


def log(step: int, loss: float) -> dict[str, Any]:
    return {"event": "log", "row": training_row(step, loss)}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory.create(str(tmp_path), add_version=True)


def test_a_run_as_the_user_sees_it(run: RunDirectory, watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        {"event": "start", "parameter_info": "498.4319M Params (4.3991M Trainable [0.8826%])", "activations": "kept"},
        {"event": "resume", "step": 0},
        {"event": "step", "step": 1},
        log(1, 2.123456789),
        {"event": "log", "row": eval_row(20, 1.5)},
        {"event": "checkpoint", "step": 20, "best": 20},
        {"event": "drops", "lines": ["3 rows dropped: no column holds text (first at a.jsonl:17)"]},
        log(40, 1.0),
        {"event": "checkpoint", "step": 40, "best": 20},
    ]
    progress = watch(run, events, [TensorBoard(run)])
    assert progress.parameter_info == events[0]["parameter_info"]
    assert (progress.last_step, progress.best_step) == (40, 20)

    first, evaluation, last = read_log(run)
    assert list(first) == [
        "loss", "token_acc", "grad_norm", "learning_rate", "memory(GiB)", "train_speed(iter/s)", "tokens/s", "epoch",
        "global_step/max_steps", "percentage", "elapsed_time", "remaining_time",
    ]  # fmt: skip
    assert (first["loss"], first["grad_norm"], first["memory(GiB)"], first["tokens/s"]) == (
        2.12345679, 1.23456789, 12.35, 1234.57,
    )  # fmt: skip
    assert (first["global_step/max_steps"], first["percentage"], first["epoch"]) == ("1/40", "2.50%", 0.05)
    assert list(evaluation)[:3] == ["eval_loss", "eval_token_acc", "eval_runtime"]
    assert (last["global_step/max_steps"], last["percentage"], last["remaining_time"]) == ("40/40", "100.00%", "0s")

    shown = capsys.readouterr()
    assert "model_parameter_info: 498.4319M Params" in shown.out
    assert "'loss': 2.12345679" in shown.out
    assert "saved checkpoint-20" in shown.out
    assert "3 rows dropped: no column holds text (first at a.jsonl:17)" in shown.out
    assert "going on" not in shown.out
    assert "loss=1.0000 acc=0.500 grad_norm=1.23 lr=1.00e-04 tok/s=1235 mem=12.35GiB" in shown.err

    images = {path.name for path in (run.local / "images").iterdir()}
    assert {"train_loss.png", "train_token_acc.png", "train_learning_rate.png", "eval_loss.png"} <= images
    assert all((run.local / "images" / name).read_bytes().startswith(b"\x89PNG") for name in images)
    assert scalars(run) == {
        "train/loss": [(1, 2.123456789), (40, 1.0)],
        "eval/loss": [(20, 1.5)],
        "eval/token_acc": [(20, 0.25)],
    }


def test_rows_of_a_bad_step_are_kept_with_their_place(
    run: RunDirectory, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The worst first; a place that cannot be found any more is no reason to lose the others."""

    def place(row: Any) -> str:
        return {7: "a.jsonl:8", 9: "b.jsonl:2"}[row]

    def bad_step(then: str) -> dict[str, Any]:
        rows = [{"worker": 0, "micro_batch": number, "loss": loss, "row": row, "text": "a text"}
                for number, (loss, row) in enumerate([(1.0, 7), (float("nan"), 9), (2.0, 11)])]  # fmt: skip
        return {"event": "bad_step", "step": 3, "what": "its loss is nan", "then": then, "rows": rows}

    watch(run, [bad_step("skip")], place_of=place)
    saved = [json.loads(line) for line in (run.local / "bad_steps/step-3.jsonl").read_text().splitlines()]
    assert [(row["place"], row["loss"]) for row in saved] == [("b.jsonl:2", "nan"), ("row 11", 2.0), ("a.jsonl:8", 1.0)]
    told = f"step 3: its loss is nan; its 3 rows, b.jsonl:2 the first, are in {run.uri}/bad_steps/step-3.jsonl"
    assert f"{told}; the step is left out" in capsys.readouterr().out
    with pytest.raises(RunFailedError, match=r"b.jsonl:2 the first, .* \(--on_nan skip leaves such steps out\)"):
        watch(run, [bad_step("stop")], place_of=place)


def scalars(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.local / "runs"))
    events.Reload()
    wanted = ("train/loss", "eval/loss", "eval/token_acc")
    return {tag: [(e.step, pytest.approx(e.value)) for e in events.Scalars(tag)] for tag in wanted}


def test_an_attempt_that_resumes_forgets_the_rows_after_its_checkpoint(
    run: RunDirectory, watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [{"event": "resume", "step": 0}, log(5, 3.0), log(10, 2.0), log(15, 1.5)]
    again = [{"event": "resume", "step": 10}, log(15, 1.25), log(20, 1.0)]
    progress = watch(run, events + again)
    found = [(row["global_step/max_steps"], row["loss"]) for row in read_log(run)]
    assert found == [("5/40", 3.0), ("10/40", 2.0), ("15/40", 1.25), ("20/40", 1.0)]
    assert progress.rows == read_log(run)
    assert "training goes on from step 10" in capsys.readouterr().out


def test_a_new_driver_goes_on_with_the_log_of_a_killed_one(run: RunDirectory, watch: Watch) -> None:
    watch(run, [{"event": "resume", "step": 0}, log(5, 3.0), log(10, 2.0), log(15, 1.5)])
    with (run.local / "logging.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"loss": 1.0, "global_st')
    watch(run, [{"event": "resume", "step": 10}, log(15, 1.25)])
    lines = (run.local / "logging.jsonl").read_text(encoding="utf-8").splitlines()
    found = [(row["global_step/max_steps"], row["loss"]) for row in map(json.loads, lines)]
    assert found == [("5/40", 3.0), ("10/40", 2.0), ("15/40", 1.25)]


def test_rows_that_a_killed_driver_did_not_write_come_from_the_checkpoint(run: RunDirectory, watch: Watch) -> None:
    watch(run, [{"event": "resume", "step": 0}, log(5, 3.0)])
    history = [
        training_row(5, 3.0),
        training_row(10, 2.0),
        eval_row(10, 1.5),
        {"train_runtime": 1.0, "global_step": 10},
    ]
    watch(run, [{"event": "resume", "step": 10, "history": history}, log(15, 1.25)])
    found = [(row["global_step/max_steps"], row.get("loss"), row.get("eval_loss")) for row in read_log(run)]
    assert found == [("5/40", 3.0, None), ("10/40", 2.0, None), ("10/40", None, 1.5), ("15/40", 1.25, None)]


def test_a_log_that_cannot_be_written_is_said_once_and_made_whole_later(
    run: RunDirectory, watch: Watch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, room = RunDirectory.append_jsonl, iter([True, False, False, True])

    def appending(self: RunDirectory, name: str, row: dict[str, Any]) -> None:
        append(self, name, row)
        if not next(room):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write = RunDirectory.write_jsonl

    def writing(self: RunDirectory, name: str, rows: list[dict[str, Any]]) -> None:
        if not next(room):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, rows)

    monkeypatch.setattr(RunDirectory, "append_jsonl", appending)
    monkeypatch.setattr(RunDirectory, "write_jsonl", writing)
    progress = watch(run, [*(log(step, 1.0) for step in (1, 2, 3, 4)), {"event": "checkpoint", "step": 4, "best": 4},
                           {"event": "note", "line": "a line"}])  # fmt: skip
    printed = capsys.readouterr().out
    assert printed.count("its log cannot be written (No space left on device); training goes on") == 1
    assert "a line" in printed
    assert progress.last_step == 4
    assert [row["global_step/max_steps"].split("/")[0] for row in read_log(run)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("where", ["in the driver", "an actor"])
def test_only_the_newest_of_waiting_steps_is_kept_and_nothing_else_is_lost(where: str, ray_cluster: None) -> None:
    queue = EventsHere(EventQueue()) if where == "in the driver" else EventsOfActor({})
    worker = pickle.loads(pickle.dumps(queue)) if where == "in the driver" else queue
    for step in (1, 2, 3):
        worker.tell("push", {"event": "step", "step": step})
    worker.tell("push", log(3, 1.0))
    worker.tell("push", {"event": "step", "step": 4})
    queue.settle()
    assert queue.ask("drain") == [{"event": "step", "step": 3}, log(3, 1.0), {"event": "step", "step": 4}]
    assert queue.ask("drain") == []


def test_a_run_without_rows_has_no_pictures(run: RunDirectory) -> None:
    plot_rows([], run)
    assert not (run.local / "images").exists()
