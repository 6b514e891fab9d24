"""What Ray costs a training step: ``rayswift sft`` against the same data path, model and trainer in a plain process.

LoRA on SmolLM2-135M-Instruct in bfloat16 on CPUs, one worker, batch 1 × 16 accumulated. Timed: from the log's row of
step 1 to that of the last step. The losses must be the same to the last digit. One line of JSON.

    python benchmarks/ray_overhead.py [--steps 5] [--flags "--packing false"] [--source FILE]
"""

from __future__ import annotations

import shlex
import sys

from harness.measure import SIDES, compared, in_turn, print_line, scratch_folder, versions
from harness.options import model_folder, pairs, parser
from harness.rows import write_rows
from harness.training import train

ROWS_PER_STEP = 16


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=5, help="optimiser steps (5; --quick: 3)")
    options.add_argument("--flags", default="", help="further flags of both sides")
    given = options.parse_args()
    steps = 3 if given.quick else given.steps
    with scratch_folder() as folder:
        rows = write_rows(given.source, steps * ROWS_PER_STEP, folder / "rows.jsonl")
        flags = {
            "model": model_folder(given), "dataset": rows, "torch_dtype": "bfloat16", "max_steps": steps,
            "logging_steps": 1, "gradient_accumulation_steps": ROWS_PER_STEP, "save_strategy": "no",
            "split_dataset_ratio": 0, "train_dataloader_shuffle": "false", "template": "chatml", "num_workers": 1,
            "use_gpu": "false",
        }  # fmt: skip
        words = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        words += shlex.split(given.flags)
        with_ray = [sys.executable, "-m", "rayswift", "sft", *words]
        without = [sys.executable, SIDES / "sft_without_ray.py", *words]
        a, b = in_turn(
            pairs(given),
            lambda number: train("rayswift", with_ray, folder / f"a{number}", steps, folder / "cache"),
            lambda number: train("without_ray", without, folder / f"b{number}", steps, folder / "cache"),
        )
    if a[0].losses != b[0].losses:
        sys.exit(f"the sides did not train alike: losses {a[0].losses} and {b[0].losses}")
    tokens = a[0].tokens_per_row * ROWS_PER_STEP * (steps - 1)
    print_line(
        "ray_overhead",
        {
            **compared([tokens / run.seconds for run in a], [tokens / run.seconds for run in b], "tokens/s", True),
            "steps": steps,
            "losses": a[0].losses,
            "peak_mib": {"rayswift": round(a[0].peak), "peer": round(b[0].peak)},
            "flags": given.flags,
            "versions": versions("rayswift", "ray", "torch", "transformers", "peft"),
        },
    )


if __name__ == "__main__":
    main()
