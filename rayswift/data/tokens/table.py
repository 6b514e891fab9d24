"""Token rows out of Arrow memory, without copying: by number from files, or in order from a stream's tables."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rayswift.data import json_text
from rayswift.data.files import Position, locate
from rayswift.data.tokens.arrow_files import open_arrow
from rayswift.data.tokens.encoder import Dropped, Encoded

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from rayswift.data.tokens.encoder import Encoder
    from rayswift.data.tokens.packing import Packs
    from rayswift.data.tokens.row_index import BlockRows, LazyRows


class Row(NamedTuple):
    """One encoded row: int32 arrays of shape (tokens,), ``labels`` −100 where not trained; ``loss_scale`` float32, or
    None where every weight is 0 or 1; ``rejected_start`` is None for a row that is no pair. The arrays are read-only
    views."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_scale: np.ndarray | None = None
    rejected_start: int | None = None

    def chosen_and_rejected(self) -> tuple[Row, Row]:
        """A pair as the row with the chosen answer and the one with the rejected answer."""
        cut = self.rejected_start
        return Row(self.input_ids[:cut], self.labels[:cut]), Row(self.input_ids[cut:], self.labels[cut:])


class TokenBatch:
    """A record batch of token rows as numpy views."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._columns = [self._views(batch.column(name)) for name in ("input_ids", "labels", "loss_scale")]
        rejected = batch.column("rejected_start")
        self._rejected = None if rejected.null_count == len(rejected) else rejected.to_numpy()

    @staticmethod
    def _views(column: Any) -> tuple[np.ndarray, np.ndarray] | None:
        if column.null_count == len(column):
            return None
        return column.values.to_numpy(), column.offsets.to_numpy()

    def __getitem__(self, number: int) -> Row:
        ids, labels, weights = (self._cut(column, number) for column in self._columns)
        assert ids is not None and labels is not None
        return Row(ids, labels, weights, None if self._rejected is None else int(self._rejected[number]))

    @staticmethod
    def _cut(column: tuple[np.ndarray, np.ndarray] | None, number: int) -> np.ndarray | None:
        if column is None:
            return None
        values, offsets = column
        start, end = offsets[number], offsets[number + 1]
        return values[start:end] if end > start else None


class ArrowRows:
    """The rows of one cache entry by number."""

    def __init__(self, path: str) -> None:
        self._reader = open_arrow(path)
        self._starts = [0]
        for number in range(self._reader.num_record_batches):
            self._starts.append(self._starts[-1] + len(self._reader.get_batch(number)))

    def place(self, number: int) -> tuple[int, int]:
        """The record batch of a row, and the row in it."""
        batch = bisect.bisect_right(self._starts, number) - 1
        return batch, number - self._starts[batch]

    def batch(self, number: int) -> pa.RecordBatch:
        """A record batch."""
        return self._reader.get_batch(number)


class TokenFile:
    """The token rows of one cache entry by number."""

    def __init__(self, path: str) -> None:
        self._rows = ArrowRows(path)
        self._batches: dict[int, TokenBatch] = {}

    def __getitem__(self, number: int) -> Row:
        place, row = self._rows.place(number)
        batch = self._batches.get(place)
        if batch is None:
            batch = self._batches[place] = TokenBatch(self._rows.batch(place))
        return batch[row]


class TokenRows:
    """The rows of a dataset by number, each out of its memory-mapped file."""

    def __init__(self, rows: BlockRows) -> None:
        self._rows = rows
        self._files: dict[int, TokenFile] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        place, row = (int(value) for value in self._rows.index[number])
        if place not in self._files:
            self._files[place] = TokenFile(self._rows.files[place])
        return self._files[place][row]


class Units:
    """What a batch is made of: the rows of a dataset, or its packs."""

    def __init__(self, rows: BlockRows, packs: Packs | None) -> None:
        self.rows, self.packs = TokenRows(rows), packs
        #: Tokens of each unit, int32.
        self.lengths = rows.lengths
        if packs is not None:
            import numpy as np

            self.lengths = np.add.reduceat(rows.lengths[packs.rows], packs.offsets[:-1])

    def __len__(self) -> int:
        return len(self.rows) if self.packs is None else len(self.packs)

    def row_numbers(self, unit: int) -> list[int]:
        """The rows of one unit."""
        return [unit] if self.packs is None else self.packs[unit].tolist()

    def __getitem__(self, unit: int) -> list[Row]:
        return [self.rows[number] for number in self.row_numbers(unit)]


class LazyUnits:
    """The rows of a dataset that are encoded when they are asked for; a row that gives no tokens trains nothing.

    Args:
        rows: standard rows.
        encoder: turns them into token ids.
        report: is told of each row that gives no tokens, with its place.
    """

    def __init__(self, rows: LazyRows, encoder: Encoder, report: Callable[[str], None]) -> None:
        self._rows, self._encoder, self._report = rows, encoder, report
        self._files: dict[int, ArrowRows] = {}
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, unit: int) -> list[Row]:
        place, number = (int(value) for value in self._rows.index[unit])
        if place not in self._files:
            self._files[place] = ArrowRows(self._rows.files[place])
        at, row = self._files[place].place(number)
        batch = self._files[place].batch(at)
        samples = self._encoder.encode_batch([json_text.loads(batch["row"][row].as_py())])
        for dropped in (sample for sample in samples if isinstance(sample, Dropped)):
            position = Position(batch["kind"][row].as_py(), batch["number"][row].as_py())
            where = locate(self._rows.origins[place], position)
            self._report(f"{where}: {dropped.reason}: the row trains nothing")
        return [Row(one.input_ids, one.labels, one.loss_scale, one.rejected_start)
                for one in samples if isinstance(one, Encoded)]  # fmt: skip


# --- streams ----------------------------------------------------------------------------------------------------


class StreamPosition(NamedTuple):
    """The place before a unit of a stream: a task of the plan, and a unit of that task."""

    task: int = 0
    unit: int = 0


#: Where each stream of a mixture goes on; a run that mixes nothing has one stream.
StreamPlaces = tuple[StreamPosition, ...]


@dataclass(frozen=True)
class StreamUnit:
    """One unit of a stream (a row or a pack). ``position``: its own place in the plan."""

    position: StreamPosition
    parts: tuple[tuple[TokenBatch, int, int], ...]

    @property
    def next_position(self) -> StreamPosition:
        """Where its stream goes on."""
        return StreamPosition(self.position.task, self.position.unit + 1)

    @property
    def rows(self) -> list[Row]:
        """Its rows, as views; made only where they are asked for."""
        return [batch[number] for batch, start, end in self.parts for number in range(start, end)]


def iter_units(tables: Iterable[pa.Table]) -> Iterator[StreamUnit]:
    """The units of a stream's tables, each as soon as it is whole.

    Columns ``task`` and ``unit`` say which unit a row belongs to, ``unit_rows`` how many rows that has.
    """
    import numpy as np

    parts: list[tuple[TokenBatch, int, int]] = []
    have = 0
    for batch in (batch for table in tables for batch in table.to_batches() if len(batch)):
        tokens = TokenBatch(batch)
        task, unit, rows = (batch.column(name).to_numpy() for name in ("task", "unit", "unit_rows"))
        starts = [0, *(np.flatnonzero((np.diff(task) != 0) | (np.diff(unit) != 0)) + 1).tolist(), len(batch)]
        for start, end in itertools.pairwise(starts):
            parts.append((tokens, start, end))
            have += end - start
            if have == rows[start]:
                yield StreamUnit(StreamPosition(int(task[start]), int(unit[start])), tuple(parts))
                parts, have = [], 0
