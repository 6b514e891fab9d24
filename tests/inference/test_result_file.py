"""The result file: rows in order, each once, whatever a killed run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayswift.errors import UserError
from rayswift.journal import open_results, run_identity


def rows_in(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, run: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Append rows for a run; the rows that were there before."""
    with open_results(path, run) as results:
        before = list(results.rows)
        for row in rows:
            results.append(row)
    return before


def test_the_same_run_goes_on_after_its_rows_and_another_run_after_the_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.jsonl"
    assert write(path, "first", {"n": 0}, {"n": 1}) == []
    assert write(path, "first", {"n": 2}) == [{"n": 0}, {"n": 1}]
    assert write(path, "second", {"other": 0}) == []
    assert write(path, "second", {"other": 1}) == [{"other": 0}]
    assert rows_in(path) == [{"n": 0}, {"n": 1}, {"n": 2}, {"other": 0}, {"other": 1}]


@pytest.mark.parametrize("half", ['{"n": 1, "te', "\x00" * 200_000, "中"])
def test_a_row_that_was_half_written_is_written_again(tmp_path: Path, half: str) -> None:
    path = tmp_path / "out.jsonl"
    write(path, "run", {"n": 0})
    with path.open("a") as file:
        file.write(half)
    assert write(path, "run", {"n": 1}) == [{"n": 0}]
    assert rows_in(path) == [{"n": 0}, {"n": 1}]


def test_a_file_with_nothing_but_a_half_row_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"half')
    assert write(path, "run", {"n": 0}) == []
    assert rows_in(path) == [{"n": 0}]


@pytest.mark.parametrize("end", ["\n", ""])  # not every editor ends the last line
def test_rows_that_were_there_before_the_first_run_stay(tmp_path: Path, end: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"mine": 1}' + end)
    write(path, "run", {"n": 0})
    assert write(path, "run") == [{"n": 0}]
    assert rows_in(path) == [{"mine": 1}, {"n": 0}]


def test_a_deleted_or_shortened_file_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, "first", {"n": 0}, {"n": 1})
    write(path, "second", {"n": 2})
    path.unlink()
    assert write(path, "second", {"n": 2}) == []
    assert rows_in(path) == [{"n": 2}]


def test_a_broken_note_beside_the_file_is_no_reason_to_fail(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, "run", {"n": 0})
    (tmp_path / ".out.jsonl.run.json").write_text("not JSON")
    assert write(path, "run", {"n": 1}) == []
    assert len(rows_in(path)) == 2


def test_a_folder_that_cannot_be_written_names_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--result_path"), open_results(tmp_path / "file" / "out.jsonl", "run"):
        pass


def test_identity_follows_settings_and_rows() -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}]}]
    same = run_identity({"model": "m", "adapters": []}, rows)
    assert same == run_identity({"adapters": [], "model": "m"}, list(rows))
    assert same != run_identity({"model": "n", "adapters": []}, rows)
    assert same != run_identity({"model": "m", "adapters": []}, [*rows, *rows])


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with (
        open_results(path, "run"),
        pytest.raises(UserError, match=r"--result_path .*out.jsonl: another rayswift infer is writing it"),
        open_results(path, "run"),
    ):
        pass
