"""What lets a killed run go on where it stopped: its identity, and records on disk that are there once each.

The identity is a digest of all that decides a run's answers; a run goes on with the records of its own identity alone.

- :func:`open_results` (``rayswift infer``): rows in order, at the end of a file that keeps the rows of other runs.
- :func:`open_journal` (``rayswift sample``): records by number, in any order, in a file that the finished run removes.
- :func:`open_run` (``rayswift eval``): a folder, whose ``*.jsonl`` are others' records.

Each is locked while it is open, and loses the half row that a kill in mid-write leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rayswift.errors import UserError
from rayswift.files import write_whole

logger = logging.getLogger("rayswift.journal")

Record = dict[str, Any]


def run_identity(settings: Mapping[str, Any], rows: Sequence[Record]) -> str:
    """What makes two runs the same: the settings that decide the answers, and the rows."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


def drop_half_row(file: BinaryIO) -> None:
    """Cut off half a last line (what a kill in mid-write leaves), give a whole one its end where that is missing
    (another program's file), and stand at the end of the file."""
    end = file.seek(0, os.SEEK_END)
    keep, step = end, 1 << 16
    while keep > 0:
        first = max(0, keep - step)
        file.seek(first)
        block = file.read(keep - first)
        if b"\n" in block:
            keep = first + block.rindex(b"\n") + 1
            break
        keep = first
    file.seek(keep)
    if keep < end and _parsed(file.read()):
        file.write(b"\n")
    elif keep < end:
        file.truncate(keep)
        file.seek(keep)


def _claim(path: Path) -> BinaryIO | None:
    """The file, made if it is not there, without half a row and locked; None when another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not "a": a half-written last row has to go, which takes a file that can be cut.
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:  # a file system without locks
        logger.debug("%s: no lock (%s)", path, error)
    drop_half_row(file)
    return file


def _parsed(text: str | bytes) -> Record:
    """A record; empty where there is none (a disk that filled up leaves such)."""
    try:
        record = json.loads(text)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _state(path: Path) -> Record:
    """Which run a file or folder belongs to; empty where nothing says so."""
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


@contextlib.contextmanager
def _writable(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror or error})") from None


def _append(file: BinaryIO, record: Record) -> int:
    """Write it as a line; it is with the operating system when this returns. The number of bytes."""
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    file.write(line)
    file.flush()
    return len(line)


# --- rows in order ----------------------------------------------------------------------------------------------


@dataclass
class ResultFile:
    """An open result file. ``rows``: those of this run so far, the ones an earlier start wrote first."""

    path: Path
    rows: list[Record]
    _file: BinaryIO

    def append(self, row: Record) -> None:
        """Add the next row."""
        _append(self._file, row)
        self.rows.append(row)


@contextlib.contextmanager
def open_results(path: Path, identity: str) -> Iterator[ResultFile]:
    """Open (or make) the file to append the rows of the run ``identity``; another run's rows before them stay.

    A small file beside it (``.NAME.run.json``) says which run the last rows belong to, and where they begin.

    Raises:
        UserError: the file or its folder cannot be written, or another process writes it.
    """
    with _writable(f"--result_path {path}"):
        file = _claim(path)
        if file is None:
            raise UserError(f"--result_path {path}: another rayswift infer is writing it; give another name")
        state, end = path.with_name(f".{path.name}.run.json"), file.tell()
        earlier = _state(state)
        start = earlier.get("start") if earlier.get("run") == identity else None
        if not isinstance(start, int) or start >= end:
            start = end
            write_whole(state, json.dumps({"run": identity, "start": start}))
    with file:
        file.seek(start)
        yield ResultFile(path, [json.loads(line) for line in file.read().splitlines()], file)


# --- records by number ------------------------------------------------------------------------------------------


class Journal:
    """Numbered records, of which only the places are in memory. Make one with :func:`open_journal`.

    The first line of the file says which run it belongs to.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[int, int] = {}
        file.seek(0)
        self.run = _parsed(file.readline()).get("run")
        self._end = file.tell()
        for line in file:
            record = _parsed(line)
            if "number" in record:
                self._places.setdefault(int(record["number"]), self._end)
            self._end += len(line)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, number: int, record: Record) -> None:
        """Keep a record. A number that is there already stays."""
        if number not in self._places:
            self._file.seek(self._end)
            self._places[number] = self._end
            self._end += _append(self._file, {"number": number, **record})

    def get(self, number: int) -> Record | None:
        """The record of a number, None if there is none."""
        if number not in self._places:
            return None
        self._file.seek(self._places[number])
        return _parsed(self._file.readline())

    def start(self, identity: str) -> None:
        """Empty it, for the run of that identity."""
        self.run, self._places = identity, {}
        self._file.seek(0)
        self._file.truncate()
        self._end = _append(self._file, {"run": identity})


@contextlib.contextmanager
def open_journal(path: Path, identity: str, *, override: bool) -> Iterator[Journal]:
    """Open (or make) the journal of a run; with ``override`` another run's is emptied. One that stays empty goes again.

    Raises:
        UserError: it cannot be written, another process writes it, or it is another run's.
    """
    is_new_folder = not path.parent.exists()
    with _writable(f"--output_dir {path.parent}"):
        file = _claim(path)
    if file is None:
        raise UserError(f"--output_file: another rayswift sample is writing {path}; give another name")
    with file:
        journal = Journal(file)
        if journal.run not in (None, identity) and not override and len(journal):
            raise UserError(
                f"--output_file: {path} has {len(journal)} answers of an unfinished run with other settings; give "
                "another --output_file, or --override_exist_file true to drop them"
            )
        if journal.run != identity:
            journal.start(identity)
        try:
            yield journal
        finally:
            if not len(journal):
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    if is_new_folder:
                        path.parent.rmdir()


# --- a folder ---------------------------------------------------------------------------------------------------


@dataclass
class RunFolder:
    """The folder of a run. ``resumed``: an earlier start has begun it."""

    path: Path
    identity: str
    resumed: bool = True

    def mark(self, *, finished: bool) -> None:
        """Note whose it is. After a finished one the same command starts anew."""
        write_whole(self.path / "run.json", json.dumps({"run": self.identity, "finished": finished}, indent=2) + "\n")


@contextlib.contextmanager
def open_run(root: Path, identity: str) -> Iterator[RunFolder]:
    """The newest folder below ``root`` of an unfinished run of that identity that no other process works in, else a
    new one, named after the time.

    Raises:
        UserError: it cannot be written.
    """
    with _writable(f"--eval_output_dir {root}"):
        root.mkdir(parents=True, exist_ok=True)
        lock = None
        for folder in sorted(root.iterdir(), reverse=True):
            state = _state(folder / "run.json")
            if state.get("run") == identity and not state.get("finished") and (lock := _claim(folder / "run.lock")):
                run = RunFolder(folder, identity)
                for path in folder.rglob("*.jsonl"):
                    with path.open("r+b") as rows:
                        drop_half_row(rows)
                break
        else:
            stamp = time.strftime("%Y%m%d-%H%M%S")
            for number in itertools.count():  # two of one second get different names
                folder = root / (f"{stamp}-{number}" if number else stamp)
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    break
            lock = _claim(folder / "run.lock")
            run = RunFolder(folder, identity, resumed=False)
            run.mark(finished=False)
    try:
        yield run
    finally:
        if lock is not None:
            lock.close()
