"""Training speed: ``rayswift sft`` against ``swift sft`` of ms-swift 4.6, the same rows in the same order.

LoRA on SmolLM2-135M-Instruct in bfloat16 on CPUs (``--model`` and ``--gpu``: another, on a card), one worker, batch
1 × 16 accumulated, no evaluation, no checkpoint; everything else as each command has it by default. Timed: from the
log's row of step 1 to that of the last step, so that neither start nor first data counts. Losses must agree: the same
rows make every step, though LoRA's dropout differs from run to run. One line of JSON.

    python benchmarks/sft_vs_ms_swift.py [--steps 5] [--train_type full] [--ours "--packing false"] [--gpu]
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys

from harness.environments import MS_SWIFT
from harness.measure import SIDES, compared, cores, in_turn, print_line, scratch_folder, versions
from harness.options import model_folder, pairs, parser
from harness.rows import write_rows
from harness.training import train

#: bfloat16 on both sides, summed in another order, and other dropout masks.
LOSS_TOLERANCE = 0.02
ROWS_PER_STEP = 16


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=5, help="optimiser steps (5; --quick: 3)")
    options.add_argument("--train_type", default="lora", choices=("lora", "full"))
    options.add_argument("--ours", default="", help="further flags of rayswift sft")
    options.add_argument("--theirs", default="", help="further flags of swift sft")
    options.add_argument("--gpu", action="store_true", help="both sides on this machine's first GPU")
    given = options.parse_args()
    model, peer, steps = (
        model_folder(given),
        MS_SWIFT.make().folder / "bin" / "swift",
        3 if given.quick else given.steps,
    )
    model_type = json.loads((model / "config.json").read_text())["model_type"]
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
                "chatml", "--num_workers", "1", "--use_gpu", str(given.gpu).lower(),
                *shlex.split(given.ours)]  # fmt: skip
        theirs = [peer, "sft", *shared, "--tuner_type", given.train_type, "--model_type", model_type,
                  "--external_plugins", SIDES / "ms_swift_template.py", "--template", "chatml_same_end", "--use_cpu",
                  str(not given.gpu).lower(), *shlex.split(given.theirs)]  # fmt: skip
        a, b = in_turn(
            pairs(given),
            lambda number: train("rayswift", ours, folder / f"a{number}", steps, gpu=given.gpu),
            lambda number: train("ms-swift", theirs, folder / f"b{number}", steps, gpu=given.gpu),
        )
    tokens = a[0].tokens_per_row * ROWS_PER_STEP * (steps - 1)
    # In full training ms-swift keeps bfloat16 weights, which lose small updates, and RaySwift float32 ones: only the
    # first loss is of the same model.
    compared_steps = 1 if given.train_type == "full" and not given.theirs else steps
    for mine, other in list(zip(a[0].losses, b[0].losses, strict=True))[:compared_steps]:
        if abs(mine - other) > LOSS_TOLERANCE * other:
            sys.exit(f"the sides did not train alike: losses {a[0].losses} and {b[0].losses}")
    peaks = [statistics.median(run.peak for run in side) for side in (a, b)]
    print_line(
        f"sft_vs_ms_swift_{given.train_type}{'_gpu' if given.gpu else ''}",
        {
            **compared([tokens / run.seconds for run in a], [tokens / run.seconds for run in b], "tokens/s", True),
            "steps": steps,
            "losses": {"rayswift": a[0].losses, "peer": b[0].losses},
            "peak_mib": {"rayswift": round(peaks[0]), "peer": round(peaks[1]), "ratio": round(peaks[0] / peaks[1], 2)},
            "flags": {"rayswift": given.ours, "peer": given.theirs},
            "versions": {**versions("rayswift", "ray", "torch", "transformers", "peft"), "peer": "ms-swift 4.6.0"},
        },
    )


if __name__ == "__main__":
    main()
