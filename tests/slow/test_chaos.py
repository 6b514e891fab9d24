"""Workers killed again and again, some while a checkpoint is written: the weights at the end are those of a run that
nothing disturbs, to the bit."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import QUICK, distinct_rows, losses, read_rows, run, run_directory, start, train_workers, wait_for

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("RAYSWIFT_TEST_KILLS", "3"))
#: A checkpoint every other step, and two more than kills.
STEPS = 2 * KILLS + 4


def test_twenty_kills_at_random_points_change_no_bit(tmp_path: Path) -> None:
    """Trainer and store alone, killed at exact points: a start takes no seconds there."""
    script = [sys.executable, Path(__file__).with_name("kills.py"), tmp_path, "20"]
    done = subprocess.run(script, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["kills"]) == 20
    assert {point for _, _, point in found["kills"]} == {"step", "note", "files", "manifest", "whole"}
    assert {rank for rank, _, _ in found["kills"]} == {0, 1}
    # Each attempt went on from the last checkpoint that could be whole.
    expected = [0]
    for _, step, point in found["kills"]:
        whole = step if point == "whole" else (step - 1) // 2 * 2
        # Who was killed behind a step may have had the checkpoint of the one before on the way.
        expected.append(whole)
    starts = [int(start) for start in found["starts"]]
    assert all(start in (most, most - 2) for start, most in zip(starts, expected, strict=True)), (starts, expected)
    last = f"checkpoint-{found['steps']}"
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        ours, theirs = ((tmp_path / run / last / name).read_bytes() for run in ("killed", "undisturbed"))
        assert ours == theirs, name
    left = sorted(path.name for path in (tmp_path / "killed").iterdir())
    assert left == sorted(path.name for path in (tmp_path / "undisturbed").iterdir())


def command(model: str, output: Path, *more: str) -> list[str]:
    """Two workers, dropout on (random numbers must be restored)."""
    return [
        "sft", "--model", model, "--dataset", "identity", "--model_name", "swift-robot", "--model_author", "swift",
        "--num_workers", "2", "--use_gpu", "false", "--max_steps", str(STEPS), "--save_steps", "2",
        "--save_total_limit", "2", "--learning_rate", "1e-3", "--split_dataset_ratio", "0", "--torch_dtype", "float32",
        "--max_failures", str(KILLS), "--output_dir", str(output), *QUICK, "--gradient_accumulation_steps", "32", *more,
    ]  # fmt: skip


def test_any_number_of_killed_workers_changes_no_bit(tiny_dir: str, tmp_path: Path) -> None:
    run(*command(tiny_dir, tmp_path / "undisturbed"), log=tmp_path / "undisturbed.log")
    expected = run_directory(tmp_path / "undisturbed")

    output, log = tmp_path / "out", tmp_path / "log"
    chance = random.Random(0)
    driver = start(*command(tiny_dir, output), log=log)
    killed = {"writing": 0, "training": 0}
    for kill in range(KILLS):
        step, when = 2 * kill + 2, chance.choice(["writing", "training"])
        sign = f"v*/.writing-checkpoint-{step}" if when == "writing" else f"v*/checkpoint-{step}/manifest.json"
        deadline = time.monotonic() + 300
        while not any(output.glob(sign)):
            # A checkpoint of a tiny model may be whole before the sign of its being written was seen.
            if any(output.glob(f"v*/checkpoint-{step}/manifest.json")):
                when = "training"
                break
            assert driver.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, f"checkpoint-{step} was not written"
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05 if when == "writing" else 1.0))
        workers = train_workers(driver.pid)
        if not workers:  # the last one is still being replaced
            continue
        chance.choice(workers).kill()
        killed[when] += 1
    assert driver.wait(600) == 0, log.read_text()[-4000:]

    assert sum(killed.values()) >= 0.9 * KILLS
    assert KILLS < 5 or killed["writing"] > 0
    printed = log.read_text()
    assert printed.count("training goes on from step") >= 0.5 * KILLS, killed
    found = run_directory(output)
    assert losses(found) == losses(expected)
    last = f"checkpoint-{STEPS}/adapter_model.safetensors"
    assert (found / last).read_bytes() == (expected / last).read_bytes()
    assert read_rows(found)[-1]["global_step"] == STEPS
    assert not list(found.glob(".writing-*")) and not list(found.glob("*.aside*"))


def test_steps_held_in_memory_change_no_bit(tiny_dir: str, tmp_path: Path) -> None:
    """Steps of about half a second and no checkpoint but the last one: a killed worker's are held in memory."""
    steps = 8 * KILLS + 4
    rows = distinct_rows(tmp_path / "rows.jsonl", 64 * steps)
    more = ["--dataset", str(rows), "--max_steps", str(steps), "--save_steps", "1000"]
    run(*command(tiny_dir, tmp_path / "undisturbed", *more), log=tmp_path / "undisturbed.log")
    output, log = tmp_path / "out", tmp_path / "log"
    chance = random.Random(0)
    driver = start(*command(tiny_dir, output, *more), log=log)
    for kill in range(KILLS):
        step = 8 * kill + 5
        wait_for(lambda: any(output.glob("v*")) and step in losses(run_directory(output)), 300, f"step {step}")  # noqa: B023
        time.sleep(chance.uniform(0, 1.0))
        largest = sorted(train_workers(driver.pid), key=lambda one: one.memory_info().rss)[-2:]  # others only wait
        chance.choice(largest).kill()
        again = kill + 1
        wait_for(lambda: log.read_text().count("training goes on from step") >= again, 300, "another start")  # noqa: B023
    assert driver.wait(600) == 0, log.read_text()[-4000:]
    held = [int(step) for step in re.findall(r"training goes on from step (\d+)", log.read_text())]
    assert len(held) == KILLS and all(step >= 8 * kill for kill, step in enumerate(held)) and held[0] > 0
    found, expected = run_directory(output), run_directory(tmp_path / "undisturbed")
    assert [path.name for path in found.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    assert losses(found) == losses(expected)
    last = f"checkpoint-{steps}/adapter_model.safetensors"
    assert (found / last).read_bytes() == (expected / last).read_bytes()
