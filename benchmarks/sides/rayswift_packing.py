"""Side: RaySwift's packer over all lengths at once. Timed: the call. Not timed: imports, reading the lengths."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, required=True, help=".npy, int64")
    parser.add_argument("--max_length", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    from rayswift.data.tokens.packing import pack

    lengths = np.load(options.lengths)
    started = time.perf_counter()
    bins = pack(lengths, options.max_length)
    seconds = time.perf_counter() - started
    members = [np.asarray(rows, np.int64) for rows in bins]
    assert max(int(lengths[rows].sum()) for rows in members) <= options.max_length
    assert np.array_equal(np.sort(np.concatenate(members)), np.arange(len(lengths)))
    options.out.write_text(json.dumps({"seconds": seconds, "rows": len(lengths), "bins": len(members)}))


if __name__ == "__main__":
    main()
