"""The result file of ``rayswift sample``: whole or not at all, as jsonl or parquet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rayswift.cluster import results_folder
from rayswift.errors import UserError
from rayswift.files import atomic_file
from rayswift.journal import is_of_run

if TYPE_CHECKING:
    from rayswift.arguments import SampleArguments

Row = dict[str, Any]


@dataclass(frozen=True)
class Files:
    """The files of a run: its result, and the journals beside it while it is unfinished."""

    result: Path

    @classmethod
    def of(cls, args: SampleArguments, identity: str, sources: Mapping[str, str]) -> Files:
        """``--output_file``; with ``--resume true`` that of the newest unfinished run; else one named by the time."""
        folder = results_folder(args, "output_dir", args.output_dir)
        if args.output_file:
            return cls(folder / args.output_file)
        journals = folder.glob(".*.answers") if args.resume else ()
        for journal in sorted(journals, key=lambda path: path.stat().st_mtime, reverse=True):
            if is_of_run(journal, identity, sources):
                return cls(folder / journal.name.removeprefix(".").removesuffix(".answers"))
        return cls(folder / f"{time.strftime('%Y-%m-%d-%H-%M-%S')}.jsonl")

    @property
    def answers(self) -> Path:
        """The journal of answers."""
        return self.result.with_name(f".{self.result.name}.answers")

    @property
    def scores(self) -> Path:
        """The journal of scores."""
        return self.result.with_name(f".{self.result.name}.scores")


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows; the file is there when all of them are in it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with atomic_file(path) as half:
            if path.suffix == ".parquet":
                write_parquet(half, list(rows))
            else:
                with half.open("w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"--output_dir {path.parent}: cannot be written ({error.strerror or error})") from None


def write_parquet(path: Path, rows: list[Row]) -> None:
    """Write a table with the columns of all rows; what has no common type there is kept as JSON text."""
    import pyarrow as pa
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[name] = pa.array([None if value is None else json.dumps(value) for value in values])
    parquet.write_table(pa.table(columns), path)
