"""The result file of batch inference: rows in the order of the dataset, each there exactly once, whatever is killed.

Rows are only ever appended, in order, so what a killed run leaves is the start of the whole. A small file beside it
(``.NAME.run.json``) says which run the last rows belong to; the same command started again goes on after them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rayswift.errors import UserError

Row = dict[str, Any]


@dataclass
class ResultFile:
    """An open result file. ``rows``: those of this run so far, the ones an earlier start wrote first."""

    path: Path
    rows: list[Row]
    _file: BinaryIO

    def append(self, row: Row) -> None:
        """Add the next row; it is on disk when this returns, as far as this process can tell."""
        self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        self.rows.append(row)


@contextlib.contextmanager
def open_results(path: Path, identity: str) -> Iterator[ResultFile]:
    """Open (or make) the file to append the rows of the run ``identity``; another run's rows before them stay.

    Raises:
        UserError: the file or its folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not "a": a half-written last row has to go, which takes a file that can be cut.
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise UserError(f"--result_path {path}: cannot be written ({error.strerror or error})") from None
    with file:
        drop_half_row(file)
        state, end = path.with_name(f".{path.name}.run.json"), file.tell()
        earlier = read_state(state)
        start = int(earlier["start"]) if earlier.get("run") == identity and earlier["start"] <= end else end
        file.seek(start)
        rows = [json.loads(line) for line in file.read().splitlines()]
        if start == end:
            write_state(state, {"run": identity, "start": start})
        yield ResultFile(path, rows, file)


def drop_half_row(file: BinaryIO) -> None:
    """Cut off a last line without its end (what a kill in mid-write leaves), and stand at the end of the file."""
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
    if keep < end:
        file.truncate(keep)
    file.seek(keep)


def read_state(path: Path) -> dict[str, Any]:
    """Which run the last rows belong to; empty when nothing says so."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) and isinstance(state.get("start"), int) else {}


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write it whole or not at all."""
    half = path.with_name(path.name + ".tmp")
    half.write_text(json.dumps(state), encoding="utf-8")
    os.replace(half, path)


def run_identity(settings: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What makes two runs the same: the settings that decide the answers, and the rows."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()
