"""How many workers on what, and what is said when the machine or cluster cannot give it."""

from __future__ import annotations

from typing import Any

import pytest

from rayswift.arguments import Arguments, make_arguments
from rayswift.cluster import Cluster, Workers, check_before_start, plan_workers
from rayswift.cluster import connection as cluster
from rayswift.errors import UserError

LAPTOP = Cluster(embedded=True, cpus=2, gpus=0, nodes=1)
GPU_BOX = Cluster(embedded=True, cpus=96, gpus=8, nodes=1)
CLUSTER = Cluster(embedded=False, cpus=256, gpus=32, nodes=5, gpus_per_node=8)


def arguments(**given: Any) -> Arguments:
    return make_arguments("sft", model="org/model", dataset=["x"], **given)


def refusal(where: Cluster, **given: Any) -> str:
    with pytest.raises(UserError) as caught:
        plan_workers(arguments(**given), where)
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "given", "expected"),
    [
        (LAPTOP, {}, Workers(1, False, {"CPU": 1.0})),
        (LAPTOP, {"num_workers": "2"}, Workers(2, False, {"CPU": 0.5})),
        (GPU_BOX, {}, Workers(8, True, {"GPU": 1, "CPU": 1})),
        (GPU_BOX, {"num_workers": 2}, Workers(2, True, {"GPU": 1, "CPU": 1})),
        (GPU_BOX, {"use_gpu": False, "num_workers": 4}, Workers(4, False, {"CPU": 1.0})),
        (CLUSTER, {}, Workers(1, True, {"GPU": 1, "CPU": 1})),
        (CLUSTER, {"num_nodes": 2}, Workers(16, True, {"GPU": 1, "CPU": 1})),
        (CLUSTER, {"num_workers": "8,32"}, Workers((8, 32), True, {"GPU": 1, "CPU": 1})),
        (CLUSTER, {"num_workers": 64, "resources_per_worker": {"GPU": 0.5}}, Workers(64, True, {"GPU": 0.5, "CPU": 1})),
        (CLUSTER, {"num_workers": 4, "resources_per_worker": {"CPU": 8}}, Workers(4, True, {"GPU": 1, "CPU": 8.0})),
    ],
)
def test_the_worker_group(where: Cluster, given: dict[str, Any], expected: Workers) -> None:
    found = plan_workers(arguments(**given), where)
    assert (found.num_workers, found.use_gpu) == (expected.num_workers, expected.use_gpu)
    assert found.resources_per_worker == pytest.approx(expected.resources_per_worker)


@pytest.mark.parametrize(
    ("given", "strategy"),
    [({"num_workers": 4}, "PACK"), ({"num_workers": 4, "num_nodes": 4}, "STRICT_SPREAD"),
     ({"num_workers": 6, "num_nodes": 3}, "SPREAD"), ({"num_workers": "3,4", "num_nodes": 4}, "SPREAD"),
     ({"num_nodes": 2}, "PACK"), ({"num_nodes": 1}, "PACK"),
     ({"num_workers": 2, "placement_strategy": "SPREAD"}, "SPREAD"),
     ({"num_nodes": 2, "placement_strategy": "STRICT_SPREAD"}, "STRICT_SPREAD")],
)  # fmt: skip
def test_how_workers_lie_on_nodes(given: dict[str, Any], strategy: str) -> None:
    """Over so many nodes as are asked for, beside --num_workers too; nodes that are full of them are few by packing."""
    assert plan_workers(arguments(**given), CLUSTER).strategy == strategy


def test_the_global_batch_is_planned_for_the_largest_group() -> None:
    assert plan_workers(arguments(num_workers="8,32"), CLUSTER).largest == 32
    assert plan_workers(arguments(num_workers="3"), CLUSTER).largest == 3


@pytest.mark.parametrize("gpus", [0, 8])
@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 7, 8, 64])
def test_workers_always_leave_some_cpu_to_ray_data(cpus: int, gpus: int) -> None:
    where = Cluster(embedded=True, cpus=cpus, gpus=gpus, nodes=1)
    for count in range(1, (gpus or cpus) + 1):
        share = plan_workers(arguments(num_workers=count), where).resources_per_worker["CPU"]
        assert 0 < share <= 1
        assert cpus - count * share >= min(1.0, cpus / 2) - 1e-9
        # Ray counts resources in ten-thousandths; train asks for no finer share.
        assert round(share, 4) == pytest.approx(share)


@pytest.mark.parametrize(
    ("where", "given", "expected"),
    [
        (
            LAPTOP,
            {"num_workers": 9},
            "--num_workers 9 needs 9 CPUs and this machine has 2 CPUs and no GPU; use --num_workers 2 or less",
        ),
        (
            GPU_BOX,
            {"num_workers": 9},
            "--num_workers 9 needs 9 GPUs and this machine has 96 CPUs and 8 GPUs; use --num_workers 8 or less",
        ),
        (
            CLUSTER,
            {"num_workers": "33,64"},
            "--num_workers 33 needs 33 GPUs and the cluster (5 nodes) has at most 256 CPUs and 32 GPUs; "
            "use --num_workers 32 or less",
        ),
        (
            CLUSTER,
            {"num_nodes": 5},
            "--num_nodes 5 needs 40 GPUs and the cluster (5 nodes) has at most 256 CPUs and 32 GPUs; use --num_workers "
            "32 or less",
        ),
        (
            LAPTOP,
            {"use_gpu": True},
            "--use_gpu true: this machine has 2 CPUs and no GPU; leave it out, or set --address to a cluster with GPUs",
        ),
        (
            LAPTOP,
            {"num_workers": 2, "resources_per_worker": {"CPU": 2}},
            "--resources_per_worker {'CPU': 2.0} for 2 workers needs 4 CPUs and this machine has 2 CPUs and no GPU; "
            "lower it or --num_workers",
        ),
        (
            LAPTOP,
            {"resources_per_worker": {"GPU": 1}},
            "for 1 workers needs 1 GPUs and this machine has 2 CPUs and no GPU; lower it or --num_workers",
        ),
    ],
)
def test_what_can_never_be_had_is_refused(where: Cluster, given: dict[str, Any], expected: str) -> None:
    message = refusal(where, **given)
    assert message.endswith(expected)
    assert "\n" not in message


def test_too_many_workers_are_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "has_nvidia_driver", lambda: False)
    count = cluster.cpu_count()
    check_before_start(arguments(num_workers=count))
    with pytest.raises(UserError, match=rf"--num_workers {count + 7} needs .* this machine has {count} CPUs"):
        check_before_start(arguments(num_workers=count + 7))
    # Another cluster may have them: that is known only once it is asked.
    check_before_start(arguments(num_workers=count + 7, address="ray://head:10001"))


def test_which_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cluster.address_of(arguments()) is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster.address_of(arguments()) == "10.0.0.1:6379"
    assert cluster.address_of(arguments(address="10.0.0.2:6379")) == "10.0.0.2:6379"


def test_connecting_keeps_a_running_ray(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    node = ray.get_runtime_context().get_node_id()
    found = cluster.connect(arguments())
    assert (found.embedded, found.cpus, found.nodes) == (True, 3, 1)
    assert ray.get_runtime_context().get_node_id() == node
    assert plan_workers(arguments(num_workers=2, use_gpu=False), found).resources_per_worker == {"CPU": 1.0}
    nodes = ray.nodes()
    monkeypatch.setattr("ray.nodes", lambda: nodes * 2)  # of a cluster that a program has connected to
    found = cluster.connect(arguments())
    assert (found.embedded, found.nodes) == (False, 2)
