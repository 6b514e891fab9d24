"""A machine that the cluster takes away: a checkpoint at the next step, and the run goes on from it on what is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import QUICK, losses, run, run_directory, start, wait_for
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.slow

STEPS = 40
#: Seconds that Ray gives the node.
NOTICE = 15


def command(model: str, output: Path, workers: str) -> list[str]:
    """No dropout: its random numbers differ with the number of workers. No checkpoint of the schedule is near."""
    return [
        "sft", "--model", model, "--dataset", "identity", "--model_name", "swift-robot", "--model_author", "swift",
        "--num_workers", workers, "--use_gpu", "false", "--max_steps", str(STEPS), "--save_steps", "1000",
        "--learning_rate", "1e-3", "--split_dataset_ratio", "0", "--torch_dtype", "float32", "--lora_dropout", "0",
        "--output_dir", str(output), *QUICK,
    ]  # fmt: skip


def test_a_drained_node_costs_the_steps_behind_its_notice(smollm2_dir: str, tmp_path: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    driver = None
    try:
        second = cluster.add_node(num_cpus=1)
        output, log = tmp_path / "out", tmp_path / "log"
        words = command(smollm2_dir, output, "1,2")
        driver = start(*words, "--address", cluster.address, log=log, RAY_USAGE_STATS_ENABLED="0")
        wait_for(lambda: any(output.glob("v*")) and len(losses(run_directory(output))) >= 3, 400, "step 3")
        drain = [
            str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address,
            "--node-id", second.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "reclaimed",
            "--deadline-remaining-seconds", str(NOTICE),
        ]  # fmt: skip
        subprocess.run(drain, check=True, capture_output=True)
        saved = wait_for(lambda: [*output.glob("v*/checkpoint-*/manifest.json")], NOTICE, "a checkpoint")
        (name,) = {path.parent.name for path in saved}
        assert driver.wait(400) == 0, log.read_text()[-4000:]
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
        cluster.shutdown()
    printed, step = log.read_text(), int(name.removeprefix("checkpoint-"))
    assert 3 <= step < STEPS
    assert f"training goes on from step {step}" in printed
    assert "Traceback" not in printed

    alone = command(smollm2_dir, tmp_path / "alone", "1")
    run(*alone, "--gradient_accumulation_steps", "2", log=tmp_path / "alone.log")
    found, expected = (losses(run_directory(folder)) for folder in (output, tmp_path / "alone"))
    assert list(found) == list(range(1, STEPS + 1))
    assert found == pytest.approx(expected, rel=1e-4)
