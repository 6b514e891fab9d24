"""Rows → token blocks by the driver and its actors against the same by Ray Data: where the second begins to pay.

The same rows at each size, encoded by the driver with an actor on each other core, by Ray Data's tasks on one node, and
by Ray Data's tasks on two Ray nodes of this machine, which share its cores. Nothing is cached. What stands in
``rayswift.data.flow.encode_tasks.RAY_DATA_START_BYTES`` and ``CPUS_HERE`` was chosen from this.

    python benchmarks/data_here_or_ray_data.py [--rows 100000,300000] [--source FILE]
"""

from __future__ import annotations

import statistics
import sys

from harness.measure import SIDES, cores, print_line, run_side, scratch_folder, versions
from harness.options import model_folder, pairs, parser
from harness.rows import write_rows

WAYS = {"here": ["--where", "here"], "ray_data": ["--where", "ray_data"],
        "ray_data_two_nodes": ["--where", "ray_data", "--nodes", "2"]}  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", help="numbers of rows (100000,300000; --quick: 2000)")
    given = options.parse_args()
    model = model_folder(given)
    for count in map(int, (given.rows or ("2000" if given.quick else "100000,300000")).split(",")):
        with scratch_folder() as folder:
            rows = write_rows(given.source, count, folder / "rows.jsonl")
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for number in range(pairs(given)):
                for way, flags in WAYS.items():
                    program = [sys.executable, SIDES / "rayswift_rows.py", "--model", model, "--rows", rows]
                    program += ["--max_length", "2048", "--num_proc", str(cores()), *flags]
                    seconds[way].append(run_side(f"data_{way}", program, folder / f"{way}-{number}")["seconds"])
            print_line(
                f"data_here_or_ray_data_{count}",
                {
                    "rows": count,
                    "bytes": rows.stat().st_size,
                    "seconds": seconds,
                    "rows_per_second": {way: round(count / statistics.median(s)) for way, s in seconds.items()},
                    "versions": versions("rayswift", "ray", "tokenizers"),
                },
            )


if __name__ == "__main__":
    main()
