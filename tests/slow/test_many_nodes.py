"""Pretraining from a stream on nodes that share no more than a folder: who does what, and what a lost node changes."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import losses, run, run_directory, wait_for
from namespaces import Node, Nodes, nodes

pytestmark = pytest.mark.slow

STEPS = 30
DATA_NODE = ("--num-cpus", "1", "--labels", "ray-subcluster=data")
TEXTS = Path(__file__).resolve().parents[1] / "data/pretrain_en.jsonl.gz"
HOSTS = """
hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
from ray.util.state import list_actors, list_tasks
"""
#: Where actors and the tasks that read are, or were.
ACTORS = (
    HOSTS
    + """
print(json.dumps([[actor.class_name, actor.state, hosts.get(actor.node_id)] for actor in list_actors(limit=1000)]))
"""
)
TASKS = (
    HOSTS
    + """
reading = [task for task in list_tasks(limit=9000) if task.name == "MapBatches(read)"]
print(json.dumps([[hosts.get(task.node_id), task.state] for task in reading]))
"""
)


@pytest.fixture(scope="module")
def shared(tiny_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all nodes reach: two data sets, the results, the model."""
    folder = tmp_path_factory.mktemp("shared")
    lines = gzip.decompress(TEXTS.read_bytes()).decode().splitlines()
    for number in range(2):
        (folder / f"part{number}.jsonl").write_text("\n".join(lines[number::2]) + "\n")
    return folder


@pytest.fixture(scope="module")
def command(shared: Path, tiny_dir: str) -> list[str]:
    """Two streams, two workers, two packs a worker in each step; all that a run's numbers depend on."""
    data = [str(shared / f"part{number}.jsonl") for number in range(2)]
    return [
        "pt", "--model", tiny_dir, "--train_type", "full", "--dataset", *data, "--streaming", "true",
        "--interleave_prob", "0.5", "0.5", "--packing", "true", "--max_length", "64", "--truncation_strategy", "split",
        "--max_steps", str(STEPS), "--save_steps", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "1",
        "--learning_rate", "1e-3", "--torch_dtype", "float32", "--gradient_checkpointing", "false",
        "--report_to", "none", "--num_workers", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(shared: Path, tiny_dir: str) -> Iterator[Nodes]:
    """A head without CPUs, a node for data, two that train and one more."""
    with nodes(shared, Path(tiny_dir)) as found:
        found.add("head", "--num-cpus", "0")
        found.add("data1", *DATA_NODE, wait=False)
        for name in ("train1", "train2", "train3"):
            found.add(name, "--num-cpus", "1", wait=False)
        for node in found.nodes.values():
            found.wait_for_ray(node)
        yield found


@pytest.fixture(scope="module")
def on_one_node(command: list[str], shared: Path) -> dict[int, float]:
    """The losses of the same run on a Ray of this process."""
    run(*command, "--output_dir", str(shared / "alone"), log=shared / "alone.log")
    found = losses(run_directory(shared / "alone"))
    assert list(found) == list(range(1, STEPS + 1))
    assert found[STEPS] < found[1]
    return found


def start(cluster: Nodes, name: str, command: list[str]) -> tuple[subprocess.Popen[bytes], Path]:
    """A run on the cluster, driven from its head."""
    flags = ["--address", "auto", "--output_dir", str(cluster.folder / name)]
    log = cluster.folder / f"{name}.log"
    return cluster.nodes["head"].start(sys.executable, "-m", "rayswift", *command, *flags, log=log), log


def actors(cluster: Nodes, name: str, state: str) -> list[str]:
    """The hosts of a class's actors that are in a state."""
    found = cluster.nodes["head"].ask(ACTORS)
    return [host for one, now, host in found if one == name and now == state]


def step_of(output: Path) -> int:
    """The last step in the log of the run below a folder."""
    found = list(output.glob("v*-*"))
    return max(losses(found[0]), default=0) if found else 0


def ended_as(alone: dict[int, float], driver: Any, log: Path) -> None:
    """The run ends with the losses of one node: each step once, on the same rows."""
    assert driver.wait(900) == 0, log.read_text()[-4000:]
    assert losses(run_directory(log.with_suffix(""))) == pytest.approx(alone, rel=1e-5)


def test_data_nodes_read_and_training_nodes_train(
    cluster: Nodes, command: list[str], on_one_node: dict[int, float]
) -> None:
    driver, log = start(cluster, "undisturbed", [*command, "--num_nodes", "2"])
    ended_as(on_one_node, driver, log)
    assert "workers: 2 on CPU, STRICT_SPREAD, ray-subcluster=!data" in log.read_text()
    workers = actors(cluster, "RayTrainWorker", "DEAD")
    assert len(workers) == len(set(workers)) == 2
    assert all(host.startswith("train") for host in workers)
    assert set(actors(cluster, "StreamReader", "DEAD")) <= set(workers)
    read = cluster.nodes["head"].ask(TASKS)
    assert len(read) >= 2
    assert {host for host, _ in read} == {"data1"}


def lose(cluster: Nodes, name: str, command: list[str]) -> tuple[Any, Path, Node]:
    """A run that has a checkpoint, and one of the nodes that it trains on, not its first worker's."""
    driver, log = start(cluster, name, command)
    output = log.with_suffix("")
    wait_for(lambda: step_of(output) >= 1 or driver.poll() is not None, 900, "step 1")
    hosts = actors(cluster, "RayTrainWorker", "ALIVE")
    wait_for(
        lambda: any(output.glob("v*/checkpoint-*/manifest.json")) or driver.poll() is not None, 200, "a checkpoint"
    )
    assert driver.poll() is None, log.read_text()[-4000:]
    return driver, log, cluster.nodes[hosts[-1]]


def test_a_node_that_is_switched_off_is_replaced_and_no_row_is_trained_twice(
    cluster: Nodes, command: list[str], on_one_node: dict[int, float]
) -> None:
    driver, log, node = lose(cluster, "switched_off", [*command, "--num_nodes", "2"])
    node.kill()
    ended_as(on_one_node, driver, log)
    assert "training goes on from step" in log.read_text()


def test_a_node_that_is_cut_off_for_half_a_minute_trains_nothing_twice(
    cluster: Nodes, command: list[str], on_one_node: dict[int, float]
) -> None:
    cluster.add("train4", "--num-cpus", "1")
    driver, log, node = lose(cluster, "cut_off", [*command, "--num_nodes", "2"])
    node.cut()
    with pytest.raises(subprocess.TimeoutExpired):
        driver.wait(30)
    node.join()
    ended_as(on_one_node, driver, log)


def test_a_data_node_that_is_switched_off_while_it_reads_stops_no_training(
    cluster: Nodes, command: list[str], on_one_node: dict[int, float]
) -> None:
    cluster.add("data2", *DATA_NODE)
    driver, log = start(cluster, "without_data_node", command)

    def reads() -> list[str]:
        assert driver.poll() is None, log.read_text()[-4000:]
        return [host for host, state in cluster.nodes["head"].ask(TASKS) if state == "RUNNING"]

    host = wait_for(reads, 300, "reading")[0]
    assert step_of(log.with_suffix("")) == 0
    cluster.nodes[host].kill()
    ended_as(on_one_node, driver, log)
    assert {where for where, state in cluster.nodes["head"].ask(TASKS) if state == "FINISHED"} >= {"data1", "data2"} - {
        host
    }
