"""Rows of Arrow files by number, what was dropped of them, and the arithmetic on row numbers.

The driver never holds rows: sampling, splitting, blending and shuffling are operations on row numbers.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayswift.data import json_text
from rayswift.data.files import Position, locate
from rayswift.data.tokens.arrow_files import open_arrow

if TYPE_CHECKING:
    import numpy as np

    from rayswift.data.rows.standard import Drop


@dataclass
class DropReport:
    """Rows in, rows out, and for each reason its count and the first ``file:line``.

    ``notes`` counts rows that were kept, but not with everything that was in them. ``broken``: the reasons for which
    reading cannot go on, and what is broken (see :class:`~rayswift.data.rows.standard.Drop`).
    """

    rows_in: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[str, Position]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, count: int, path: str, position: Position) -> None:
        """Count rows dropped for one reason; the first place seen is kept."""
        self.counts[reason] += count
        self.first.setdefault(reason, (path, position))

    def drop(self, drop: Drop, path: str, position: Position) -> None:
        """Count a row that was dropped."""
        self.add(drop.reason, 1, path, position)
        if drop.broken:
            self.broken[drop.reason] = drop.broken

    def note(self, text: str, count: int, path: str, position: Position) -> None:
        """Count rows that something was left out of."""
        self.notes[text] += count
        self.first.setdefault(text, (path, position))

    def merge(self, other: DropReport) -> None:
        """Add the drops of another stage over the same rows."""
        for reason, count in other.counts.items():
            self.add(reason, count, *other.first[reason])
        for text, count in other.notes.items():
            self.note(text, count, *other.first[text])
        self.broken |= other.broken

    def place(self, reason: str) -> str:
        """``file:line`` of the first row dropped for this reason."""
        return locate(*self.first[reason])

    def lines(self) -> list[str]:
        """One line per reason and note, most frequent first."""
        dropped = [("rows dropped", reason, count) for reason, count in self.counts.most_common()]
        noted = [("rows", text, count) for text, count in self.notes.most_common()]
        return [f"{count} {what}: {text} (first at {self.place(text)})" for what, text, count in dropped + noted]

    def as_json(self) -> dict[str, Any]:
        """Counts and first positions, without the path: what a file's summary keeps of it."""
        parts = {"drops": self.counts, "notes": self.notes}
        kept = {name: {text: [count, *self.first[text][1]] for text, count in found.items()}
                for name, found in parts.items()}  # fmt: skip
        return {**kept, "broken": self.broken}

    def add_json(self, summary: dict[str, Any], path: str) -> None:
        """Add what :meth:`as_json` kept, for the file at ``path``."""
        for reason, (count, *position) in summary["drops"].items():
            self.add(reason, count, path, Position(*position))
        for text, (count, *position) in summary["notes"].items():
            self.note(text, count, path, Position(*position))
        self.broken |= summary["broken"]


@dataclass
class RowIndex:
    """Rows of the token cache's files: paths and, per row, its file and its row in that file.

    ``index`` is int32 of shape (rows, 2); its order is the order of the dataset. ``lengths`` (int32) is the number of
    tokens of each row, 0 before encoding. Small numbers, as the driver holds them for every row there is.
    """

    files: list[str]
    index: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: np.ndarray) -> RowIndex:
        """The rows with these numbers, in this order."""
        return RowIndex(self.files, self.index[rows], self.lengths[rows])

    def fingerprint(self) -> str:
        """A hash of which rows these are, and in which order: their contents, as file names are hashes of theirs."""
        digest = hashlib.sha256(repr([file.rsplit("/", 1)[-1] for file in self.files]).encode())
        digest.update(self.index.tobytes())
        return digest.hexdigest()[:40]


@dataclass
class LazyRows(RowIndex):
    """Standard rows that are encoded when they are trained (``--lazy_tokenize true``); ``lengths`` says nothing.

    ``origins``: the data file that each of ``files`` was read from.
    """

    origins: list[str]


@dataclass
class TrainData:
    """What the data path hands to training: token rows for training (None for a stream, standard rows under
    ``--lazy_tokenize``) and validation, and what was dropped; for each file of token rows the files that they come from
    (see :func:`~rayswift.data.tokens.table.place_of`)."""

    train: RowIndex | None
    val: RowIndex | None
    drops: DropReport
    val_rows: list[dict[str, Any]] = field(default_factory=list)
    origins: dict[str, tuple[str, str]] = field(default_factory=dict)


