"""A loss that is no number, and workers that hang, as a user meets them: two workers, with and without ZeRO."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from command_line import QUICK, losses, read_rows, run, run_directory, start, train_workers, wait_for

pytestmark = pytest.mark.slow


def rows_with_a_bad_one(folder: Path) -> Path:
    """Line 5 is trained so strongly that its loss is infinite."""
    rows = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}
            for n in range(1, 17)]  # fmt: skip
    rows[4]["messages"][1]["loss_scale"] = 1e39
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("deepspeed", [[], ["--deepspeed", "zero2"], ["--deepspeed", "zero3"]])
def test_a_bad_row_costs_its_step(smollm2_dir: str, tmp_path: Path, deepspeed: list[str]) -> None:
    data = rows_with_a_bad_one(tmp_path)
    command = [
        "sft", "--model", smollm2_dir, "--dataset", str(data), "--num_workers", "2", "--max_steps", "8",
        "--split_dataset_ratio", "0", "--save_steps", "8", "--packing", "false", *deepspeed, *QUICK,
    ]  # fmt: skip
    printed = run(*command, "--on_nan", "skip", "--output_dir", str(tmp_path / "skip"), log=tmp_path / "skip.log")
    directory = run_directory(tmp_path / "skip")
    (line,) = [line for line in printed.splitlines() if "the step is left out" in line]
    assert f"{data}:5 the first" in line
    (saved,) = directory.glob("bad_steps/step-*.jsonl")
    (row,) = [json.loads(text) for text in saved.read_text().splitlines()]
    assert (row["place"], row["loss"]) == (f"{data}:5", "inf")
    assert "5?" in row["text"]
    found = losses(directory)
    assert len(found) == 7
    assert all(math.isfinite(loss) for loss in found.values())
    last = read_rows(directory)[-1]
    assert 0 < last["goodput"] < 1
    assert last["seconds"]["restarts"] == 0
    assert len(last["peak_memory(GiB)"]) == 2
    assert last["tokens/s"] > last["trained_tokens/s"] > 0
    assert "goodput" in printed
    if deepspeed == ["--deepspeed", "zero3"]:
        return
    process = start(*command, "--output_dir", str(tmp_path / "stop"), log=tmp_path / "stop.log")
    assert process.wait(300) == 1
    printed = (tmp_path / "stop.log").read_text()
    assert "Traceback" not in printed
    last_line = printed.rstrip().splitlines()[-1]
    assert last_line.startswith("rayswift sft: error: step ")
    assert f"{data}:5 the first" in last_line
    assert "--on_nan skip leaves such steps out" in last_line


def hanging(folder: Path, once: bool = False) -> str:
    """A PYTHONPATH whose processes hang in worker 1 at step 3; ``once``: the first of them."""
    sign = folder / "hung"
    (folder / "sitecustomize.py").write_text(
        "import pathlib, sys, time\n"
        "if 'default_worker.py' in ' '.join(sys.orig_argv):\n"
        "    from rayswift.train.loader import EpochLoader\n"
        "    items = EpochLoader.micro_batch_items\n"
        "    def micro_batch_items(self, step):\n"
        f"        sign, once = pathlib.Path({str(sign)!r}), {once}\n"
        "        if step == 2 and self.rank.rank == 1 and not (once and sign.exists()):\n"
        "            sign.touch()\n"
        "            while True:\n"
        "                time.sleep(1)\n"
        "        return items(self, step)\n"
        "    EpochLoader.micro_batch_items = micro_batch_items\n"
    )
    return f"{folder}:{Path(__file__).resolve().parents[2]}"


@pytest.mark.parametrize("how", ["sleeps", "stopped"])
def test_a_worker_that_hangs_is_named(smollm2_dir: str, tmp_path: Path, how: str) -> None:
    command = [
        "sft", "--model", smollm2_dir, "--dataset", "identity", "--model_name", "x", "--model_author", "y",
        "--num_workers", "2", "--max_steps", "200", "--split_dataset_ratio", "0", "--step_timeout", "15",
        "--save_steps", "2", "--output_dir", str(tmp_path / "out"), *QUICK,
    ]  # fmt: skip
    log = tmp_path / "log"
    process = start(*command, log=log, **({"PYTHONPATH": hanging(tmp_path)} if how == "sleeps" else {}))
    if how == "stopped":
        wait_for(lambda: any((tmp_path / "out").glob("v*/checkpoint-2/manifest.json")), 300, "two steps")
        train_workers(process.pid)[1].suspend()
    assert process.wait(300) == 1, log.read_text()[-4000:]
    printed = log.read_text()
    assert "Traceback" not in printed
    line = printed.rstrip().splitlines()[-1]
    assert line.startswith("rayswift sft: error: nothing got on for 15 s (--step_timeout): worker ")
    stacks = (run_directory(tmp_path / "out") / "stacks.txt").read_text()
    if how == "sleeps":
        assert "worker 1 hangs in " in line
        assert "micro_batch_items" in line
        assert "worker 0, " in stacks
        assert "worker 1, " in stacks
    else:
        assert "does not answer at all" in line
    assert "checkpoint-2 in " in printed


def test_workers_that_wait_in_vain_start_again(tiny_dir: str, tmp_path: Path) -> None:
    """Worker 1 hangs once; nobody watches it, but worker 0 does not wait for ever."""
    command = [
        "sft", "--model", tiny_dir, "--dataset", "identity", "--model_name", "x", "--model_author", "y",
        "--num_workers", "2", "--max_steps", "5", "--split_dataset_ratio", "0", "--use_gpu", "false",
        "--save_steps", "2", "--ddp_timeout", "10", "--max_failures", "1",
        "--output_dir", str(tmp_path / "out"), *QUICK,
    ]  # fmt: skip
    printed = run(*command, log=tmp_path / "log", PYTHONPATH=hanging(tmp_path, once=True))
    assert (tmp_path / "hung").exists()
    assert "training goes on from step 2" in printed
    directory = run_directory(tmp_path / "out")
    assert list(losses(directory)) == [1, 2, 3, 4, 5]
    assert read_rows(directory)[-1]["seconds"]["restarts"] > 10
