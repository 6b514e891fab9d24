"""A head as `ray start` starts one, with a run and a deployment: what status, logs, stop, doctor and Prometheus say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_head import GCS, Head, ray_head

REPOSITORY = Path(__file__).resolve().parents[2]
PORT = 8719


def rayswift(head: Head, *words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rayswift", *words], capture_output=True, text=True, timeout=300, env=head.environment
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_cluster_says_what_it_does(tiny_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it would end workers for what others of the machine use
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "yes"}]} for n in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with ray_head(num_cpus=3, log=tmp_path / "ray.log") as head:
        at = ["--address", head.address]
        train = f"sft --model {tiny_dir} --dataset {tmp_path}/rows.jsonl --output_dir {tmp_path}/out --max_steps 6"
        rayswift(
            head, "submit", *at, "--working_dir", "none", *train.split(), "--logging_steps", "1", "--save_steps", "3"
        )
        serve = f"deploy --model {tiny_dir} --infer_backend transformers --port {PORT} --served_model_name tiny"
        rayswift(head, "submit", *at, "--no_wait", "--working_dir", "none", *serve.split())
        [trained, served] = json.loads(rayswift(head, "jobs", *at, "--json"))
        assert (trained["status"], trained["exit_code"]) == ("succeeded", 0)

        deadline = time.monotonic() + 200
        while "ready: http" not in rayswift(head, "logs", *at):
            is_running = json.loads(rayswift(head, "jobs", *at, "--json"))[-1]["status"] in ("pending", "running")
            assert is_running and time.monotonic() < deadline, rayswift(head, "logs", *at)
            time.sleep(2)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}
        assert httpx.post(f"http://127.0.0.1:{PORT}/v1/chat/completions", json=body, timeout=100).is_success
        time.sleep(12)  # the gateway's next look, and Ray's next report of meters

        state = json.loads(rayswift(head, "status", *at, "--json"))
        [run] = state["runs"]
        assert (run["state"], run["step"], run["checkpoint"], run["job"]) == ("finished", 6, 6, trained["id"])
        assert [row["step"] for row in run["rows"] if "loss" in row] == [1, 2, 3, 4, 5, 6]
        assert all(0 <= row["data_wait"] <= 1 for row in run["rows"] if "loss" in row)
        [deployment] = state["deployments"]
        assert (deployment["status"], deployment["gateways"], deployment["requests"]) == ("running", 1, 1)
        assert [(model["name"], model["replicas"]) for model in deployment["models"]] == [("tiny", 1)]

        exported = set(re.findall(r"^(ray_rayswift_\w+)\{", head.metrics(), re.MULTILINE))
        assert exported >= {"ray_rayswift_serve_requests_total", "ray_rayswift_serve_generated_tokens_total",
                            "ray_rayswift_serve_leases_total", "ray_rayswift_serve_waiting_requests"}  # fmt: skip
        asked: set[str] = set()
        for path in (REPOSITORY / "cluster" / "grafana").glob("*.json"):
            asked |= set(re.findall(r"\bray_rayswift_\w+", path.read_text(encoding="utf-8")))
        assert exported <= asked

        found: dict[str, Any] = json.loads(rayswift(
            head, "doctor", "--address", GCS, "--quick", "--json",
            "--storage_path", f"{tmp_path}/out",
        ))  # fmt: skip
        assert found["ok"]
        assert {one["check"] for one in found["findings"]} >= {"versions", "storage", "clocks", "disk", "accelerators"}
        wrong = rayswift(head, "doctor", "--address", GCS, "--quick", *train.split(), "--num_workers", "9", status=1)
        assert "--num_workers 9 needs 9 CPUs" in wrong
        assert "use --num_workers 3 or less" in wrong

        assert "stopped" in rayswift(head, "stop", *at, served["id"])
        assert "4 jobs" in rayswift(head, "status", *at)  # the two that were submitted, and doctor's drivers
