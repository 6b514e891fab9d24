"""Several rows in one sequence: best-fit-decreasing bin packing over a bounded window of rows.

Best-fit packing never cuts a row (Ding et al., "Fewer Truncations Improve Language Modeling", arXiv:2404.10830). All
rows of one length are placed together, and the bin with the least room that still fits is the lowest set bit of an
integer, so that a million rows take about a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

#: Rows that are packed together. More fill better, and hold more lengths in memory.
PACKING_WINDOW = 1 << 20


@dataclass(frozen=True)
class Packs:
    """Rows grouped into packs. Pack ``k`` holds ``rows[offsets[k]:offsets[k + 1]]``.

    rows: int64 (rows,), row numbers. offsets: int64 (packs + 1,).
    """

    rows: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> np.ndarray:
        return self.rows[self.offsets[pack] : self.offsets[pack + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[pack] for pack in range(len(self)))


def pack(lengths: np.ndarray, max_length: int, window: int = PACKING_WINDOW) -> Packs:
    """Fill sequences of at most ``max_length`` tokens with whole rows.

    Args:
        lengths: int64 (rows,), tokens of each row.
        max_length: tokens of a pack (SWIFT's ``--packing_length``). A longer row gets a pack of its own.
        window: rows packed together; packs never hold rows of two windows.

    Returns:
        Every row in exactly one pack. Packs are in the order of their first row, rows in their own order: a function
        of ``lengths`` alone.
    """
    import numpy as np

    rows, sizes = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for start in range(0, len(lengths), window):
        bins = _best_fit(np.minimum(lengths[start : start + window], max_length), max_length)
        # Number the bins by their first row: a long-rows-first order would train on long rows first.
        _, first, renumbered = np.unique(bins, return_index=True, return_inverse=True)
        place = np.empty(len(first), np.int64)
        place[np.argsort(first)] = np.arange(len(first))
        ordered = place[renumbered.reshape(-1)]
        rows.append(start + np.argsort(ordered, kind="stable"))
        sizes.append(np.bincount(ordered))
    return Packs(np.concatenate(rows), np.concatenate([[0], np.cumsum(np.concatenate(sizes))]).astype(np.int64))


def _best_fit(lengths: np.ndarray, max_length: int) -> np.ndarray:
    """The bin of each row, int64 (rows,)."""
    import numpy as np

    order = np.argsort(-lengths, kind="stable")
    bins = np.empty(len(lengths), np.int64)
    counts = np.bincount(lengths, minlength=max_length + 1)
    rooms: dict[int, list[int]] = {}  # room left → bins
    open_rooms = 0  # bit r: some bin has room r
    made = placed = 0
    for length in range(max_length, -1, -1):
        left = int(counts[length])
        chosen: list[int] = []
        while left:
            fitting = open_rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_length
            if fitting:
                waiting = rooms[room]
                taken = waiting[-left:]
                del waiting[-left:]
                if not waiting:
                    open_rooms ^= 1 << room
            else:
                # As many new bins as this length needs when each takes as many of it as fit.
                each = max(max_length // max(length, 1), 1)
                taken = list(range(made, made + -(-left // each)))
                made += len(taken)
            rest = room - length
            if rest > 0:
                rooms.setdefault(rest, []).extend(taken)
                open_rooms |= 1 << rest
            chosen += taken
            left -= len(taken)
        bins[order[placed : placed + len(chosen)]] = chosen
        placed += len(chosen)
    return bins
