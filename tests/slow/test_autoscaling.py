"""Nodes that come when work asks for them and go when it has ended: Ray's autoscaler, with fake machines of one CPU.

Each test begins and ends without a node beside the head. The last one draws the timeline of all.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from command_line import QUICK, losses, run_directory, wait_for
from load import ask_on, asked
from namespaces import Node, Nodes, nodes, send

pytestmark = pytest.mark.slow

MOST, PORT = 3, 8000
RAYSWIFT = (sys.executable, "-m", "rayswift")
#: Prints the time and the number of nodes beside the head, whenever that changes.
WATCH = """
import json, ray, time
ray.init(address="auto", logging_level="error", log_to_driver=False)
last = None
while True:
    now = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    if now != last:
        print(json.dumps([round(time.time(), 1), now]), flush=True)
        last = now
    time.sleep(0.5)
"""
#: What a program on a node beside the head knows of the autoscaler.
ASKED_ELSEWHERE = """
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rayswift import private
node = next(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
there = ray.remote(num_cpus=0)(private.autoscaler_limits).options(
    scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
print(json.dumps(ray.get(there.remote())))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_dir: str) -> Iterator[Nodes]:
    """A head without CPUs and without any other node; a few may be started."""
    with nodes(tmp_path_factory.mktemp("scaling"), Path(tiny_dir)) as found:
        head = found.add_autoscaling_head({"spot": {"resources": {"CPU": 1}, "max_workers": MOST}})
        head.start(sys.executable, "-c", WATCH, log=found.folder / "watched")
        wait_for(lambda: changes(found), 120, "a look at the nodes")
        yield found


def changes(cluster: Nodes, since: float = 0) -> list[tuple[float, int]]:
    """When the number of nodes changed, and to what."""
    watched = cluster.folder / "watched"
    lines = [line for line in watched.read_text().splitlines() if line[:1] == "["] if watched.exists() else []
    return [(when, count) for when, count in map(json.loads, lines) if when >= since]


@pytest.fixture(autouse=True)
def _none_before_and_after(cluster: Nodes, request: pytest.FixtureRequest) -> Iterator[None]:
    began = time.time()
    assert changes(cluster)[-1][1] == 0
    yield
    wait_for(lambda: changes(cluster)[-1][1] == 0, 200, "the end of idle nodes")
    steps = ", ".join(f"{when - began:.0f} s: {count}" for when, count in changes(cluster, began))
    print(f"\nnodes in {request.node.name}: {steps}")


def raylets(head: Node) -> dict[str, psutil.Process]:
    """Those of the fake machines, by the machine's name."""
    found, namespace = {}, os.readlink(f"/proc/{head.pid}/ns/pid")
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.readlink(f"/proc/{process.pid}/ns/pid") != namespace:
                continue
            name = process.environ().get("RAY_CLOUD_INSTANCE_ID", "")
            if process.name() == "raylet" and not name.endswith("00000"):
                found[name] = process
    return found


def sft(cluster: Nodes, tiny_dir: str, name: str, *flags: str) -> list[str]:
    return [
        *RAYSWIFT, "sft", "--model", tiny_dir, "--dataset", "identity", "--model_name", "robot", "--model_author", "us",
        "--split_dataset_ratio", "0", *QUICK, "--address", "auto", "--output_dir", str(cluster.folder / name), *flags,
    ]  # fmt: skip


def test_training_starts_its_nodes_and_replaces_one_that_is_taken_away(cluster: Nodes, tiny_dir: str) -> None:
    head, folder, steps = cluster.nodes["head"], cluster.folder, 60
    too_many = head.start(*sft(cluster, tiny_dir, "none", "--num_nodes", "4"), log=folder / "refused.log")
    assert too_many.wait(200) == 2
    refused = (folder / "refused.log").read_text()
    assert "--num_nodes 4 needs 4 CPUs and the cluster (1 nodes) has at most 3 CPUs and no GPU; use" in refused
    assert "Traceback" not in refused

    began, log = time.time(), folder / "sft.log"
    flags = ["--num_nodes", "2", "--max_steps", str(steps), "--save_steps", "2", "--gradient_accumulation_steps", "16"]
    driver = head.start(*sft(cluster, tiny_dir, "out", *flags), log=log)
    checkpoint = "out/v*/checkpoint-4/manifest.json"
    wait_for(lambda: list(folder.glob(checkpoint)) or driver.poll() is not None, 400, "a checkpoint")
    assert driver.poll() is None, log.read_text()[-4000:]
    assert "; the autoscaler starts " in log.read_text()
    assert max(count for _, count in changes(cluster, began)) == 2

    assert head.ask(ASKED_ELSEWHERE)["CPU"] == MOST

    taken = list(raylets(head).values())[-1]
    for process in [*taken.children(recursive=True), taken]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with another one
            process.kill()
    assert driver.wait(400) == 0, log.read_text()[-4000:]
    assert "training goes on from step" in log.read_text()
    assert list(losses(run_directory(folder / "out"))) == list(range(1, steps + 1))


def test_a_burst_of_sampling_starts_engines_on_new_nodes(cluster: Nodes, tiny_dir: str) -> None:
    head, folder, began = cluster.nodes["head"], cluster.folder, time.time()
    prompts = [{"messages": [{"role": "user", "content": f"count to {number}"}]} for number in range(96)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    driver = head.start(
        *RAYSWIFT, "sample", "--model", tiny_dir, "--dataset", str(folder / "prompts.jsonl"), "--sampler_engine", "pt",
        "--num_return_sequences", "2", "--max_new_tokens", "512", "--max_replicas", str(MOST), "--address", "auto",
        "--output_dir", str(folder / "sampled"), "--output_file", "rows.jsonl", log=folder / "sample.log",
    )  # fmt: skip
    assert driver.wait(500) == 0, (folder / "sample.log").read_text()[-4000:]
    rows = (folder / "sampled/rows.jsonl").read_text().splitlines()
    assert len(rows) == 2 * len(prompts)
    assert max(count for _, count in changes(cluster, began)) > 1


def test_nodes_follow_a_step_of_load(cluster: Nodes, tiny_dir: str) -> None:
    head, folder, log = cluster.nodes["head"], cluster.folder, cluster.folder / "deploy.log"
    driver = head.start(
        *RAYSWIFT, "deploy", "--model", tiny_dir, "--infer_backend", "pt", "--served_model_name", "tiny", "--port",
        str(PORT), "--address", "auto", "--use_gpu", "false", "--max_replicas", "2", "--target_ongoing_requests", "2",
        "--upscale_delay", "2", "--downscale_delay", "5", log=log,
    )  # fmt: skip
    wait_for(lambda: "ready: http" in log.read_text() or driver.poll() is not None, 300, "a deployment")
    assert driver.poll() is None, log.read_text()[-4000:]
    assert changes(cluster)[-1][1] == 1
    askers = [ask_on(head, PORT, folder / f"asker{number}", max_tokens=100) for number in range(6)]
    wait_for(lambda: changes(cluster)[-1][1] == 2, 200, "a second node")
    time.sleep(5)
    for asker in askers:
        send(asker, signal.SIGKILL)
        asker.wait(30)
    statuses = [status for number in range(6) for _, status, _ in asked(folder / f"asker{number}")]
    print(len(statuses), "answers during the step")
    assert set(statuses) == {200}
    wait_for(lambda: changes(cluster)[-1][1] == 1, 200, "the end of the second node")
    send(driver, signal.SIGTERM)
    assert driver.wait(100) == 0

    page = folder / "status.html"
    drawn = head.start(
        *RAYSWIFT, "status", "--address", "http://127.0.0.1:8265", "--html", str(page), log=folder / "status.log"
    )
    assert drawn.wait(100) == 0, (folder / "status.log").read_text()
    print("the timeline:", page)
    assert page.read_text().count('<rect class="node"') >= 6
    assert page.read_text().count('<rect class="bad"') == 1  # the one that was taken away
