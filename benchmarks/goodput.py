"""The share of a run's time that goes into steps which it keeps, while its worker is killed once in 20 steps.

``rayswift sft`` with LoRA on the small real model, steps of some seconds, on this machine's CPUs; no checkpoint of
the schedule is near, so that what is kept of a step is what RaySwift keeps by itself (docs/train.md). The worker is
killed with SIGKILL half a step after the 10th, 30th, … step. ``goodput`` is what the command's summary says: seconds of
steps that the run still has over all of its time. ``goodput_after_start`` leaves out what came before the first step,
which a long run pays once. ``undisturbed``: what all steps would have taken at the median speed before the first kill,
over the time since the first step; it also counts what slows steps down. ``back_s``: seconds from each kill to the
next step's row in the log, that step included; ``spread`` is theirs. ``lost_steps``: steps that each kill has thrown
back. The bound of ``goodput_after_start`` is 0.9; ``within`` says whether it holds.

    python benchmarks/goodput.py [--quick|--full] [--source FILE]
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import psutil
from harness.environments import CACHE
from harness.measure import fail, print_line, scratch_folder, side_environ, started, versions
from harness.options import by_size, model_folder, parser
from harness.rows import write_rows

#: Steps between two failures.
EVERY = 20
BOUND = 0.9


def main() -> None:
    given = parser(__doc__).parse_args()
    failures = by_size(given, 1, 3, 6)
    steps = EVERY * failures
    with scratch_folder() as folder:
        rows = write_rows(given.source, 4 * steps, folder / "rows.jsonl")
        command = [
            sys.executable, "-m", "rayswift", "sft", "--model", str(model_folder(given)), "--dataset", str(rows),
            "--num_workers", "1", "--use_gpu", "false", "--max_length", "512", "--split_dataset_ratio", "0",
            "--max_steps", str(steps), "--save_steps", "100000", "--logging_steps", "1", "--report_to", "none",
            "--gradient_accumulation_steps", "4", "--torch_dtype", "float32", "--max_failures", str(failures),
            "--output_dir", str(folder / "out"),
        ]  # fmt: skip
        log = CACHE / "goodput.log"
        with log.open("w") as terminal, started(command, side_environ(folder / "cache"), terminal, None) as process:
            seen = watched(process, folder / "out", failures)
        if process.returncode or not seen:
            fail("goodput", f"ended with status {process.returncode}", log)
        (path,) = (folder / "out").rglob("logging.jsonl")
        last = json.loads(path.read_text().splitlines()[-1])
        printed = log.read_text(errors="replace")
    kills, times = seen
    first_kill = EVERY // 2
    step_s = statistics.median(times[step + 1] - times[step] for step in range(1, first_kill))
    seconds, begun = last["seconds"], times[steps] - times[1]
    wall = sum(seconds.values())
    after_start = seconds["step"] / (wall - seconds["start"])
    back = [times[step + 1] - at for step, at in kills]
    print_line(
        "goodput",
        {
            "goodput": last["goodput"],
            "goodput_after_start": round(after_start, 4),
            "undisturbed": round((steps - 1) * step_s / begun, 4),
            "bound": BOUND,
            "within": after_start >= BOUND,
            "failures": len(kills),
            "steps": steps,
            "step_s": round(step_s, 2),
            "seconds": seconds,
            "back_s": [round(one, 1) for one in back],
            "spread": round((max(back) - min(back)) / statistics.median(back), 3),
            "lost_steps": [step - resumed_from(printed, number) for number, (step, _) in enumerate(kills)],
            "versions": versions("rayswift", "torch", "transformers", "peft", "ray"),
        },
    )


def watched(
    process: psutil.Popen, output: Path, failures: int
) -> tuple[list[tuple[int, float]], dict[int, float]] | None:
    """Kill the worker again and again; after which step and when that was, and when the last row of each step came.
    None where the run did not get so far."""
    kills: list[tuple[int, float]] = []
    times: dict[int, float] = {}
    while process.poll() is None:
        time.sleep(0.05)
        newest = max((step_of(row) for row in rows_of(output)), default=0)
        if newest and newest not in times:
            times[newest] = time.monotonic()
        step = EVERY // 2 + EVERY * len(kills)
        if len(kills) < failures and newest >= step:
            time.sleep((times[step] - times[step - 1]) / 2)
            max(
                train_workers(process.pid), key=lambda one: one.memory_info().rss
            ).kill()  # another may wait for its turn
            kills.append((step, time.monotonic()))
    return (kills, times) if len(kills) == failures else None


def train_workers(driver: int) -> list[psutil.Process]:
    """The processes of a run's Ray that are, or may become, its workers."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that has just ended
            found += [child] if "TrainWorker" in " ".join(child.cmdline()[:1]) else []
    return found


def rows_of(output: Path) -> list[dict[str, object]]:
    """The whole rows of training in the log."""
    found = list(output.glob("v*/logging.jsonl"))
    lines = found[0].read_text().splitlines(keepends=True) if found else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "loss" in row]


def step_of(row: dict[str, object]) -> int:
    return int(str(row["global_step/max_steps"]).partition("/")[0])


def resumed_from(printed: str, number: int) -> int:
    """The step that the run went on from after a kill."""
    said = [line for line in printed.splitlines() if "training goes on from step " in line]
    return int(said[number].rpartition(" ")[2])


if __name__ == "__main__":
    main()
