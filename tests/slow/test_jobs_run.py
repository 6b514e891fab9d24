"""The scripts in jobs/ as a whole, with a tiny model and the flags that a small machine adds.

Of the others, pt_qwen7b.py runs in test_zero.py, quickstart.py in test_quickstart.py, rft_gsm8k.py in test_sampling.py
and sft_eval_deploy.py in test_sft_eval_deploy.py.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from command_line import QUICK, losses, run_directory, wait_for
from serving import START_TIMEOUT, Deployment, chat_body, end_by_force, free_port, ready, stop

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
GSM8K = REPOSITORY / "tests" / "data" / "gsm8k_40.jsonl"
#: What makes a job of a 7-billion model on GPUs one of this machine.
SMALL = ["--use_gpu", "false", "--torch_dtype", "float32"]
TRAIN = [
    *QUICK, "--num_workers", "2", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--use_gpu", "false",
]  # fmt: skip


def start(job: str, folder: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start a job as a person does, its output in ``folder``/log."""
    with (folder / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(REPOSITORY / "jobs" / job), *words], stdout=log, stderr=subprocess.STDOUT, text=True,
            cwd=folder, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}, start_new_session=True,
        )  # fmt: skip


def run(job: str, folder: Path, *words: str) -> tuple[int, str]:
    """Run a job to its end; exit status and output."""
    process = start(job, folder, *words)
    try:
        status = process.wait(300)
    finally:
        process.kill()
    return status, (folder / "log").read_text()


def saved_arguments(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / f"checkpoint-{step}" / "args.json").read_text())


def test_sft(tiny_dir: str, tmp_path: Path) -> None:
    status, output = run("sft_qwen7b.py", tmp_path, "--model", tiny_dir, "--dataset", "identity", *TRAIN)
    assert status == 0, output[-4000:]
    found = run_directory(tmp_path / "output")
    assert sorted(losses(found)) == [1, 2, 3, 4]
    assert (found / "checkpoint-4" / "adapter_model.safetensors").is_file()
    saved = saved_arguments(found, 4)
    assert (saved["lora_alpha"], saved["system"]) == (32, "You are a helpful assistant."), "the job's own settings"
    assert "swift-robot" in (found / "checkpoint-4" / "args.json").read_text()


def test_dpo(tiny_dir: str, tmp_path: Path) -> None:
    pairs = [{"query": f"{n} + 1?", "response": str(n + 1), "rejected_response": str(n)} for n in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    status, output = run("dpo_qwen05b.py", tmp_path, "--model", tiny_dir, "--dataset", "pairs.jsonl", *TRAIN)
    assert status == 0, output[-4000:]
    found = run_directory(tmp_path / "output")
    assert sorted(losses(found)) == [1, 2, 3, 4]
    assert losses(found)[1] == pytest.approx(math.log(2), abs=1e-4), "the policy begins as its reference"
    assert saved_arguments(found, 4)["beta"] == 0.1


def test_sample(tiny_dir: str, tmp_path: Path) -> None:
    words = ["--model", tiny_dir, "--dataset", f"{GSM8K}#6", "--sampler_engine", "transformers"]
    status, output = run("sample_llama8b.py", tmp_path, *words, "--max_new_tokens", "8", "--max_replicas", "1", *SMALL)
    assert status == 0, output[-4000:]
    (file,) = (tmp_path / "sample_output").glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 6 * 4
    assert len({row["id"] for row in rows}) == 6


def test_deploy(tiny_dir: str, tmp_path: Path) -> None:
    port, ray_folder = free_port(), Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    words = ["--model", tiny_dir, "--infer_backend", "transformers", "--max_replicas", "1", "--port", str(port), *SMALL]
    process = start("deploy_qwen7b.py", tmp_path, *words, RAY_TMPDIR=str(ray_folder))
    server = Deployment(process, port, tmp_path / "log", ray_folder)
    try:
        wait_for(lambda: ready(server), START_TIMEOUT, "the ready line")
        status, body = server.request("POST", "/v1/chat/completions", chat_body("qwen", "Who are you?", max_tokens=4))
        assert status == 200, body
        assert json.loads(body)["usage"]["completion_tokens"] == 4
        assert server.request("POST", "/v1/chat/completions", chat_body("another", "Who?"))[0] == 404
        stop(server)
    finally:
        end_by_force(server, {})
        shutil.rmtree(ray_folder, ignore_errors=True)


def test_eval(tiny_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("evalscope")
    rows = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    local = json.dumps({"general_qa": {"local_path": str(tmp_path / "questions.jsonl")}})
    status, output = run(
        "eval_qwen7b.py", tmp_path, "--model", tiny_dir, "--eval_dataset", "general_qa", "--eval_dataset_args", local,
        "--infer_backend", "transformers", "--max_new_tokens", "8", *SMALL,
    )  # fmt: skip
    assert status == 0, output[-4000:]
    assert list((tmp_path / "eval_output").rglob("*.json"))


@pytest.mark.parametrize(
    ("job", "library", "words", "mend"),
    [
        ("eval_qwen7b.py", "evalscope", ["--eval_output_dir", "scores"], "SET=eval"),
        ("export_awq.py", "gptqmodel", ["--dataset", str(GSM8K), "--output_dir", "awq"], "rayswift[quant]"),
    ],
)
def test_a_job_whose_library_is_not_installed_says_how_to_install_it(
    job: str, library: str, words: list[str], mend: str, tiny_dir: str, tmp_path: Path
) -> None:
    """AWQ itself wants an environment of its own: ``make test VENV=.venv-quant SET=quant``."""
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is installed")
    status, output = run(job, tmp_path, "--model", tiny_dir, *words, "--use_gpu", "false")
    assert status == 2, output[-4000:]
    assert "Traceback" not in output
    assert mend in output.strip().splitlines()[-1]
