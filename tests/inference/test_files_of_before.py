"""Unfinished runs that the version before the house plan left (tests/data/before) go on where they stopped."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.eval import evaluate as evaluation
from rayswift.eval.results import Question, Result
from rayswift.generate.types import Answer
from rayswift.inference.command import deciding_settings
from rayswift.inference.rows import read_rows, resolve_asked
from rayswift.journal import open_results, run_identity
from rayswift.sampling import run as sampling

NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result file with two of four rows, a journal with two of eight answers, an evaluation with one of two
    benchmarks; each ends in half a row."""
    shutil.copytree(Path(__file__).resolve().parents[1] / "data" / "before", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_a_result_file_goes_on_after_its_rows() -> None:
    args: Any = make_arguments(
        "infer", base_url=NOWHERE, model="m", val_dataset=["rows.jsonl"], result_path="out.jsonl"
    )
    with open_results(
        Path("out.jsonl"), run_identity(deciding_settings(args), read_rows(resolve_asked(args), args))
    ) as results:
        assert [row["response"] for row in results.rows] == ["before 0", "before 1"]
        results.append({"response": "now 2"})
    assert [row["response"] for row in rows_of("out.jsonl")] == ["of another run", "before 0", "before 1", "now 2"]


def test_a_journal_of_answers_goes_on_with_those_that_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def opened(args: Any, *files: Any) -> Iterator[Any]:
        yield lambda requests: [(n, Answer(f"now {n}")) for request in requests for n in request.numbers]

    monkeypatch.setattr(sampling, "open_answers", opened)
    args: Any = make_arguments(
        "sample", sampler_engine="client", base_url=NOWHERE, model="m", dataset=["rows.jsonl"], num_return_sequences=2,
        output_dir=".", output_file="sampled.jsonl",
    )  # fmt: skip
    sampling.sample(args)
    texts = [row["messages"][-1]["content"] for row in rows_of("sampled.jsonl")]
    assert texts == ["before 0", "now 1", "before 2", "now 3", "now 4", "now 5", "now 6", "now 7"]
    assert not list(Path().glob(".sampled*"))


def test_an_evaluation_goes_on_in_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Backend:
        folder = "native"

        def prepare(self, benchmark: Any) -> None: ...

        def check(self, benchmark: Any, endpoint: Any) -> None: ...

        def run(self, benchmark: Any, model: Any, endpoint: Any, folder: Path) -> Result:
            asked.append((benchmark.asked, (folder / "predictions.jsonl").read_text()))
            question = Question("q/0", "1+1?", "2", "2", "2", {"accuracy": 1.0})
            return Result(benchmark.asked, model.label, "Native", "accuracy", {"accuracy": 1.0}, 0, [question])

    monkeypatch.setattr(evaluation, "choose_backend", lambda args: Backend())
    monkeypatch.setattr(evaluation, "check_endpoints", lambda endpoints: None)
    args: Any = make_arguments("eval", eval_url=NOWHERE, model="m", eval_dataset=["ARC_c", "gsm8k"])
    assert evaluation.evaluate(args) == {"m": {"ARC_c": 0.5, "gsm8k": 1.0}}
    assert asked == [("gsm8k", '{"index": 0}\n')]
    (folder,) = Path("eval_output/native").iterdir()
    assert len(rows_of(str(folder / "m" / "ARC_c" / "answers.jsonl"))) == 2
    assert json.loads((folder / "run.json").read_text())["finished"] is True
