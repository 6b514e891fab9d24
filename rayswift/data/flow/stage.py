"""The one stage of the data path: a chunk of a file → standard rows, with what was dropped → token rows.

Every command reads through :func:`read_rows`. ``prepare`` keeps what comes out in the token cache, ``stream`` shuffles
and packs it, the preview shows it, ``infer`` and ``sample`` answer it (:func:`read_files`). Pure functions; no
Ray here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayswift.data.files import BadRow, Chunk, Position, iter_rows, locate
from rayswift.data.rows.standard import WARNINGS, Drop, RowRules, StandardRow, standardise_rows
from rayswift.data.tokens.row_index import DropReport
from rayswift.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from rayswift.data.tokens.encoder import Encoder

#: Rows per call of the tokenizer's batch encoder.
ENCODE_BATCH = 1024


def read_rows(chunk: Chunk, rules: RowRules) -> Iterator[tuple[Any, list[StandardRow | Drop], Position]]:
    """The rows of one chunk: each as it is in the file, what it becomes (one standard row or drop, unless the dataset's
    ``preprocess`` makes it several), and its position. Where reading cannot go on comes a last drop that says so
    (``broken``)."""
    try:
        for raw, position in iter_rows(chunk):
            yield raw, standardise_rows(raw, rules), position
    except BadRow as error:
        yield None, [Drop(error.reason, "file")], error.position


def read_files(paths: Sequence[str], rules: RowRules) -> Iterator[tuple[StandardRow | Drop, str, Position]]:
    """The standard rows and drops of whole files, each with its file and position, read in this process.

    Raises:
        UserError: a file is broken (names file:line).
    """
    for path in paths:
        for _, standard, position in read_rows(Chunk(path), rules):
            for row in standard:
                if isinstance(row, Drop) and row.broken:
                    raise UserError(f"{locate(path, position)}: {row.reason}")
                yield row, path, position


@dataclass(frozen=True)
class StandardBatch:
    """Neighbouring rows of one file: the usable ones with their positions, and what is to be said of the others."""

    path: str
    rows: list[StandardRow] = field(default_factory=list)
    positions: list[Position] = field(default_factory=list)
    report: DropReport = field(default_factory=DropReport)


def standard_batches(chunk: Chunk, rules: RowRules, size: int = ENCODE_BATCH) -> Iterator[StandardBatch]:
    """One chunk as standard rows, about ``size`` at a time; what is dropped or broken is in the batches' reports."""
    batch = StandardBatch(chunk.path)
    for _, standard, position in read_rows(chunk, rules):
        for row in standard:
            batch.report.rows_in += 1
            if isinstance(row, Drop):
                batch.report.drop(row, chunk.path, position)
                continue
            for text in row.pop(WARNINGS, ()):
                batch.report.note(text, 1, chunk.path, position)
            batch.rows.append(row)
            batch.positions.append(position)
        if len(batch.rows) >= size:
            yield batch
            batch = StandardBatch(chunk.path)
    if batch.report.rows_in:
        yield batch


def refuse_bad_rows(drops: DropReport, strict: bool) -> None:
    """Stop at a file that is broken, or with ``--strict true`` at any row that was dropped."""
    for reason in drops.counts:
        if reason in drops.broken:
            raise UserError(f"{drops.place(reason)}: {reason}")
        if strict:
            raise UserError(f"{drops.place(reason)}: {reason} (--strict true stops at the first bad row)")


def token_schema() -> pa.Schema:
    """The schema of token rows; see :mod:`rayswift.data.flow.cache`."""
    import pyarrow as pa

    tokens, weights = pa.list_(pa.int32()), pa.list_(pa.float32())
    numbers = [("rejected_start", pa.int32()), ("source", pa.int64()), ("length", pa.int32())]
    told = [("text_ends", tokens), ("targets", weights)]
    return pa.schema([("input_ids", tokens), ("labels", tokens), ("loss_scale", weights), *numbers, *told])


def encode_rows(
    rows: list[StandardRow],
    places: list[tuple[str, Position]],
    encoder: Encoder,
    drops: DropReport,
    numbers: np.ndarray,
) -> pa.RecordBatch:
    """Standard rows to token rows.

    Args:
        rows: standard rows.
        places: file and position of each.
        encoder: turns them into token ids.
        drops: where rows that give no tokens are added.
        numbers: int64 (rows,), what the ``source`` column shall say.
    """
    import numpy as np
    import pyarrow as pa

    batch = encoder.encode_columns(rows)
    for dropped in batch.dropped:
        drops.add(dropped.reason, 1, *places[dropped.row])
    offsets = pa.array(batch.offsets, pa.int32())

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    schema = token_schema()
    scale = pa.nulls(len(batch.rows), schema.field("loss_scale").type)
    if batch.loss_scale is not None:
        scale = lists(batch.loss_scale)
    rejected = pa.nulls(len(batch.rows), pa.int32())
    if batch.rejected_starts is not None:
        rejected = pa.array(batch.rejected_starts)
    told = [pa.nulls(len(batch.rows), schema.field(name).type) if values is None else
            pa.array(values, schema.field(name).type)
            for name, values in (("text_ends", batch.text_ends), ("targets", batch.targets))]  # fmt: skip
    columns = [lists(batch.input_ids), lists(batch.labels), scale, rejected, pa.array(numbers[batch.rows]),
               pa.array(np.diff(batch.offsets).astype(np.int32)), *told]  # fmt: skip
    return pa.record_batch(columns, schema)
