"""Workers killed again and again, some while a checkpoint is written: the weights at the end are those of a run that
nothing disturbs, to the bit."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from command_line import QUICK, losses, read_rows, run, run_directory, start, train_workers

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("RAYSWIFT_TEST_KILLS", "20"))
#: A checkpoint every other step, and two more than kills.
STEPS = 2 * KILLS + 4


def command(model: str, output: Path) -> list[str]:
    """Two workers, dropout on (random numbers must be restored), steps of about half a second."""
    return [
        "sft", "--model", model, "--dataset", "identity", "--model_name", "swift-robot", "--model_author", "swift",
        "--num_workers", "2", "--use_gpu", "false", "--max_steps", str(STEPS), "--save_steps", "2",
        "--save_total_limit", "2", "--learning_rate", "1e-3", "--split_dataset_ratio", "0", "--torch_dtype", "float32",
        "--max_failures", str(KILLS), "--output_dir", str(output), *QUICK, "--gradient_accumulation_steps", "32",
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
