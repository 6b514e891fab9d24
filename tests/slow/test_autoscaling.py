"""Nodes that come when a job asks for them and go when it has ended: Ray's autoscaler, with fake machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import QUICK, losses, run_directory, wait_for
from namespaces import Nodes, nodes

pytestmark = pytest.mark.slow

#: Prints seconds and the number of nodes beside the head, whenever that changes.
WATCH = """
import json, ray, time
ray.init(address="auto", logging_level="error", log_to_driver=False)
began, last = time.monotonic(), None
while True:
    now = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())
    if now != last:
        print(json.dumps([round(time.monotonic() - began, 1), now]), flush=True)
        last = now
    time.sleep(0.5)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_dir: str) -> Iterator[Nodes]:
    """A head without CPUs and without any other node; two of two CPUs may be started."""
    with nodes(tmp_path_factory.mktemp("scaling"), Path(tiny_dir)) as found:
        found.add_autoscaling_head({"worker": {"resources": {"CPU": 2}, "max_workers": 2}})
        yield found


def test_training_starts_the_nodes_that_it_needs_and_they_go_when_it_has_ended(cluster: Nodes, tiny_dir: str) -> None:
    head, watched, log = cluster.nodes["head"], cluster.folder / "watched", cluster.folder / "sft.log"
    head.start(sys.executable, "-c", WATCH, log=watched)
    wait_for(lambda: watched.exists() and watched.read_text(), 120, "a look at the nodes")
    command = [
        sys.executable, "-m", "rayswift", "sft", "--model", tiny_dir, "--dataset", "identity", "--model_name", "robot",
        "--model_author", "us", "--max_steps", "4", "--split_dataset_ratio", "0", *QUICK, "--address", "auto",
        "--output_dir", str(cluster.folder / "out"),
    ]  # fmt: skip

    too_many = head.start(*command, "--num_nodes", "3", log=cluster.folder / "refused.log")
    assert too_many.wait(200) == 2
    refused = (cluster.folder / "refused.log").read_text()
    assert "--num_nodes 3: a worker needs 1 CPU, which at most 2 node(s) can give; use --num_nodes 2 or less" in refused
    assert "Traceback" not in refused

    driver = head.start(*command, "--num_nodes", "2", log=log)
    assert driver.wait(400) == 0, log.read_text()[-4000:]
    assert len(losses(run_directory(cluster.folder / "out"))) == 4
    assert "; the autoscaler starts " in log.read_text()

    def counts() -> list[int]:
        return [json.loads(line)[1] for line in watched.read_text().splitlines()]

    wait_for(lambda: counts()[-1] == 0, 200, "the end of idle nodes")
    print(watched.read_text())
    assert counts()[0] == 0
    assert max(counts()) == 2
