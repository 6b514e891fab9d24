"""Token rows out of Arrow memory, without copying: by number from files, or in order from a stream's tables."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from rayswift.data import json_text
from rayswift.data.files import Position, locate
from rayswift.data.tokens.arrow_files import open_arrow
from rayswift.data.tokens.encoder import Dropped, Encoded
from rayswift.data.tokens.row_index import LazyRows, RowIndex

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from rayswift.data.tokens.encoder import Encoder
    from rayswift.data.tokens.packing import Packs


class TokenizedRow(NamedTuple):
    """One encoded row: int32 arrays of shape (tokens,), ``labels`` −100 where not trained; ``loss_scale`` float32, or
    None where every weight is 0 or 1; ``rejected_start`` is None for a row that is no pair. ``text_ends`` (int32) and
    ``targets`` (float32): of a task that tells numbers, where each text ends and what is to be told. The arrays are
    read-only views."""

    input_ids: np.ndarray
    labels: np.ndarray
    loss_scale: np.ndarray | None = None
    rejected_start: int | None = None
    text_ends: np.ndarray | None = None
    targets: np.ndarray | None = None

    def texts(self) -> list[np.ndarray]:
        """The ids of each text."""
        ends = [] if self.text_ends is None else self.text_ends.tolist()
        return [self.input_ids[start:end] for start, end in itertools.pairwise([0, *ends])]

    def chosen_and_rejected(self) -> tuple[TokenizedRow, TokenizedRow]:
        """A pair as the row with the chosen answer and the one with the rejected answer."""
        cut = self.rejected_start
        chosen = TokenizedRow(self.input_ids[:cut], self.labels[:cut])
        return chosen, TokenizedRow(self.input_ids[cut:], self.labels[cut:])


#: A row of training, and where it is from: its number in the dataset, of a stream its file and position.
PlacedRow = tuple["int | tuple[str, Position]", TokenizedRow]


class TokenBatch:
    """A record batch of token rows as numpy views."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        names = ("input_ids", "labels", "loss_scale", "text_ends", "targets")
        known = set(batch.schema.names)  # the last two came later
        columns = [batch.column(name) if name in known else None for name in names]
        self._columns = [None if column is None or column.null_count == len(column) else
                         (column.values.to_numpy(), column.offsets.to_numpy()) for column in columns]  # fmt: skip
        rejected = batch.column("rejected_start")
        self._rejected = None if rejected.null_count == len(rejected) else rejected.to_numpy()
        self._batch = batch

    def __getitem__(self, number: int) -> TokenizedRow:
        ids, labels, weights, text_ends, targets = (self._cut(column, number) for column in self._columns)
        assert ids is not None and labels is not None
        rejected = None if self._rejected is None else int(self._rejected[number])
        return TokenizedRow(ids, labels, weights, rejected, text_ends, targets)

    def place(self, number: int) -> tuple[str, Position]:
        """File and position of a row of a stream."""
        path, kind, place = (self._batch[name][number].as_py() for name in ("path", "kind", "number"))
        return path, Position(kind, place)

    @staticmethod
    def _cut(column: tuple[np.ndarray, np.ndarray] | None, number: int) -> np.ndarray | None:
        if column is None:
            return None
        values, offsets = column
        start, end = offsets[number], offsets[number + 1]
        return values[start:end] if end > start else None


class ArrowRows:
    """The rows of an index by number, each in a record batch of its memory-mapped file."""

    def __init__(self, rows: RowIndex) -> None:
        self._rows = rows
        self._files: dict[int, tuple[Any, list[int]]] = {}  # by place in `rows.files`: reader, first row of each batch

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, number: int) -> tuple[int, int, int]:
        """A row's file, the record batch there, and its row in that."""
        file, row = self._rows.index[number].tolist()
        if file not in self._files:
            reader = open_arrow(self._rows.files[file])
            sizes = (len(reader.get_batch(batch)) for batch in range(reader.num_record_batches))
            self._files[file] = (reader, [0, *itertools.accumulate(sizes)])
        starts = self._files[file][1]
        batch = bisect.bisect_right(starts, row) - 1
        return file, batch, row - starts[batch]

    def batch(self, file: int, batch: int) -> pa.RecordBatch:
        """A record batch of a file that a row was found in."""
        return self._files[file][0].get_batch(batch)


class TokenRows(ArrowRows):
    """The token rows of a dataset by number."""

    def __init__(self, rows: RowIndex) -> None:
        super().__init__(rows)
        self._batches: dict[tuple[int, int], TokenBatch] = {}

    def __getitem__(self, number: int) -> TokenizedRow:
        file, place, row = self.find(number)
        batch = self._batches.get((file, place))
        if batch is None:
            batch = self._batches[file, place] = TokenBatch(self.batch(file, place))
        return batch[row]


