"""The head of a cluster is lost and comes back with Ray's state on a volume (RocksDB): what is served goes on, and the
command that trained goes on when it is run again."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import QUICK, losses, run_directory, wait_for
from load import ask_on, asked
from namespaces import Node, Nodes, nodes, send

pytestmark = pytest.mark.slow

STEPS, PORT = 40, 8000
SERVED = """
from ray import serve
apps = serve.status().applications
print(json.dumps({name: str(app.status).rpartition(".")[2] for name, app in apps.items()}))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_dir: str) -> Iterator[Nodes]:
    """A head whose state is on a volume that outlives it, and a node that works."""
    with nodes(tmp_path_factory.mktemp("head"), Path(tiny_dir)) as found:
        add_head(found)
        found.add("worker", "--num-cpus", "3", RAY_gcs_rpc_server_reconnect_timeout_s="600")
        yield found


def add_head(cluster: Nodes) -> Node:
    volume = str(cluster.folder / "gcs")
    return cluster.add("head", "--num-cpus", "0", RAY_gcs_storage="rocksdb", RAY_gcs_storage_path=volume)


def test_what_is_served_answers_while_the_head_is_gone_and_a_retried_command_trains_on(
    cluster: Nodes, tiny_dir: str
) -> None:
    head, worker, folder = cluster.nodes["head"], cluster.nodes["worker"], cluster.folder
    rayswift = [sys.executable, "-m", "rayswift"]
    deploy = [
        *rayswift, "deploy", "--model", tiny_dir, "--infer_backend", "pt", "--served_model_name", "tiny", "--host",
        "0.0.0.0", "--port", str(PORT), "--address", "auto", "--use_gpu", "false", "--max_ongoing_requests", "1",
        "--max_queued_requests", "20",
    ]  # fmt: skip
    served = worker.start(*deploy, log=folder / "deploy.log")
    wait_for(
        lambda: "ready: http" in (folder / "deploy.log").read_text() or served.poll() is not None, 300, "a deployment"
    )
    assert served.poll() is None, (folder / "deploy.log").read_text()[-4000:]
    load = folder / "load"
    for _ in range(3):  # more than run at a time: some have to wait
        ask_on(worker, PORT, load)

    train = [
        *rayswift, "sft", "--model", tiny_dir, "--dataset", "identity", "--model_name", "robot", "--model_author", "us",
        "--max_steps", str(STEPS), "--save_steps", "2", "--split_dataset_ratio", "0", *QUICK, "--address", "auto",
        "--output_dir", str(folder / "out"), "--resume_from_checkpoint", "auto",
    ]  # fmt: skip
    first = head.start(*train, log=folder / "first.log")
    wait_for(
        lambda: list(folder.glob("out/v*/checkpoint-4/manifest.json")) or first.poll() is not None, 300, "a checkpoint"
    )
    assert first.poll() is None, (folder / "first.log").read_text()[-4000:]
    before = asked(load)
    assert before and {status for _, status, _ in before} == {200}

    lost = time.time()
    head.kill()
    first.wait(30)
    time.sleep(15)
    during = asked(load, lost)
    print("without a head:", len(during), "answers,", max(seconds for *_, seconds in during), "s at most")
    assert {status for _, status, _ in during} == {200}

    head = add_head(cluster)
    back = time.time()
    print(f"the head is back after {back - lost:.1f} s")
    second = head.start(*train, log=folder / "second.log")
    assert second.wait(400) == 0, (folder / "second.log").read_text()[-4000:]
    trained = losses(run_directory(folder / "out"))
    assert list(trained) == list(range(1, STEPS + 1))
    said = (folder / "second.log").read_text()
    assert "training goes on from step" in said
    assert "dead: 10.77.0.1" not in said  # the head that is back
    wait_for(lambda: set(head.ask(SERVED).values()) == {"RUNNING"}, 100, "Serve")
    since = asked(load, lost)
    print("answers:", len(since), "slowest:", sorted(seconds for *_, seconds in since)[-3:])
    assert {status for _, status, _ in since} == {200}
    ask_on(head, PORT, folder / "at_head")
    wait_for(lambda: any(status == 200 for _, status, _ in asked(folder / "at_head")), 100, "the head's gateway")

    assert served.poll() is None, (folder / "deploy.log").read_text()[-4000:]
    send(served, signal.SIGTERM)
    assert served.wait(100) == 0
