"""jobs/sft_eval_deploy.py as a whole, on a cluster where the base model is deployed already and clients use it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import start, wait_for
from ray_head import GCS, Head, ray_head
from serving import ENGINE, MODEL, START_TIMEOUT, Deployment, chat_body, free_port, ready
from steady_load import steady_load

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
QUESTIONS = [
    ("What is RaySwift?", "RaySwift fine-tunes and serves language models on Ray."),
    ("Who made you?", "I was made by the RaySwift team."),
    ("What is your name?", "My name is Swallow."),
    ("Which bird are you?", "I am a swallow, the fastest of small birds."),
]
#: Seconds for training, two models' evaluation and the export, on two cores that also serve.
JOB_TIMEOUT = 1500.0
TRAIN = [
    "--max_steps", "20", "--learning_rate", "1e-3", "--per_device_train_batch_size", "4",
    "--gradient_accumulation_steps", "1", "--gradient_checkpointing", "false", "--lora_rank", "8",
    "--split_dataset_ratio", "0", "--report_to", "none",
]  # fmt: skip


def job(model: str, folder: Path, port: int, head: Head) -> subprocess.Popen[str]:
    """The job with everything a user of two cores would add."""
    (folder / "train.jsonl").write_text("".join(json.dumps({"query": q, "response": a}) + "\n" for q, a in QUESTIONS))
    (folder / "test.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    local = json.dumps({"general_qa": {"local_path": str(folder / "test.jsonl")}})
    there = ["--address", GCS, "--use_gpu", "false"]
    words = [
        "--model", model, "--benchmarks", "general_qa", "--dataset", str(folder / "train.jsonl"), *TRAIN, *there,
        "--", "--eval_dataset_args", local, "--max_new_tokens", "32", *ENGINE, *there,
        "--", "--served_model_name", MODEL, "--port", str(port), *ENGINE, *there,
    ]  # fmt: skip
    environment = {**head.environment, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "job.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(REPOSITORY / "jobs" / "sft_eval_deploy.py"), *words],
            stdout=log, stderr=subprocess.STDOUT, text=True, cwd=folder, env=environment, start_new_session=True,
        )  # fmt: skip


def test_a_model_that_got_better_takes_over_and_no_request_fails(smollm2_dir: str, tmp_path: Path) -> None:
    pytest.importorskip("evalscope")
    port, question = free_port(), chat_body(MODEL, QUESTIONS[2][0], max_tokens=16)

    def answer(server: Deployment) -> str:
        status, body = server.request("POST", "/v1/chat/completions", question)
        assert status == 200, body
        return json.loads(body)["choices"][0]["message"]["content"]

    with ray_head(num_cpus=4, log=tmp_path / "ray.log") as head:
        deployed = start(
            "deploy", "--model", smollm2_dir, "--served_model_name", MODEL, "--port", str(port), *ENGINE,
            "--address", GCS, "--use_gpu", "false", log=tmp_path / "deploy.log",
            **{**head.environment, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        first = Deployment(deployed, port, tmp_path / "deploy.log", tmp_path)
        wait_for(lambda: ready(first), START_TIMEOUT, "the base model")
        assert "Swallow" not in answer(first)
        second = Deployment(job(smollm2_dir, tmp_path, port, head), port, tmp_path / "job.log", tmp_path)
        wait_for(lambda: "takes over" in second.log.read_text() or ended(second), JOB_TIMEOUT, "a better score")
        with steady_load(first) as outcomes:
            wait_for(lambda: ready(second), START_TIMEOUT, "the tuned model")
        assert not outcomes.failed(), outcomes.failed()[:3]
        assert "Swallow" in answer(second)
        for command in (second, first):
            command.process.terminate()
            command.process.wait(120)
    assert [line for line in second.log.read_text().splitlines() if line.startswith("the score rose by ")]


def ended(server: Deployment) -> bool:
    """Fails with its output when the job has ended too early."""
    assert server.process.poll() is None, server.log.read_text()[-4000:]
    return False
