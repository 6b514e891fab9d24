"""Pre-training from a stream: ZeRO-2, ZeRO-3 and no DeepSpeed give the same losses; the same through a Ray job."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from command_line import QUICK, losses, run, run_directory, wait_for

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 10
SETTINGS = [
    "--dataset", str(REPOSITORY / "tests/data/pretrain_en.jsonl.gz"), "--streaming", "true", "--train_type", "full",
    "--num_workers", "2", "--max_steps", str(STEPS), "--truncation_strategy", "split", "--save_strategy", "no",
    "--learning_rate", "1e-4", *QUICK,
]  # fmt: skip


@pytest.fixture(scope="module")
def without_deepspeed(smollm2_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of plain data parallel training."""
    folder = tmp_path_factory.mktemp("plain")
    run("pt", "--model", smollm2_dir, *SETTINGS, "--output_dir", str(folder / "out"), log=folder / "log")
    found = losses(run_directory(folder / "out"))
    assert list(found) == list(range(1, STEPS + 1))
    first, last = sum(found[step] for step in (1, 2, 3)), sum(found[step] for step in (STEPS - 2, STEPS - 1, STEPS))
    assert last < first
    return found


@pytest.mark.parametrize("preset", ["zero2", "zero3"])
def test_zero_gives_the_losses_of_plain_data_parallel_training(
    preset: str, smollm2_dir: str, without_deepspeed: dict[int, float], tmp_path: Path
) -> None:
    run(
        "pt", "--model", smollm2_dir, *SETTINGS, "--deepspeed", preset, "--output_dir", str(tmp_path / "out"),
        log=tmp_path / "log",
    )  # fmt: skip
    assert losses(run_directory(tmp_path / "out")) == pytest.approx(without_deepspeed, rel=0.01)


def test_the_pretraining_job_runs_through_ray_job_submit_on_a_started_cluster(
    smollm2_dir: str, without_deepspeed: dict[int, float], tmp_path: Path
) -> None:
    ray, environment = str(Path(sys.executable).with_name("ray")), {**os.environ, "RAY_AUTH_MODE": "disabled"}
    # Ray's socket paths must be short.
    temporary = tempfile.mkdtemp(prefix="r-", dir="/tmp")
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--port=26379", "--dashboard-port=28265", f"--temp-dir={temporary}",
         "--num-cpus=2", "--disable-usage-stats"],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    submit = [ray, "job", "submit", "--address", "http://127.0.0.1:28265", "--"]
    job = [sys.executable, str(REPOSITORY / "jobs/pt_qwen7b.py"), "--model", smollm2_dir, *SETTINGS]
    try:
        wait_for(lambda: _listens(28265), 120, "the head's dashboard")
        # The dashboard answers before the agent that runs jobs is there.
        wait_for(lambda: _agent_ready(environment, submit), 120, "the head's job agent")
        subprocess.run(
            [*submit, *job, "--output_dir", str(tmp_path / "out")],
            check=True, env=environment, timeout=540, cwd=tmp_path,
        )  # fmt: skip
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(60)
        shutil.rmtree(temporary, ignore_errors=True)
    assert losses(run_directory(tmp_path / "out")) == pytest.approx(without_deepspeed, rel=0.01)


def _agent_ready(environment: dict[str, str], submit: list[str]) -> bool:
    return subprocess.run([*submit, "true"], env=environment, timeout=120, capture_output=True).returncode == 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