def place_of(rows: RowIndex | None, row: int | tuple[str, Position], origins: Mapping[str, tuple[str, str]]) -> str:
    """``file:line`` of a row of training.

    Args:
        rows: the dataset; None for a stream.
        row: what :data:`PlacedRow` has of it.
        origins: for each file of token rows, the file of standard rows that it was made from, and the data file of
            those. A file that is not there (of ``--cached_dataset``) is named itself.
    """
    import numpy as np

    if rows is None or not isinstance(row, int):
        return locate(*cast("tuple[str, Position]", row))
    number, stored = row, ArrowRows(rows)
    file, batch, row = stored.find(number)
    found, path = stored.batch(file, batch), rows.files[file]
    if isinstance(rows, LazyRows):
        origin = rows.origins[file]
    elif path in origins:
        standard, origin = origins[path]
        source = np.array([[0, found["source"][row].as_py()]], np.int32)
        stored = ArrowRows(RowIndex([standard], source, rows.lengths[:1]))
        _, batch, row = stored.find(0)
        found = stored.batch(0, batch)
    else:
        return f"{path}, row {int(rows.index[number, 1]) + 1}"
    return locate(origin, Position(found["kind"][row].as_py(), found["number"][row].as_py()))


class TrainItems:
    """What a batch is made of: the rows of a dataset, or its packs."""

    def __init__(self, rows: RowIndex, packs: Packs | None) -> None:
        self.rows, self.packs = TokenRows(rows), packs
        #: Tokens of each item, int32.
        self.lengths = rows.lengths
        if packs is not None:
            import numpy as np

            self.lengths = np.add.reduceat(rows.lengths[packs.rows], packs.offsets[:-1])

    def __len__(self) -> int:
        return len(self.rows) if self.packs is None else len(self.packs)

    def __getitem__(self, item: int) -> list[TokenizedRow]:
        return [row for _, row in self.placed(item)]

    def placed(self, item: int) -> list[PlacedRow]:
        """The rows of an item with their numbers."""
        numbers = [item] if self.packs is None else self.packs[item].tolist()
        return [(number, self.rows[number]) for number in numbers]


class LazyItems:
    """The rows of a dataset that are encoded when they are asked for; a row that gives no tokens trains nothing.

    Args:
        rows: standard rows.
        encoder: turns them into token ids.
        report: is told of each row that gives no tokens, with its place.
    """

    def __init__(self, rows: LazyRows, encoder: Encoder, report: Callable[[str], None]) -> None:
        self._rows, self._encoder, self._report = rows, encoder, report
        self._stored = ArrowRows(rows)
        self.lengths = rows.lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, item: int) -> list[TokenizedRow]:
        file, place, row = self._stored.find(item)
        batch = self._stored.batch(file, place)
        samples = self._encoder.encode_batch([json_text.loads(batch["row"][row].as_py())])
        for dropped in (sample for sample in samples if isinstance(sample, Dropped)):
            position = Position(batch["kind"][row].as_py(), batch["number"][row].as_py())
            where = locate(self._rows.origins[file], position)
            self._report(f"{where}: {dropped.reason}: the row trains nothing")
        return [TokenizedRow(one.input_ids, one.labels, one.loss_scale, one.rejected_start, one.text_ends, one.targets)
                for one in samples if isinstance(one, Encoded)]  # fmt: skip

    def placed(self, item: int) -> list[PlacedRow]:
        """What the row becomes, with its number."""
        return [(item, row) for row in self[item]]


# --- streams ----------------------------------------------------------------------------------------------------


class StreamPosition(NamedTuple):
    """The place before an item of a stream: a task of the plan, and an item of that task."""

    task: int = 0
    item: int = 0


#: Where each stream of a mixture goes on; a run that mixes nothing has one stream.
StreamPlaces = tuple[StreamPosition, ...]


@dataclass(frozen=True)
class StreamItem:
    """One item of a stream (a row or a pack). ``position``: its own place in the plan."""

    position: StreamPosition
    parts: tuple[tuple[TokenBatch, int, int], ...]

    @property
    def next_position(self) -> StreamPosition:
        """Where its stream goes on."""
        return StreamPosition(self.position.task, self.position.item + 1)

    @property
    def rows(self) -> list[TokenizedRow]:
        """Its rows, as views; made only where they are asked for."""
        return [batch[number] for batch, start, end in self.parts for number in range(start, end)]

    @property
    def placed(self) -> list[PlacedRow]:
        """Its rows with their places."""
        rows = ((batch, number) for batch, start, end in self.parts for number in range(start, end))
        return [(batch.place(number), batch[number]) for batch, number in rows]


def iter_items(tables: Iterable[pa.Table]) -> Iterator[StreamItem]:
    """The items of a stream's tables, each as soon as it is whole.

    Columns ``task`` and ``item`` say which item a row belongs to, ``item_rows`` how many rows that has.
    """
    import numpy as np

    parts: list[tuple[TokenBatch, int, int]] = []
    have = 0
    for batch in (batch for table in tables for batch in table.to_batches() if len(batch)):
        tokens = TokenBatch(batch)
        task, item, rows = (batch.column(name).to_numpy() for name in ("task", "item", "item_rows"))
        starts = [0, *(np.flatnonzero((np.diff(task) != 0) | (np.diff(item) != 0)) + 1).tolist(), len(batch)]
        for start, end in itertools.pairwise(starts):
            parts.append((tokens, start, end))
            have += end - start
            if have == rows[start]:
                yield StreamItem(StreamPosition(int(task[start]), int(item[start])), tuple(parts))
                parts, have = [], 0
