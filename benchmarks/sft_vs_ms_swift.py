"""Training speed: ``rayswift sft`` against ``swift sft`` of ms-swift 4.6, the same rows in the same order.

LoRA on SmolLM2-135M-Instruct in bfloat16 on CPUs, one worker, batch 1 × 16 accumulated, no evaluation, no checkpoint;
everything else as each command has it by default. Timed: from the log's row of step 1 to that of the last step, so that
neither start nor first data counts. Losses must agree: the same rows make every step, though LoRA's dropout differs
from run to run. One line of JSON.

    python benchmarks/sft_vs_ms_swift.py [--steps 5] [--train_type full] [--ours "--packing false"] [--source FILE]
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from harness.environments import CACHE, MS_SWIFT
from harness.measure import SIDES, compared, cores, fail, in_turn, print_line, scratch_folder, side_environ, versions
from harness.memory import Memory, MemoryWatch
from harness.options import model_folder, pairs, parser
from harness.rows import write_rows

#: bfloat16 on both sides, summed in another order, and other dropout masks.
LOSS_TOLERANCE = 0.02
ROWS_PER_STEP = 16


@dataclass(frozen=True)
class Training:
    """Seconds between the first and the last step's row, tokens of a row, the steps' losses, peak memory in MiB."""

    seconds: float
    tokens_per_row: float
    losses: list[float]
    peak: float


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=5, help="optimiser steps (5; --quick: 3)")
    options.add_argument("--train_type", default="lora", choices=("lora", "full"))
    options.add_argument("--ours", default="", help="further flags of rayswift sft")
    options.add_argument("--theirs", default="", help="further flags of swift sft")
    given = options.parse_args()
    model, peer, steps = (
        model_folder(given),
        MS_SWIFT.make().folder / "bin" / "swift",
        3 if given.quick else given.steps,
    )
    with scratch_folder() as folder:
        rows = write_rows(given.source, steps * ROWS_PER_STEP, folder / "rows.jsonl")
        flags = {
            "model": model, "dataset": rows, "torch_dtype": "bfloat16", "max_steps": steps, "logging_steps": 1,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS_PER_STEP, "save_strategy": "no",
            "split_dataset_ratio": 0, "dataset_shuffle": "false", "train_dataloader_shuffle": "false",
            "learning_rate": "1e-4", "dataset_num_proc": cores(),
        }  # fmt: skip
        shared = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        ours = [sys.executable, "-m", "rayswift", "sft", *shared, "--train_type", given.train_type, "--template",
                "chatml", "--num_workers", "1", "--use_gpu", "false", *shlex.split(given.ours)]  # fmt: skip
        theirs = [peer, "sft", *shared, "--tuner_type", given.train_type, "--model_type", "llama",
                  "--external_plugins", SIDES / "ms_swift_template.py", "--template", "chatml_same_end", "--use_cpu",
                  "true", *shlex.split(given.theirs)]  # fmt: skip
        a, b = in_turn(
            pairs(given),
            lambda number: train("rayswift", ours, folder / f"a{number}", steps),
            lambda number: train("ms-swift", theirs, folder / f"b{number}", steps),
        )
    tokens = a[0].tokens_per_row * ROWS_PER_STEP * (steps - 1)
    for mine, other in zip(a[0].losses, b[0].losses, strict=True):
        if abs(mine - other) > LOSS_TOLERANCE * other:
            sys.exit(f"the sides did not train alike: losses {a[0].losses} and {b[0].losses}")
    peaks = [statistics.median(run.peak for run in side) for side in (a, b)]
    print_line(
        f"sft_vs_ms_swift_{given.train_type}",
        {
            **compared([tokens / run.seconds for run in a], [tokens / run.seconds for run in b], "tokens/s", True),
            "steps": steps,
            "losses": {"rayswift": a[0].losses, "peer": b[0].losses},
            "peak_mib": {"rayswift": round(peaks[0]), "peer": round(peaks[1]), "ratio": round(peaks[0] / peaks[1], 2)},
            "flags": {"rayswift": given.ours, "peer": given.theirs},
            "versions": {**versions("rayswift", "ray", "torch", "transformers", "peft"), "peer": "ms-swift 4.6.0"},
        },
    )


def train(name: str, command: list[str | Path], place: Path, steps: int) -> Training:
    """Run a training command to its end, noting when the log has its rows.

    Raises:
        SystemExit: it failed, or made fewer steps.
    """
    log, times, memory = CACHE / f"{name}_sft.log", {}, list[Memory]()
    with log.open("w") as terminal:
        process = subprocess.Popen(
            [*map(str, command), "--output_dir", str(place / "output")],
            env=side_environ(place / "cache"), stdout=terminal, stderr=subprocess.STDOUT,
        )  # fmt: skip
        with MemoryWatch(process.pid, memory):
            while process.poll() is None:
                for row in _rows(place):
                    times.setdefault(row["step"], time.monotonic())
                time.sleep(0.02)
    rows = _rows(place)
    if process.returncode or len(rows) != steps:
        fail(name, f"ended with status {process.returncode} after {len(rows)} steps", log)
    found = re.search(r"Dataset Token Length: ([\d.]+)", log.read_text(errors="replace"))
    return Training(
        times[steps] - times[1],
        float(found[1]) if found else 0.0,
        [row["loss"] for row in rows],
        max(one.held for one in memory),
    )


def _rows(place: Path) -> list[dict[str, float]]:
    """Step and loss of the whole rows of a run's log."""
    rows = []
    for path in (place / "output").rglob("logging.jsonl"):
        for line in path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines():
            row = json.loads(line)
            if "loss" in row and "global_step/max_steps" in row:
                rows.append({"step": int(row["global_step/max_steps"].split("/")[0]), "loss": float(row["loss"])})
    return rows


if __name__ == "__main__":
    main()
