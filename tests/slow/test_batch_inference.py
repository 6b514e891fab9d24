"""``rayswift infer --val_dataset`` as a command: engines on the cluster, and kills that lose and repeat nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from command_line import run, start, wait_for
from serving import ENGINE

from rayswift.data.tokens.encoder import Encoder

pytestmark = pytest.mark.slow

COUNTRIES = ("France", "Italy", "Spain", "Japan", "Peru", "Egypt", "Kenya", "Chile", "India", "Norway")
VLLM = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
BACKENDS = {
    "vllm": [*ENGINE, "--num_workers", "1", "--vllm_max_num_seqs", "32"],
    "transformers": ["--max_batch_size", "4"],
}


def write_dataset(path: Path, count: int) -> list[str]:
    """Numbered questions, the third of which cannot be read; the questions."""
    questions = [f"{n}. What is the capital of {COUNTRIES[n % len(COUNTRIES)]}?" for n in range(count)]
    rows: list[dict[str, Any]] = [{"query": question, "response": "x"} for question in questions]
    rows[2] = {"nothing": 1}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return questions


def read(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a result file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def command(model: str, dataset: Path, results: Path, backend: str, *flags: str) -> list[str]:
    return [
        "infer", "--model", model, "--val_dataset", str(dataset), "--result_path", str(results), "--temperature", "0",
        *BACKENDS[backend], *flags,
    ]  # fmt: skip


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and everything below it, as a machine that goes down."""
    process = psutil.Process(pid)
    for one in [process, *process.children(recursive=True)]:
        one.kill()
    process.wait(20)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_a_killed_run_started_again_answers_only_what_is_missing(
    smollm2_dir: str, tmp_path: Path, backend: str
) -> None:
    dataset, results = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    questions = write_dataset(dataset, 200)
    words = command(smollm2_dir, dataset, results, backend, "--max_new_tokens", "24")
    process = start(*words, log=tmp_path / "first.log", **VLLM)
    try:
        wait_for(lambda: len(read(results)) > 10 or process.poll() is not None, 400, "the first rows")
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    kept = len(read(results))
    assert 10 < kept < 200, (tmp_path / "first.log").read_text()[-3000:]
    with results.open("a") as file:
        file.write('{"response": "half a r')
    output = run(*words, log=tmp_path / "second.log", **VLLM)
    rows = read(results)
    assert [row["messages"][0]["content"] if row["messages"] else "bad" for row in rows] == [
        *questions[:2], "bad", *questions[3:]
    ]  # fmt: skip
    assert [number for number, row in enumerate(rows) if row.get("error")] == [2]
    assert f"{kept} of 200 rows are in" in output
    assert f"'num_samples': {200 - kept}" in output
    assert "row/s" in output
    assert "tokens/s" in output


def test_vllm_pool_answers_are_those_of_transformers_and_say_what_the_adapter_says(
    smollm2_dir: str, tmp_path: Path
) -> None:
    dataset = tmp_path / "rows.jsonl"
    write_dataset(dataset, 8)
    outputs = {}
    for backend in BACKENDS:
        results = tmp_path / f"{backend}.jsonl"
        exact = ["--torch_dtype", "float32", "--max_new_tokens", "12", "--metric", "rouge"]
        outputs[backend] = run(*command(smollm2_dir, dataset, results, backend, *exact), log=tmp_path / "log", **VLLM)
        assert "{'rouge-1': " in outputs[backend]
    vllm, transformers = read(tmp_path / "vllm.jsonl"), read(tmp_path / "transformers.jsonl")
    assert vllm == transformers
    encoder = Encoder(smollm2_dir)
    prompt = sum(len(encoder.encode_prompt(row["messages"][:1])) for row in vllm if "error" not in row)
    assert f"'num_prompt_tokens': {prompt}" in outputs["vllm"]


def test_a_dead_engine_is_replaced_and_no_row_is_lost(smollm2_dir: str, tmp_path: Path) -> None:
    dataset, results = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    write_dataset(dataset, 120)
    words = command(smollm2_dir, dataset, results, "transformers", "--max_new_tokens", "24", "--num_workers", "1")
    process = start(*words, log=tmp_path / "log")
    try:
        wait_for(lambda: len(read(results)) > 10 or process.poll() is not None, 300, "the first rows")
        workers = [
            child for child in psutil.Process(process.pid).children(recursive=True)
            if "MapWorker" in " ".join(child.cmdline()[:1])
        ]  # fmt: skip
        assert workers, (tmp_path / "log").read_text()[-3000:]
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
        assert process.wait(400) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
    rows = read(results)
    assert len(rows) == 120
    assert [number for number, row in enumerate(rows) if row.get("error")] == [2]
