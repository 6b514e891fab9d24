"""The journal: each record once, whatever a kill leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayswift.errors import UserError
from rayswift.journal import open_journal


def test_records_come_back_and_a_number_is_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "j"
    with open_journal(path, "run", override=False) as journal:
        journal.add(5, {"text": "fünf\nlines"})
        journal.add(2, {"text": "two"})
        journal.add(5, {"text": "again"})
        assert journal.get(5) == {"number": 5, "text": "fünf\nlines"}
        journal.add(7, {"text": "after reading"})
    with open_journal(path, "run", override=False) as journal:
        assert [number in journal for number in (2, 5, 7, 8)] == [True, True, True, False]
        assert journal.get(7) == {"number": 7, "text": "after reading"}
        assert journal.get(8) is None
        journal.add(8, {"text": "new"})
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize("rubbish", [b'{"number": 3, "te', b"\x00\x00\x00\n", b"[1]\n", b'{"other": 1}\n'])
def test_what_a_kill_or_a_full_disk_leaves_is_passed_over(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "j"
    with open_journal(path, "run", override=False) as journal:
        journal.add(1, {"text": "one"})
    with path.open("ab") as file:
        file.write(rubbish)
    with open_journal(path, "run", override=False) as journal:
        assert len(journal) == 1
        journal.add(3, {"text": "three"})
    with open_journal(path, "run", override=False) as journal:
        assert (journal.get(1) or {})["text"] == "one"
        assert (journal.get(3) or {})["text"] == "three"


def test_another_runs_answers_are_not_thrown_away_unasked(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with open_journal(path, "run", override=False) as journal:
        journal.add(1, {"text": "one"})
    with (
        pytest.raises(UserError, match="1 answers of an unfinished run with other settings"),
        open_journal(path, "other", override=False),
    ):
        pass
    with open_journal(path, "other", override=True) as journal:
        assert len(journal) == 0


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with (
        open_journal(path, "run", override=False),
        pytest.raises(UserError, match="another rayswift sample is writing"),
        open_journal(path, "run", override=True),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"--output_dir .*cannot be written"),
        open_journal(tmp_path / "file" / "j", "run", override=False),
    ):
        pass
