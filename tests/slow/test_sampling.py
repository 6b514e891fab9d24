"""``rayswift sample`` as a command with real vLLM on CPUs: a small run, killed engines, a killed run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import QUICK, losses, run, run_directory, start, wait_for

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
GSM8K = REPOSITORY / "tests" / "data" / "gsm8k_40.jsonl"
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
ENGINE = [
    "--sampler_engine", "vllm", "--torch_dtype", "float32", "--vllm_enforce_eager", "true", "--vllm_max_model_len",
    "1024", "--vllm_max_num_seqs", "16", "--use_gpu", "false",
]  # fmt: skip
#: Seconds between one engine's first answers and its death.
KILL_EVERY = 20.0


def command(model: str, folder: Path, *flags: str) -> list[str]:
    return ["sample", "--model", model, "--dataset", str(GSM8K), "--num_return_sequences", "4", "--output_dir",
            str(folder), "--output_file", "out.jsonl", *ENGINE, *flags]  # fmt: skip


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]


def answers_so_far(folder: Path) -> int:
    """Whole lines of the journal, without the first, which is its head."""
    journal = folder / ".out.jsonl.answers"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def engines(driver: int) -> list[psutil.Process]:
    """The processes of the engines: Ray Data's actors, and vLLM's cores below them."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        try:
            name = " ".join(child.cmdline()[:1])
        except psutil.Error:
            continue
        if "vLLMEngineStage" in name or "EngineCore" in name:
            found.append(child)
    return found


def test_vllm_answers_every_prompt_four_times_and_the_best_are_kept(smollm2_dir: str, tmp_path: Path) -> None:
    output = run(
        *command(smollm2_dir, tmp_path, "--max_new_tokens", "160", "--orm_model", "gsm8k", "--n_best_to_keep", "2"),
        "--num_sampling_batches", "12", log=tmp_path / "log", **VLLM,
    )  # fmt: skip
    assert "12 prompts, 48 answers" in output
    rows = rows_of(tmp_path)
    assert len({row["id"] for row in rows}) == 12  # the dataset's own answer is right, so every prompt has one
    assert max(Counter(row["id"] for row in rows).values()) <= 2
    assert all(row["messages"][-1]["content"] != row.get("rejected_response") for row in rows)
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_an_engine_killed_every_20_seconds_loses_and_repeats_nothing(smollm2_dir: str, tmp_path: Path) -> None:
    log, kills, dead_at = tmp_path / "log", 0, 0
    process = start(*command(smollm2_dir, tmp_path, "--max_new_tokens", "96"), log=log, **VLLM)
    try:
        while process.poll() is None and kills < 3:
            wait_for(lambda dead=dead_at: answers_so_far(tmp_path) > dead or process.poll() is not None, 400, "answers")
            time.sleep(KILL_EVERY)
            found = engines(process.pid)
            if found and process.poll() is None:
                victims = [one for one in found if ("EngineCore" in one.cmdline()[0]) == bool(kills % 2)] or found
                for victim in victims:  # in turn the actor and the core of vLLM below it
                    victim.kill()
                kills, dead_at = kills + 1, answers_so_far(tmp_path)
        assert process.wait(500) == 0, log.read_text()[-4000:]
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                one.kill()
    assert kills >= 2, "the run ended before engines could be killed"
    rows = rows_of(tmp_path)
    assert len(rows) == 160
    assert set(Counter(row["id"] for row in rows).values()) == {4}
    assert [row["messages"][0]["content"] for row in rows[::4]] == [
        json.loads(line)["question"] for line in GSM8K.read_text(encoding="utf-8").splitlines()
    ]
    assert "answers failed" not in log.read_text()


def test_a_killed_run_started_again_gives_what_an_undisturbed_one_gives(smollm2_dir: str, tmp_path: Path) -> None:
    flags = ["--max_new_tokens", "16", "--num_sampling_batches", "20"]
    words, log = command(smollm2_dir, tmp_path, *flags), tmp_path / "log"
    process = start(*words, log=log, **VLLM)
    try:
        wait_for(lambda: answers_so_far(tmp_path) >= 8 or process.poll() is not None, 400, "the first answers")
    finally:
        if process.poll() is None:
            for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                one.kill()
            process.wait(20)
    kept = answers_so_far(tmp_path)
    assert 8 <= kept < 80, log.read_text()[-3000:]
    output = run(*words, log=tmp_path / "second.log", **VLLM)
    assert f"{kept} of 80 answers are there already" in output
    again = rows_of(tmp_path)
    assert len(again) == 80
    assert set(Counter(row["id"] for row in again).values()) == {4}


def test_the_job_samples_and_trains_on_what_was_kept_and_its_pairs_train_dpo(smollm2_dir: str, tmp_path: Path) -> None:
    sample = ["--dataset", f"{GSM8K}#8", "--output_dir", str(tmp_path), "--num_return_sequences", "2",
              "--max_new_tokens", "16", *ENGINE]  # fmt: skip
    sft = ["--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--split_dataset_ratio", "0", "--save_steps", "3",
           *QUICK, "--max_length", "512"]  # fmt: skip
    command = [sys.executable, str(REPOSITORY / "jobs" / "rft_gsm8k.py"), "--model", smollm2_dir, *sample, "--", *sft]
    done = subprocess.run(command, env={**os.environ, **VLLM}, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    rows = [json.loads(line) for line in (tmp_path / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == 8
    assert sum("rejected_response" in row for row in rows) >= 6
    assert sorted(losses(run_directory(tmp_path / "run"))) == [1, 2, 3]

    run(
        "rlhf", "--rlhf_type", "dpo", "--model", smollm2_dir, "--dataset", str(tmp_path / "gsm8k.jsonl"),
        "--output_dir", str(tmp_path / "dpo"), "--max_steps", "3", "--split_dataset_ratio", "0", "--max_length", "512",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--logging_steps", "1",
        log=tmp_path / "dpo.log",
    )  # fmt: skip
    dpo = losses(run_directory(tmp_path / "dpo"))
    assert sorted(dpo) == [1, 2, 3]
    assert dpo[1] == pytest.approx(math.log(2), abs=1e-5)
    assert dpo[3] < dpo[1]
