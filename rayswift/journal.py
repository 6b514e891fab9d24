"""What lets a killed run go on where it stopped: its identity, and records on disk that are there once each.

The identity is a digest of all that decides a run's answers; a run goes on with the records of its own identity alone.
Beside it stand the *sources*: for each path or endpoint that decides them (``--model DIR``) a mark of what lay behind
it then. A run goes on where the marks are the same; one that is not known on both sides (a file of an earlier version,
an endpoint that does not answer now) does not count.

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


def changed_sources(earlier: Record, sources: Mapping[str, str]) -> list[str]:
    """The sources behind which something else lies now than when the run of this state was begun."""
    known = earlier.get("sources") or {}
    return [name for name, mark in sources.items() if known.get(name, mark) != mark]


def _run_state(identity: str, sources: Mapping[str, str]) -> Record:
    return {"run": identity} | ({"sources": dict(sources)} if sources else {})


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
def open_results(path: Path, identity: str, sources: Mapping[str, str] | None = None) -> Iterator[ResultFile]:
    """Open (or make) the file to append the rows of the run ``identity``; another run's rows before them stay.

    A small file beside it (``.NAME.run.json``) says which run the last rows belong to, and where they begin.
    ``sources``: marks of what lies behind its paths and endpoints; where one has changed, the run begins again.

    Raises:
        UserError: the file or its folder cannot be written, or another process writes it.
    """
    with _writable(f"--result_path {path}"):
        file = _claim(path)
        if file is None:
            raise UserError(f"--result_path {path}: another rayswift infer is writing it; give another name")
        state, end = path.with_name(f".{path.name}.run.json"), file.tell()
        earlier, sources = _state(state), sources or {}
        start = earlier.get("start") if earlier.get("run") == identity else None
        if not isinstance(start, int) or start >= end:
            start, earlier = end, {}
        elif changed := changed_sources(earlier, sources):
            start, earlier = end, {}
            logger.warning("%s: %s is not what it was when these rows were answered: all are asked again, and their "
                           "answers follow behind", path, ", ".join(changed))  # fmt: skip
        known = {**(earlier.get("sources") or {}), **sources}
        if (new := _run_state(identity, known) | {"start": start}) != earlier:
            write_whole(state, json.dumps(new))
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
        self.state = _parsed(file.readline())
        self._end = file.tell()
        for line in file:
            record = _parsed(line)
            if "sources" in record:  # what was known later
                self.state["sources"] = {**(self.state.get("sources") or {}), **record["sources"]}
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

    @property
    def run(self) -> str | None:
        """The identity of the run that it belongs to."""
        return self.state.get("run")

    def start(self, identity: str, sources: Mapping[str, str]) -> None:
        """Empty it, for the run of that identity."""
        self.state, self._places = _run_state(identity, sources), {}
        self._file.seek(0)
        self._file.truncate()
        self._end = _append(self._file, self.state)

    def note_sources(self, sources: Mapping[str, str]) -> None:
        """Keep the marks that it lacks: it is an earlier version's, or an endpoint did not answer."""
        known = self.state.get("sources") or {}
        if new := {name: mark for name, mark in sources.items() if name not in known}:
            self.state["sources"] = {**known, **new}
            self._file.seek(self._end)
            self._end += _append(self._file, {"sources": new})


def is_of_run(path: Path, identity: str, sources: Mapping[str, str]) -> bool:
    """Whether the journal there was begun by that run."""
    with path.open("rb") as file:
        journal = Journal(file)
    return journal.run == identity and not changed_sources(journal.state, sources)


@contextlib.contextmanager
def open_journal(
    path: Path, identity: str, *, override: bool, sources: Mapping[str, str] | None = None
) -> Iterator[Journal]:
    """Open (or make) the journal of a run; with ``override`` another run's is emptied. One that stays empty goes again.

    ``sources``: marks of what lies behind its paths and endpoints; where one has changed, it is another run's.

    Raises:
        UserError: it cannot be written, another process writes it, or it is another run's.
    """
    is_new_folder = not path.parent.exists()
    with _writable(f"--output_dir {path.parent}"):
        file = _claim(path)
    if file is None:
        raise UserError(f"--output_file: another rayswift sample is writing {path}; give another name")
    with file:
        journal, sources = Journal(file), sources or {}
        changed = changed_sources(journal.state, sources) if journal.run == identity else ["other settings"]
        if journal.run is not None and changed and not override and len(journal):
            why = "with other settings" if journal.run != identity else f"of what {', '.join(changed)} was before"
            raise UserError(
                f"--output_file: {path} has {len(journal)} answers of an unfinished run {why}; give "
                "another --output_file, or --override_exist_file true to drop them"
            )
        if changed:
            journal.start(identity, sources)
        journal.note_sources(sources)
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
    sources: Mapping[str, str]
    resumed: bool = True

    def mark(self, *, finished: bool) -> None:
        """Note whose it is. After a finished one the same command starts anew."""
        state = _run_state(self.identity, self.sources) | {"finished": finished}
        write_whole(self.path / "run.json", json.dumps(state, indent=2) + "\n")


@contextlib.contextmanager
def open_run(root: Path, identity: str, sources: Mapping[str, str] | None = None) -> Iterator[RunFolder]:
    """The newest folder below ``root`` of an unfinished run of that identity that no other process works in, else a
    new one, named after the time. ``sources``: as for :func:`open_results`.

    Raises:
        UserError: it cannot be written.
    """
    with _writable(f"--eval_output_dir {root}"):
        root.mkdir(parents=True, exist_ok=True)
        lock, sources = None, sources or {}
        for folder in sorted(root.iterdir(), reverse=True):
            state = _state(folder / "run.json")
            if state.get("run") != identity or state.get("finished"):
                continue
            if changed := changed_sources(state, sources):
                logger.warning("%s is left as it is: %s is not what it was then", folder, ", ".join(changed))
            elif lock := _claim(folder / "run.lock"):
                run = RunFolder(folder, identity, {**(state.get("sources") or {}), **sources})
                run.mark(finished=False)
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
            run = RunFolder(folder, identity, sources, resumed=False)
            run.mark(finished=False)
    try:
        yield run
    finally:
        if lock is not None:
            lock.close()
