"""What a command's own Ray, its workers and its engines listen on: this machine alone, from its start to its end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from command_line import QUICK, start, wait_for
from serving import beyond_this_machine, free_port, listening

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[1] / "data"
TRAIN = [*QUICK, "--max_steps", "3", "--use_gpu", "false", "--output_dir", "out"]
PAIR = {
    "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}],
    "rejected_response": "No.",
}
VLLM = ["--torch_dtype", "float32", "--vllm_enforce_eager", "true", "--vllm_max_model_len", "512", "--use_gpu", "false"]
ASKED = ["--max_new_tokens", "4", "--temperature", "0"]
COMMANDS = {
    "sft": ["--dataset", "rows.jsonl", "--num_workers", "2", *TRAIN],
    "pt": ["--dataset", "texts.jsonl", *TRAIN],
    "rlhf": ["--rlhf_type", "dpo", "--dataset", "rows.jsonl", *TRAIN],
    "infer": ["--val_dataset", "rows.jsonl", "--result_path", "out.jsonl", "--infer_backend", "vllm", *VLLM, *ASKED],
    "sample": ["--dataset", "rows.jsonl", "--num_return_sequences", "2", "--sampler_engine", "transformers",
               "--output_dir", "out", "--use_gpu", "false", *ASKED],
    "eval": ["--eval_dataset", "ARC_c", "--eval_dataset_args",
             json.dumps({"ARC_c": {"local_path": str(DATA / "arc_challenge_24.jsonl")}}), "--eval_limit", "2",
             "--use_gpu", "false", "--infer_backend", "transformers", *ASKED],
    "app": ["--infer_backend", "transformers", "--use_gpu", "false"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_of_a_command_listens_beyond_this_machine(
    command: str, tiny_dir: str, smollm2_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "eval":
        pytest.importorskip("evalscope")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(PAIR)}\n" * 16)
    (tmp_path / "texts.jsonl").write_text(f"{json.dumps({'response': 'Once upon a time.'})}\n" * 16)
    page = ["--server_port", str(free_port())] if command == "app" else []
    log = tmp_path / "log"
    model = smollm2_dir if "vllm" in COMMANDS[command] else tiny_dir  # vLLM knows no heads so small
    process = start(command, "--model", model, *COMMANDS[command], *page, log=log,
                    VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")  # fmt: skip
    seen: dict[tuple[str, int], str] = {}

    def ended() -> bool:
        shown = bool(page) and "The page is at" in log.read_text(errors="replace")
        running = psutil.Process(process.pid)
        seen.update(listening([running, *running.children(recursive=True)]))
        if shown:
            process.send_signal(signal.SIGTERM)
            process.wait(90)
        return process.poll() is not None

    try:
        wait_for(ended, 900, "the end")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, log.read_text()[-4000:]
    assert len(seen) > 3
    assert not beyond_this_machine(seen)
    if page:
        assert ("127.0.0.1", int(page[1])) in seen
