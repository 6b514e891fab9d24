"""``--eval_async true``: scores that come late are those of their step, and what is best and kept follows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyarrow import fs
from test_trainer import Run, fast, plain_steps  # noqa: F401 (a fixture)

from rayswift.arguments import make_arguments
from rayswift.cluster import Workers
from rayswift.errors import UserError
from rayswift.train.checkpoints import manifest
from rayswift.train.evaluation import spare_resources


class Elsewhere:
    """Evaluations that end some steps after they were asked for, the last ones when they are waited for."""

    def __init__(self, scores: dict[int, float | str], after: int, known: dict[int, float] | None = None) -> None:
        self.scores, self.after, self.known = scores, after, known or {}
        self.asked: dict[int, int] = {}
        self.noted: list[tuple[int, dict[str, float], int | None]] = []

    def scored(self) -> Iterator[tuple[int, dict[str, float]]]:
        yield from ((step, {"eval_loss": loss}) for step, loss in self.known.items())

    def ask(self, step: int) -> None:
        self.asked[step] = self.after

    def finished(self, wait: bool, tick: Any) -> Iterator[tuple[int, dict[str, float] | str]]:
        for step in list(self.asked):
            self.asked[step] -= 1
            if wait or self.asked[step] < 0:
                del self.asked[step]
                found = self.scores[step]
                yield step, found if isinstance(found, str) else {"eval_loss": found, "eval_token_acc": 0.5}

    def note(self, step: int, scores: dict[str, float], state: Any) -> None:
        self.noted.append((step, scores, state.best_global_step))


def trained(folder: Path, elsewhere: Elsewhere, **flags: Any) -> Run:
    def prepare(trainer: Any) -> None:
        trainer.evaluations = elsewhere

    run = Run(folder, plain_steps(8), save_strategy="steps", save_steps=2, eval_strategy="no", prepare=prepare, **flags)
    run.trainer.take_scores(wait=True)
    return run


def test_scores_come_late_and_count_for_their_step(tmp_path: Path) -> None:
    elsewhere = Elsewhere({2: 0.5, 4: 0.1, 6: "no memory", 8: 0.3}, after=3)
    run = trained(tmp_path, elsewhere)
    rows = [event["row"] for event in run.events if event["event"] == "log"]
    scores = [(row["global_step"], row["epoch"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    assert scores == [(2, 0.25, 0.5), (4, 0.5, 0.1), (8, 1.0, 0.3)]
    after = [row["global_step"] for row in rows if "loss" in row or "eval_loss" in row]
    assert after.index(5) < after.index(2, 2)  # step 2's score comes behind step 5's row
    assert [(step, best) for step, _, best in elsewhere.noted] == [(2, 2), (4, 4), (8, 4)]
    assert (run.trainer.state.best_global_step, run.trainer.state.best_metric) == (4, 0.1)
    assert run.trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    (note,) = [event["line"] for event in run.events if event["event"] == "note"]
    assert note == "checkpoint-6 was not evaluated (no memory)"


def test_a_higher_metric_may_be_the_better_one(tmp_path: Path) -> None:
    run = trained(tmp_path, Elsewhere(dict.fromkeys((2, 4, 6, 8), 0.5), after=0), metric_for_best_model="token_acc")
    assert run.trainer.state.best_global_step == 2
    assert run.trainer._rank_checkpoint(8, {"eval_token_acc": 0.6}) is None
    assert run.trainer.state.best_global_step == 8


def test_scores_of_earlier_attempts_are_known(tmp_path: Path) -> None:
    run = trained(tmp_path, Elsewhere(dict.fromkeys((2, 4, 6, 8), 0.5), after=1, known={1: 0.2}))
    assert run.trainer.state.best_global_step == 1


def checkpoint(folder: Path, step: int) -> str:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    (path / "model").write_text(str(step))
    manifest.write_manifest(fs.LocalFileSystem(), str(path), step, manifest.hash_files(str(path)))
    return str(path)


def test_a_score_is_in_the_manifest_and_what_is_evaluated_stays(tmp_path: Path) -> None:
    files = fs.LocalFileSystem()
    paths = [checkpoint(tmp_path, step) for step in (2, 4, 6, 8)]
    manifest.write_scores(files, paths[0], {"eval_loss": 0.5})
    found = manifest.read_manifest(files, paths[0])
    assert found is not None
    assert found["scores"] == {"eval_loss": 0.5}
    assert manifest.verify(paths[0], found, files) is None
    assert manifest.keep_only(files, str(tmp_path), 2, paths[0], {"checkpoint-6"}) == ["checkpoint-4"]
    manifest.write_scores(files, paths[1], {"eval_loss": 0.1})  # it is gone
    assert not Path(paths[1]).exists()
    assert json.loads(Path(paths[0], "manifest.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    ("every", "workers", "spare"),
    [
        ({"CPU": 4.0}, Workers(3, False, {"CPU": 1.0}), {"CPU": 1.0}),
        ({"CPU": 3.0}, Workers(3, False, {"CPU": 1.0}), None),
        ({"CPU": 64.0, "GPU": 8.0}, Workers(8, True, {"CPU": 1.0, "GPU": 1.0}), None),
        ({"CPU": 64.0, "GPU": 8.0}, Workers((4, 7), True, {"CPU": 1.0, "GPU": 1.0}), {"CPU": 1.0, "GPU": 1.0}),
    ],
)
def test_capacity_for_an_evaluator(
    every: dict[str, float], workers: Workers, spare: dict[str, float] | None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("ray.cluster_resources", lambda: every)
    args = make_arguments("sft", model="m/m", dataset=["d"], eval_async=True)
    assert spare_resources(args, workers) == spare
    assert ("so they evaluate themselves" in capsys.readouterr().out) == (spare is None)
    assert spare_resources(make_arguments("sft", model="m/m", dataset=["d"]), workers) is None


@pytest.mark.parametrize(
    ("flags", "named"),
    [({"early_stop_interval": 2}, "--early_stop_interval"), ({"save_strategy": "best"}, "--save_strategy best"),
     ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "--lr_scheduler_type")],
)  # fmt: skip
def test_what_waits_for_scores_contradicts(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=f"--eval_async true contradicts {named}"):
        make_arguments("sft", model="m/m", dataset=["d"], eval_async=True, **flags)
