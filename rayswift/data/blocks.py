"""Rows of materialised Ray Data blocks: references, row numbers and what was dropped, and the arithmetic on them.

The driver never holds rows: sampling, splitting, blending and shuffling are operations on row numbers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayswift.data.sources import locate

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from ray import ObjectRef
    from ray.data import Dataset


@dataclass
class DropReport:
    """Rows in, rows out, and for each reason its count and the first ``file:line``."""

    rows_in: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, int]] = field(default_factory=dict)

    def add(self, reason: str, count: int, path: str, position: int) -> None:
        """Count rows dropped for one reason; the first place seen is kept."""
        self.counts[reason] += count
        self.first.setdefault(reason, (path, position))

    def merge(self, other: DropReport) -> None:
        """Add the drops of another stage over the same rows."""
        for reason, count in other.counts.items():
            self.add(reason, count, *other.first[reason])

    def place(self, reason: str) -> str:
        """``file:line`` of the first row dropped for this reason."""
        return locate(*self.first[reason])

    def lines(self) -> list[str]:
        """One line per reason, most frequent first."""
        return [f"{count} rows dropped: {reason} (first at {self.place(reason)})" for reason, count in
                self.counts.most_common()]  # fmt: skip


@dataclass
class BlockRows:
    """Rows of materialised blocks: references and, per kept row, its block and its row in that block.

    ``index`` is int64 of shape (rows, 2); its order is the order of the dataset. ``lengths`` (int64) is the number of
    tokens of each row, 0 before encoding.
    """

    refs: list[ObjectRef[Any]]
    index: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: np.ndarray) -> BlockRows:
        """The rows with these numbers, in this order."""
        return BlockRows(self.refs, self.index[rows], self.lengths[rows])


def sample_rows(rows: BlockRows, num_samples: int | None, args: Any, rng: np.random.RandomState) -> BlockRows:
    """``#N`` as SWIFT does it: N rows without replacement; above the size, whole repeats and a random rest."""
    import numpy as np

    if num_samples is None:
        return rows
    repeats, rest = divmod(num_samples, len(rows))
    tail = rng.permutation(len(rows))[:rest] if args.dataset_shuffle else np.arange(rest)
    return rows.select(np.concatenate([np.tile(np.arange(len(rows)), repeats), tail]).astype(np.int64))


def split_rows(rows: BlockRows, ratio: float, rng: np.random.RandomState) -> tuple[BlockRows, BlockRows]:
    """Hold out ``max(int(rows · ratio), 1)`` random rows for validation (SWIFT 2.9); a single row is never held out."""
    import numpy as np

    if not ratio or len(rows) < 2:
        return rows, rows.select(np.arange(0))
    order = rng.permutation(len(rows))
    held_out = max(int(len(rows) * ratio), 1)
    return rows.select(np.sort(order[held_out:])), rows.select(np.sort(order[:held_out]))


def concat(parts: list[BlockRows]) -> BlockRows:
    """Several datasets one after the other."""
    import numpy as np

    refs: list[ObjectRef[Any]] = []
    indices = [np.zeros((0, 2), np.int64)]
    for part in parts:
        indices.append(part.index + np.array([len(refs), 0]))
        refs += part.refs
    lengths = [np.zeros(0, np.int64), *(part.lengths for part in parts)]
    return BlockRows(refs, np.concatenate(indices), np.concatenate(lengths))


def blend(parts: list[BlockRows], args: Any, rng: np.random.RandomState) -> BlockRows:
    """Concatenate, or interleave with ``--interleave_prob``, then shuffle once if ``--dataset_shuffle``."""
    import numpy as np

    rows = concat(parts)
    if args.interleave_prob:
        order = interleave([len(part) for part in parts], args.interleave_prob, args.stopping_strategy, rng)
        return rows.select(order)
    return rows.select(rng.permutation(len(rows)).astype(np.int64)) if args.dataset_shuffle else rows


def interleave(sizes: list[int], probabilities: list[float], strategy: str, rng: np.random.RandomState) -> np.ndarray:
    """Row numbers of several datasets drawn with these probabilities until the first (or every) one is exhausted."""
    import numpy as np

    starts = np.cumsum([0, *sizes[:-1]])
    weights = np.asarray(probabilities, np.float64) / sum(probabilities)
    taken = np.zeros(len(sizes), np.int64)
    order: list[int] = []
    while True:
        for source in rng.choice(len(sizes), size=1024, p=weights):
            order.append(int(starts[source] + taken[source] % sizes[source]))
            taken[source] += 1
            done = taken >= np.asarray(sizes)
            if done.any() if strategy == "first_exhausted" else done.all():
                return np.asarray(order, np.int64)


def iter_standard_rows(rows: BlockRows) -> Iterator[dict[str, Any]]:
    """The standard rows themselves, one block in memory at a time."""
    import ray

    current = -1
    table: Any = None
    for block, row in rows.index:
        if block != current:
            current, table = block, ray.get(rows.refs[block])
        yield json.loads(table["row"][int(row)].as_py())


#: Starts a reason that stops the run whatever --strict says: the file itself is broken.
FATAL = "!"


def collect(dataset: Dataset, drops: DropReport, on_rows: Callable[[int], None]) -> tuple[BlockRows, np.ndarray]:
    """Run a dataset to its end, keep its blocks in the object store and count what was dropped.

    Args:
        dataset: blocks with a ``reason`` column, and ``file``/``position`` to say where a dropped row came from.
        drops: where dropped rows are added.
        on_rows: called with the number of rows done so far.

    Returns:
        The kept rows, and for each the value of its ``origin`` column (zeros where there is none).
    """
    import numpy as np
    import ray

    survey = ray.remote(_survey)
    refs, surveys, done = [], [], 0
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            refs.append(entry.ref)
            surveys.append(survey.remote(entry.ref))
        done += bundle.num_rows() or 0
        on_rows(done)
    index, lengths, origins = [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for block, found in enumerate(ray.get(surveys)):
        kept = found["kept"]
        index.append(np.column_stack([np.full(len(kept), block), kept]))
        lengths.append(found["lengths"])
        origins.append(found["origins"])
        drops.rows_in += found["rows"]
        for reason, (count, file, position) in found["drops"].items():
            drops.add(reason, count, file, position)
    return BlockRows(refs, np.concatenate(index), np.concatenate(lengths)), np.concatenate(origins)


def _survey(block: pa.Table) -> dict[str, Any]:
    """What the driver needs to know of a block: its kept rows, their lengths and origins, and what was dropped."""
    import numpy as np
    import pyarrow.compute as pc

    if not len(block):
        # A task that had no row to give, as for an empty file, leaves a block without columns.
        none = np.zeros(0, np.int64)
        return {"rows": 0, "kept": none, "lengths": none, "origins": none, "drops": {}}
    kept = np.flatnonzero(pc.is_null(block["reason"]).to_numpy(zero_copy_only=False))
    lengths = origins = np.zeros(len(kept), np.int64)
    if "input_ids" in block.column_names:
        lengths = pc.list_value_length(block["input_ids"]).take(kept).to_numpy(zero_copy_only=False).astype(np.int64)
        origins = block["origin"].take(kept).to_numpy(zero_copy_only=False)
    drops: dict[str, tuple[int, str, int]] = {}
    dropped = block.filter(pc.is_valid(block["reason"])).select(["reason", "file", "position"])
    for row in dropped.to_pylist():
        count, file, position = drops.get(row["reason"], (0, row["file"], row["position"]))
        drops[row["reason"]] = (count + 1, file, position)
    return {"rows": len(block), "kept": kept, "lengths": lengths, "origins": origins, "drops": drops}