def all_rows(counts: list[int]) -> np.ndarray:
    """Every row of files with so many rows, one file after the other: ``RowIndex.index``."""
    import numpy as np

    index = np.empty((sum(counts), 2), np.int32)
    start = 0
    for file, count in enumerate(counts):
        index[start : start + count, 0] = file
        index[start : start + count, 1] = np.arange(count)
        start += count
    return index


def sample_rows(rows: RowIndex, num_samples: int | None, args: Any, rng: np.random.RandomState) -> RowIndex:
    """``#N`` as SWIFT does it: N rows without replacement; above the size, whole repeats and a random rest."""
    import numpy as np

    if num_samples is None:
        return rows
    repeats, rest = divmod(num_samples, len(rows))
    tail = rng.permutation(len(rows))[:rest] if args.dataset_shuffle else np.arange(rest)
    return rows.select(np.concatenate([np.tile(np.arange(len(rows)), repeats), tail]).astype(np.int64))


def split_rows(
    rows: RowIndex, ratio: float, num_samples: int | None, args: Any, rng: np.random.RandomState
) -> tuple[RowIndex, RowIndex]:
    """Hold out ``max(int(rows · ratio), 1)`` random rows for validation (SWIFT 2.9); a single row is never held out.

    Under ``#N`` as many of N rows are held out as there are, and the others are drawn from what is left: a row that is
    repeated is never on both sides.
    """
    import numpy as np

    wanted = len(rows) if num_samples is None else num_samples
    if not ratio or min(len(rows), wanted) < 2:
        return sample_rows(rows, num_samples, args, rng), rows.select(np.arange(0))
    order = rng.permutation(len(rows))
    held_out = max(int(min(len(rows), wanted) * ratio), 1)
    kept = rows.select(np.sort(order[held_out:]))
    return sample_rows(kept, num_samples and num_samples - held_out, args, rng), rows.select(np.sort(order[:held_out]))


def concat(parts: list[RowIndex]) -> RowIndex:
    """Several datasets one after the other."""
    import numpy as np

    if len(parts) == 1:
        return parts[0]
    files: list[str] = []
    indices = [np.zeros((0, 2), np.int32)]
    for part in parts:
        indices.append(part.index + np.array([len(files), 0], np.int32) if files else part.index)
        files += part.files
    lengths = [np.zeros(0, np.int32), *(part.lengths for part in parts)]
    return RowIndex(files, np.concatenate(indices), np.concatenate(lengths))


def blend(parts: list[RowIndex], args: Any, rng: np.random.RandomState) -> RowIndex:
    """Concatenate, or interleave with ``--interleave_prob``, then shuffle once if ``--dataset_shuffle``."""
    import numpy as np

    rows = concat(parts)
    if args.interleave_prob and parts:
        weights = list(args.interleave_prob)
        if args.interleave_by == "tokens":
            weights = [weight / part.lengths.mean() for weight, part in zip(weights, parts, strict=True)]
        order = interleave([len(part) for part in parts], weights, args.stopping_strategy, rng)
        return rows.select(order)
    return rows.select(rng.permutation(len(rows)).astype(np.int64)) if args.dataset_shuffle else rows


def interleave(sizes: list[int], weights: list[float], strategy: str, rng: np.random.RandomState) -> np.ndarray:
    """Row numbers of several datasets drawn in these proportions until the first (or every) one is exhausted."""
    import numpy as np

    starts = np.cumsum([0, *sizes[:-1]])
    drawn = np.asarray(weights) > 0
    probabilities = np.asarray(weights, np.float64) / sum(weights)
    taken = np.zeros(len(sizes), np.int64)
    order: list[int] = []
    while True:
        for source in rng.choice(len(sizes), size=1024, p=probabilities):
            order.append(int(starts[source] + taken[source] % sizes[source]))
            taken[source] += 1
            done = (taken >= np.asarray(sizes))[drawn]
            if done.any() if strategy == "first_exhausted" else done.all():
                return np.asarray(order, np.int64)


def iter_standard_rows(rows: RowIndex) -> Iterator[dict[str, Any]]:
    """The standard rows themselves, one record batch in memory at a time where neighbours lie together."""
    import numpy as np

    for number, file in enumerate(rows.files):
        wanted = rows.index[rows.index[:, 0] == number, 1]
        reader, start = open_arrow(file), 0
        for batch_number in range(reader.num_record_batches if len(wanted) else 0):
            batch = reader.get_batch(batch_number)
            here = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
            yield from (json_text.loads(text) for text in batch["row"].take(np.sort(here)).to_pylist())
            start += len(batch)
