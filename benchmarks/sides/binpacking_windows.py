"""Side (runs in its own environment): ``binpacking`` as ms-swift packs, windows of 1,000 rows, last bin carried over.

Timed: the packing. Not timed: imports, reading the lengths.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import metadata
from pathlib import Path

import binpacking
import numpy as np

WINDOW = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, required=True, help=".npy, int64")
    parser.add_argument("--max_length", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    lengths = np.load(options.lengths).tolist()
    started = time.perf_counter()
    bins = pack_windows(lengths, options.max_length)
    seconds = time.perf_counter() - started
    totals = [sum(length for _, length in rows) for rows in bins]
    assert max(totals) <= options.max_length
    assert sorted(row for rows in bins for row, _ in rows) == list(range(len(lengths)))
    version = metadata.version("binpacking")
    result = {"seconds": seconds, "rows": len(lengths), "bins": len(bins), "versions": {"binpacking": version}}
    options.out.write_text(json.dumps(result))


def pack_windows(lengths: list[int], max_length: int) -> list[list[tuple[int, int]]]:
    """Bins of (row number, length)."""
    rows = list(enumerate(lengths))
    bins: list[list[tuple[int, int]]] = []
    waiting: list[tuple[int, int]] = []
    for start in range(0, len(rows), WINDOW):
        waiting += rows[start : start + WINDOW]
        packed = binpacking.to_constant_volume(waiting, max_length, weight_pos=1)
        if start + WINDOW < len(rows):
            *packed, waiting = packed
        bins += packed
    return bins


if __name__ == "__main__":
    main()
