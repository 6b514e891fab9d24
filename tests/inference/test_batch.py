"""From a source of answers to the result file: order, resuming, statistics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rayswift.arguments import make_arguments
from rayswift.generate.types import Answer, Request
from rayswift.inference.run import answer_rows
from rayswift.journal import open_results

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": f"{n}!"}], "dataset": "d"}
    for n in range(6)
]
ROWS[2] = {"messages": [], "error": "d:3: no conversation", "dataset": "d"}


def backwards(requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
    """Answers every row, the last one first."""
    for request in reversed(requests):
        yield request.numbers[0], Answer(request.row["messages"][0]["content"] + "!", 3, 2)


def run(path: Path, source: Any, **settings: Any) -> list[dict[str, Any]]:
    args = make_arguments("infer", model="m", val_dataset=["d"], **settings)
    with open_results(path, "run") as results:
        return answer_rows(source, ROWS, results, args)


def test_answers_that_come_in_any_order_are_written_in_the_order_of_the_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.jsonl"
    results = run(path, backwards, metric="acc")
    assert [row["response"] for row in results] == ["0!", "1!", "", "3!", "4!", "5!"]
    assert results == [json.loads(line) for line in path.read_text().splitlines()]
    assert results[2]["error"] == "d:3: no conversation"
    printed = capsys.readouterr().out
    assert "{'acc': 1.0}" in printed
    assert "'num_prompt_tokens': 15, 'num_generated_tokens': 10, 'num_samples': 6" in printed


def test_a_run_that_ends_early_keeps_what_it_has_and_the_next_answers_only_the_rest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, asked = tmp_path / "out.jsonl", []

    def dies_after_two(requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        yield requests[0].numbers[0], Answer("0!")
        yield requests[1].numbers[0], Answer("1!")
        raise KeyboardInterrupt

    def notes_rows(requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        asked.extend(request.numbers[0] for request in requests)
        return backwards(requests)

    with pytest.raises(KeyboardInterrupt):
        run(path, dies_after_two)
    assert len(path.read_text().splitlines()) == 3  # the unreadable row stands behind the two answers
    caplog.set_level("INFO", "rayswift")
    results = run(path, notes_rows)
    assert asked == [3, 4, 5]
    assert [row["response"] for row in results] == ["0!", "1!", "", "3!", "4!", "5!"]
    assert len(path.read_text().splitlines()) == 6
    assert "3 of 6 rows are in" in caplog.text
    assert run(path, notes_rows) == results
    assert asked == [3, 4, 5]  # nothing is asked twice
