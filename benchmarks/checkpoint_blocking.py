"""How long training waits for a checkpoint, as a share of a step: LoRA and full training of the small real model.

The same command twice, with a checkpoint every other step and without any, on this machine's CPUs. ``blocking``: what
the training thread waits for (the command says it of each checkpoint) over the seconds of a step without checkpoints.
``stall``: what all of it costs, the writing beside the steps on the same cores included: the difference of the two
runs by checkpoint, over the same. Bounds of blocking: 0.05 for LoRA, 0.3 for full training. One line of JSON each.

    python benchmarks/checkpoint_blocking.py [--quick] [--source FILE]
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path

from harness.environments import CACHE
from harness.measure import cores, fail, print_line, scratch_folder, side_environ, started, versions
from harness.options import by_size, model_folder, parser
from harness.rows import write_rows

BOUNDS = {"lora": 0.05, "full": 0.3}
_SAVED = re.compile(r"saved checkpoint-\d+ \(([\d.]+) s; training waited ([\d.]+) s\)")


def main() -> None:
    options = parser(__doc__)
    given = options.parse_args()
    steps = by_size(given, 6, 12, 30)
    within = True
    with scratch_folder() as folder:
        rows = write_rows(given.source, 500, folder / "rows.jsonl")
        for kind, bound in BOUNDS.items():
            flags = ["--train_type", kind, "--max_steps", str(steps), "--model", str(model_folder(given))]
            plain, _ = train(folder / f"{kind}-plain", rows, [*flags, "--save_strategy", "no"])
            saving, saved = train(folder / f"{kind}-saving", rows, [*flags, "--save_steps", "2"])
            waited = statistics.median(wait for _, wait in saved)
            within &= waited <= bound * plain / steps
            print_line(
                f"checkpoint_blocking_{kind}",
                {
                    "blocking": round(waited / (plain / steps), 4),
                    "bound": bound,
                    "stall": round((saving - plain) / len(saved) / (plain / steps), 3),
                    "step_s": round(plain / steps, 3),
                    "waited_s": waited,
                    "written_in_s": statistics.median(seconds for seconds, _ in saved),
                    "checkpoints": len(saved),
                    "cores": cores(),
                    "versions": versions("rayswift", "torch", "transformers", "peft"),
                },
            )
    sys.exit(0 if within else "a checkpoint keeps training waiting for longer than its bound")


def train(place: Path, rows: Path, flags: list[str]) -> tuple[float, list[tuple[float, float]]]:
    """Seconds of all steps, and of each checkpoint those it took and those that training waited."""
    command = [
        sys.executable, "-m", "rayswift", "sft", "--dataset", str(rows), "--num_workers", "1", "--use_gpu", "false",
        "--torch_dtype", "float32", "--max_length", "512", "--split_dataset_ratio", "0", "--report_to", "none",
        "--logging_steps", "1", "--gradient_accumulation_steps", "4", "--output_dir", str(place / "out"), *flags,
    ]  # fmt: skip
    log = CACHE / f"checkpoint_blocking_{place.name}.log"
    with log.open("w") as terminal, started(command, side_environ(place / "cache"), terminal, None) as process:
        process.wait()
    printed = log.read_text(errors="replace")
    if process.returncode:
        fail(place.name, f"ended with status {process.returncode}", log)
    (path,) = (place / "out").rglob("logging.jsonl")
    last = [row for row in map(json.loads, path.read_text().splitlines()) if "train_speed(iter/s)" in row][-1]
    steps = int(last["global_step/max_steps"].partition("/")[0])
    return steps / last["train_speed(iter/s)"], [(float(s), float(w)) for s, w in _SAVED.findall(printed)]


if __name__ == "__main__":
    main()
