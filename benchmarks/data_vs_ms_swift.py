"""Rows → token blocks: RaySwift against what ``swift sft`` of ms-swift 4.6 does with a dataset before training.

Same rows, model, template and number of cores; each run in a fresh process with an empty cache. What is timed stands
at the top of ``sides/rayswift_rows.py`` and ``sides/ms_swift_rows.py``; Ray is started before the clock, its worker
processes after. All lengths, and ids and labels of 1,000 rows, must be equal.

    python benchmarks/data_vs_ms_swift.py [--rows 200000] [--source FILE] [--memory]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from harness.environments import MS_SWIFT
from harness.measure import SIDES, compared, cores, in_turn, print_line, run_side, scratch_folder, versions
from harness.memory import Memory
from harness.options import by_size, model_folder, pairs, parser
from harness.rows import write_rows

SAMPLE = 1000


def main() -> None:
    options = arguments()
    count = options.rows or by_size(options, 2_000, 200_000, 200_000)
    model = model_folder(options)
    peer = MS_SWIFT.make()
    with scratch_folder() as folder:
        rows = write_rows(options.source, count, folder / "rows.jsonl")

        def ours(number: int) -> dict[str, Any]:
            return run_rayswift(options, model, rows, folder / f"rayswift-{number}")

        def theirs(number: int) -> dict[str, Any]:
            return run_ms_swift(options, model, rows, folder / f"ms-swift-{number}", peer.python)

        a, b = in_turn(pairs(options), ours, theirs)
        check_equal(folder / "rayswift-0.npz", folder / "ms-swift-0.npz", count)
        # The same dataset again, with the cache that the last cold run has left.
        warm = run_rayswift(options, model, rows, folder / f"rayswift-{pairs(options) - 1}")
        fields = compared([count / run["seconds"] for run in a], [count / run["seconds"] for run in b], "rows/s", True)
        memory = measure_memory(options, model, folder) if options.memory else {}
    print_line(
        "data_vs_ms_swift",
        {
            **fields,
            "rows": count,
            "tokens": a[0]["tokens"],
            "checked": f"lengths of {count} rows, ids and labels of {min(SAMPLE, count)}",
            "warm": {"seconds": round(warm["seconds"], 3), "stages": warm["stages"]},
            **memory,
            "versions": {**versions("rayswift", "ray", "tokenizers"), "peer": b[0]["versions"]},
        },
    )


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, help="number of rows (200,000; --quick: 2,000)")
    options.add_argument("--max_length", type=int, default=2048)
    options.add_argument(
        "--memory",
        action="store_true",
        help="also RaySwift's peak memory at 50,000, 200,000 and 500,000 rows (--full: on)",
    )
    options.set_defaults(memory="--full" in sys.argv[1:])
    return options.parse_args()


def side_options(options: argparse.Namespace, model: Path, rows: Path) -> list[str]:
    """What both sides are told."""
    return ["--model", str(model), "--rows", str(rows), "--max_length", str(options.max_length),
            "--num_proc", str(cores())]  # fmt: skip


def run_rayswift(
    options: argparse.Namespace, model: Path, rows: Path, cache: Path, memory: list[Memory] | None = None
) -> dict[str, Any]:
    """One run; tokens of a sample of rows go to ``<cache>.npz``."""
    program = [sys.executable, SIDES / "rayswift_rows.py", *side_options(options, model, rows)]
    tokens = ["--tokens", f"{cache}.npz", "--sample", str(SAMPLE)]
    return run_side("rayswift_rows", [*program, *tokens], cache, memory)


def run_ms_swift(options: argparse.Namespace, model: Path, rows: Path, cache: Path, python: Path) -> dict[str, Any]:
    """One run; tokens of a sample of rows go to ``<cache>.npz``."""
    program = [python, SIDES / "ms_swift_rows.py", *side_options(options, model, rows)]
    tokens = ["--tokens", f"{cache}.npz", "--sample", str(SAMPLE)]
    return run_side("ms_swift_rows", [*program, *tokens], cache)


def check_equal(ours: Path, theirs: Path, count: int) -> None:
    """End the benchmark unless both sides made the same tokens."""
    left, right = np.load(ours), np.load(theirs)
    if len(left["lengths"]) != count:
        sys.exit(f"RaySwift kept {len(left['lengths'])} of {count} rows; raise --max_length or look at the log")
    for name in ("lengths", "numbers", "ids", "labels"):
        if not np.array_equal(left[name], right[name]):
            sys.exit(f"the sides differ in {name}: {left[name][:40]} … against {right[name][:40]} …")


def measure_memory(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, Any]:
    """RaySwift's peak memory at three numbers of rows, MiB; each run with an empty cache.

    ``memory_growth``: the last over the first. A process for each other core joins on the way, as soon as there are
    enough rows for it to be worth starting: the second number shows the step, the third what follows it.
    """
    peaks = {}
    for count in (1_000, 2_000, 4_000) if options.quick else (50_000, 200_000, 500_000):
        rows = write_rows(options.source, count, folder / f"rows-{count}.jsonl")
        samples: list[Memory] = []
        run_rayswift(options, model, rows, folder / f"memory-{count}", samples)
        peaks[str(count)] = {
            "held_mib": round(max(sample.held for sample in samples)),
            "file_pages_mib": round(max(sample.mapped for sample in samples)),
        }
        rows.unlink()
    small, *_, large = (entry["held_mib"] for entry in peaks.values())
    return {"peak_memory": peaks, "memory_growth": round(large / small, 3)}


if __name__ == "__main__":
    main()
