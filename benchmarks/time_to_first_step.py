"""From command line to first optimiser step: ``rayswift sft`` against ``swift sft`` of ms-swift 4.6.

Cold processes and empty caches each time, equal settings: LoRA, float32 on the CPU, one worker, batch 1, accumulation
1, no evaluation, no checkpoint, as many data processes as cores. Timed: from starting the command to the row of step 1
in its ``logging.jsonl``. Order is not shuffled and a fresh adapter changes nothing, so the loss of step 1 must be the
same on both sides. One line of JSON for each size of dataset.

    python benchmarks/time_to_first_step.py [--rows 48000 100] [--source FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness.environments import MS_SWIFT
from harness.first_step import FirstStep, run_to_first_step
from harness.measure import SIDES, compared, cores, in_turn, print_line, scratch_folder, versions
from harness.options import model_folder, pairs, parser
from harness.rows import write_rows

#: float32 on both sides, summed in another order.
LOSS_TOLERANCE = 1e-3


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rows", type=int, nargs="+", help="sizes of the dataset (48,000 and 100; --quick: 500)")
    given = options.parse_args()
    model = model_folder(given)
    peer = MS_SWIFT.make().folder / "bin" / "swift"
    for count in given.rows or ([500] if given.quick else [48_000, 100]):
        with scratch_folder() as folder:
            rows = write_rows(given.source, count, folder / "rows.jsonl")
            compare(folder, ours_command(model, rows), theirs_command(peer, model, rows), count, pairs(given))


def compare(folder: Path, ours: list[str], theirs: list[str], count: int, runs: int) -> None:
    """Print the line of one size."""

    def run(name: str, command: list[str], number: int) -> FirstStep:
        place = folder / f"{name}-{number}"
        return run_to_first_step(f"{name}_first_step", command, place / "cache", place / "output")

    a, b = in_turn(runs, lambda number: run("rayswift", ours, number), lambda number: run("ms-swift", theirs, number))
    losses = sorted(step.loss for step in [*a, *b])
    if losses[-1] - losses[0] > LOSS_TOLERANCE * losses[-1]:
        sys.exit(f"the sides did not train on the same row: losses of step 1 are {losses}")
    last = folder / f"rayswift-{runs - 1}"
    warm = run_to_first_step("rayswift_warm_first_step", ours, last / "cache", last / "warm")
    print_line(
        f"time_to_first_step_{count}",
        {
            **compared([step.seconds for step in a], [step.seconds for step in b], "s", False),
            "rows": count,
            "loss_of_step_1": [a[0].loss, b[0].loss],
            "warm_cache_s": round(warm.seconds, 3),
            "versions": {**versions("rayswift", "ray", "torch", "transformers"), "peer": "ms-swift 4.6.0"},
        },
    )


def shared_flags(model: Path, rows: Path) -> list[str]:
    """Flags that both commands understand."""
    flags = {
        "model": model, "dataset": rows, "torch_dtype": "float32", "max_length": 512, "max_steps": 1,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "split_dataset_ratio": 0,
        "dataset_shuffle": "false", "train_dataloader_shuffle": "false", "dataset_num_proc": cores(),
        "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def ours_command(model: Path, rows: Path) -> list[str]:
    """``rayswift sft …``."""
    own = ["--train_type", "lora", "--template", "chatml", "--num_workers", "1", "--use_gpu", "false",
           "--load_from_cache_file", "true"]  # fmt: skip
    return [sys.executable, "-m", "rayswift", "sft", *shared_flags(model, rows), *own]


def theirs_command(swift: Path, model: Path, rows: Path) -> list[str]:
    """``swift sft …``; the plugin makes its chatml end as ours does."""
    plugin = SIDES / "ms_swift_template.py"
    own = ["--tuner_type", "lora", "--model_type", "llama", "--external_plugins", str(plugin), "--template",
           "chatml_same_end", "--use_cpu", "true"]  # fmt: skip
    return [str(swift), "sft", *shared_flags(model, rows), *own]


if __name__ == "__main__":
    main()
