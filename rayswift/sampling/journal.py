"""Records by number on disk, each there once: what makes a killed run go on where it stopped.

One line of JSON for each record, appended when it is made; the first line says which run the file belongs to. Only the
place of each record is kept in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rayswift.errors import UserError
from rayswift.journal import drop_half_row

logger = logging.getLogger("rayswift.sampling")

Record = dict[str, Any]


class Journal:
    """An open journal. Make one with :func:`open_journal`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._places: dict[int, int] = {}
        self._end = 0

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, number: int, record: Record) -> None:
        """Keep a record; it is with the operating system when this returns. A number that is there already stays."""
        if number in self._places:
            return
        self._file.seek(self._end)
        line = json.dumps({"number": number, **record}, ensure_ascii=False).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._places[number] = self._end
        self._end += len(line)

    def get(self, number: int) -> Record | None:
        """The record of a number, None if there is none."""
        place = self._places.get(number)
        if place is None:
            return None
        self._file.seek(place)
        record: Record = json.loads(self._file.readline())
        return record

    def start(self, identity: str) -> None:
        """Empty it, for the run of that identity."""
        self._places.clear()
        self._file.seek(0)
        self._file.truncate()
        line = json.dumps({"run": identity}).encode() + b"\n"
        self._file.write(line)
        self._file.flush()
        self._end = len(line)

    def load(self) -> str | None:
        """Find the records of an earlier start; the identity of its run, None if there was none."""
        drop_half_row(self._file)
        self._file.seek(0)
        head = _parsed(self._file.readline())
        self._end = self._file.tell()
        for line in self._file:
            record = _parsed(line)
            if "number" in record:
                self._places.setdefault(int(record["number"]), self._end)
            self._end += len(line)
        return head.get("run")


def _parsed(line: bytes) -> Record:
    """A line of the journal; empty where it is none (a disk that filled up leaves such)."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


@contextlib.contextmanager
def open_journal(path: Path, identity: str, *, override: bool) -> Iterator[Journal]:
    """Open (or make) the journal of a run; with ``override`` another run's is emptied. One that stays empty goes again.

    Raises:
        UserError: it cannot be written, another process writes it, or it is another run's.
    """
    is_new_folder = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise UserError(f"--output_dir {path.parent}: cannot be written ({error.strerror or error})") from None
    with file:
        _lock(file, path)
        journal = Journal(file)
        earlier = journal.load()
        if earlier not in (None, identity) and not override and len(journal):
            raise UserError(
                f"--output_file: {path} has {len(journal)} answers of an unfinished run with other settings; give "
                "another --output_file, or --override_exist_file true to drop them"
            )
        if earlier != identity:
            journal.start(identity)
        try:
            yield journal
        finally:
            if not len(journal):
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # not empty
                    if is_new_folder:
                        path.parent.rmdir()


def _lock(file: BinaryIO, path: Path) -> None:
    """Two runs must not write one journal."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output_file: another rayswift sample is writing {path}; give another name") from None
    except OSError as error:  # a file system without locks
        logger.debug("%s: no lock (%s)", path, error)
