"""A big ``.jsonl.gz`` through ``--streaming true``: seconds to the first row and the first step, and bounded memory.

There is no peer. The file is generated once (real sentences recombined, ``--gigabytes`` of text before compression).
First it is read at full speed for ``--seconds`` as training would read it: the first row must come within 30 s of the
start of reading, and memory must not grow while reading goes on. Then ``rayswift sft --streaming true`` trains on it
for a few steps: seconds from the command line to the first step. Memory is that of all processes together, Ray's
included; pages of files are left out.

    python benchmarks/stream_big_file.py [--gigabytes 20] [--seconds 60]
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from harness.corpus import make_corpus
from harness.first_step import run_to_first_step
from harness.measure import SIDES, print_line, run_side, scratch_folder, versions
from harness.memory import Memory
from harness.options import model_folder, parser

#: Parts of the reading time whose peaks are reported.
WINDOWS = 6
FIRST_ROW_LIMIT = 30.0


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--gigabytes", type=float, help="text before compression, 10⁹ bytes (2; --full: 20)")
    options.add_argument("--seconds", type=float, help="how long to read at full speed (60; --full: 600)")
    given = options.parse_args()
    gigabytes = given.gigabytes or (0.05 if given.quick else 20 if given.full else 2)
    seconds = given.seconds or (5 if given.quick else 600 if given.full else 60)
    model = model_folder(given)
    file = make_corpus(gigabytes)
    with scratch_folder() as folder:
        reading = read(file, model, seconds, folder / "reading")
        training = train(file, model, 2 if given.quick else 20, folder / "training")
    print_line(
        "stream_big_file",
        {
            "gigabytes": gigabytes,
            "compressed_gigabytes": round(file.stat().st_size / 1e9, 3),
            **reading,
            "first_row_limit_s": FIRST_ROW_LIMIT,
            "training": training,
            "versions": versions("rayswift", "ray", "tokenizers"),
        },
    )
    if reading["seconds_to_first_row"] > FIRST_ROW_LIMIT:
        sys.exit(f"the first row came after {reading['seconds_to_first_row']} s; the limit is {FIRST_ROW_LIMIT} s")


def read(file: Path, model: Path, seconds: float, cache: Path) -> dict[str, Any]:
    """Read at full speed; speed, and the memory held in equal parts of the time."""
    samples: list[Memory] = []
    program = [sys.executable, SIDES / "rayswift_stream.py", "--model", model, "--dataset", file]
    run = run_side("rayswift_stream", [*program, "--seconds", str(seconds)], cache, samples)
    took = run["ended"] - run["first_row"]
    edges = [run["first_row"] + took * part / WINDOWS for part in range(WINDOWS + 1)]
    windows = itertools.pairwise(edges)
    parts = [[sample.held for sample in samples if start <= sample.at < end] for start, end in windows]
    peaks = [round(max(part)) for part in parts if part]
    half = len(peaks) // 2
    return {
        "seconds_to_first_row": round(run["first_row"] - run["began"], 2),
        "read_s": round(took, 1),
        "rows": run["rows"],
        "rows_per_s": round(run["rows"] / took, 1),
        "tokens_per_s": round(run["tokens"] / took, 1),
        "held_mib_over_time": peaks,
        "memory_growth": round(max(peaks[half:]) / max(peaks[:half]), 3) if half else None,
    }


def train(file: Path, model: Path, steps: int, folder: Path) -> dict[str, Any]:
    """A real training run on the stream: seconds to its first step, and the most it held."""
    samples: list[Memory] = []
    command = [
        sys.executable, "-m", "rayswift", "sft", "--model", model, "--dataset", file, "--template", "chatml",
        "--streaming", "true", "--max_steps", str(steps), "--max_length", "512", "--torch_dtype", "float32",
        "--num_workers", "1", "--use_gpu", "false", "--per_device_train_batch_size", "1",
        "--gradient_accumulation_steps", "1", "--logging_steps", "1", "--save_strategy", "no",
    ]  # fmt: skip
    step = run_to_first_step("rayswift_stream_sft", command, folder / "cache", folder / "output", samples)
    return {
        "seconds_to_first_step": round(step.seconds, 2),
        "steps": steps,
        "total_s": round(step.total, 2),
        "peak_held_mib": round(max(sample.held for sample in samples)),
    }


if __name__ == "__main__":
    main()
