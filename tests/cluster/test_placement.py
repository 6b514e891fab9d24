"""Which nodes take what, and what none of them can ever give."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

import pytest

from rayswift.arguments import Arguments, make_arguments
from rayswift.cluster import Cluster, Workers, plan_workers, waiting
from rayswift.cluster.placement import NodeKind, data_selector, engine_selector, train_selector
from rayswift.data.flow import stream
from rayswift.errors import UserError
from rayswift.generate.model_spec import ModelSpec, check_nodes

HEAD = NodeKind({}, {})
A100 = NodeKind({"CPU": 96, "GPU": 8}, {"ray.io/accelerator-type": "A100-80G"}, 2)
T4 = NodeKind({"CPU": 8, "GPU": 4}, {"ray.io/accelerator-type": "T4", "zone": "a"})
DATA = NodeKind({"CPU": 32}, {"ray-subcluster": "data"}, 4)
LABELLED = NodeKind({"CPU": 4}, {"ray-subcluster": "train"}, 2)
PLAIN = NodeKind({"CPU": 1}, {}, 2)
UNKNOWN = NodeKind({"CPU": 4, "GPU": 4}, None, 2)


def arguments(**given: Any) -> Arguments:
    return make_arguments("pt", model="org/model", dataset=["x"], **given)


def of(*kinds: NodeKind) -> Cluster:
    """A cluster of these nodes."""
    sums = [sum(kind.resources.get(name, 0) * kind.count for kind in kinds) for name in ("CPU", "GPU")]
    most = int(max(kind.resources.get("GPU", 0) for kind in kinds))
    return Cluster(False, *sums, nodes=sum(kind.count for kind in kinds), gpus_per_node=most, kinds=kinds)


@pytest.mark.parametrize(
    ("labels", "wanted", "takes"),
    [({"a": "x"}, "x", True), ({"a": "y"}, "x", False), ({}, "x", False), ({"a": "x"}, "!x", False), ({}, "!x", True),
     ({"a": "y"}, "in(x, y)", True), ({"a": "z"}, "in(x,y)", False), ({}, "!in(x,y)", True),
     ({"a": "y"}, "!in(x,y)", False), (None, "x", True)],
)  # fmt: skip
def test_a_selector_means_what_ray_takes_it_for(labels: dict[str, str] | None, wanted: str, takes: bool) -> None:
    assert NodeKind({}, labels).takes({"a": wanted}) == takes


@pytest.mark.parametrize(
    ("kinds", "read", "generate", "train"),
    [
        ([HEAD, PLAIN], {}, {}, {}),
        ([HEAD, PLAIN, DATA], {"ray-subcluster": "data"}, {}, {"ray-subcluster": "!data"}),
        ([DATA, LABELLED], {"ray-subcluster": "data"}, {"ray-subcluster": "train"}, {"ray-subcluster": "!data"}),
        ([HEAD, LABELLED], {"ray-subcluster": "train"}, {"ray-subcluster": "train"}, {}),
        ([HEAD, DATA], {"ray-subcluster": "data"}, {"ray-subcluster": "data"}, {}),
        ([HEAD, UNKNOWN], {}, {}, {"ray-subcluster": "!data"}),
    ],
)
def test_data_nodes_read_and_encode_and_the_others_train(
    kinds: list[NodeKind], read: dict[str, str], generate: dict[str, str], train: dict[str, str]
) -> None:
    """The head has no CPUs: it decides nothing. Where every node carries the label, Ray Data is told one value."""
    assert data_selector(kinds) == read
    assert engine_selector(kinds) == generate
    assert train_selector(kinds, {}) == train
    assert train_selector(kinds, {"zone": "a"})["zone"] == "a"


@pytest.mark.parametrize(
    ("kinds", "given", "share"),
    [
        ([HEAD, PLAIN], {"num_workers": 2}, 0.5),  # room for reading
        ([HEAD, PLAIN, DATA], {"num_workers": 2}, 1.0),  # which others do
        ([HEAD, NodeKind({"CPU": 4, "GPU": 8}, {}, 2), DATA], {"num_workers": 16}, 0.5),  # 8 to a node
        ([HEAD, T4, A100], {"num_workers": 4, "node_labels": {"zone": "a"}}, 1.0),
    ],
)
def test_what_a_worker_asks_of_the_cpus(kinds: list[NodeKind], given: dict[str, Any], share: float) -> None:
    assert plan_workers(arguments(**given), of(*kinds)).resources_per_worker["CPU"] == share


def test_labels_reach_the_worker_group() -> None:
    labels = "ray.io/accelerator-type=A100-80G"
    found = plan_workers(arguments(num_workers=16, node_labels=labels), of(HEAD, A100, T4, DATA))
    assert found.selector == {"ray-subcluster": "!data", "ray.io/accelerator-type": "A100-80G"}
    assert found.describe() == ("16 workers of 1 CPU, 1 GPU (ray-subcluster=!data, ray.io/accelerator-type=A100-80G)")


@pytest.mark.parametrize(
    ("kinds", "given", "expected"),
    [
        ([HEAD, A100, T4], {"node_labels": "ray.io/accelerator-type=H100"},
         "--node_labels ray.io/accelerator-type=H100: no node here, and none that the autoscaler can start, has them; "
         "there is ray.io/accelerator-type=A100-80G, ray.io/accelerator-type=T4"),
        ([HEAD, A100, T4], {"node_labels": "ray.io/accelerator-type=T4", "num_workers": 5},
         "--num_workers 5: the nodes have room for 4 workers of 1 CPU, 1 GPU; use --num_workers 4 or less"),
        ([HEAD, A100, T4], {"resources_per_worker": {"GPU": 9}, "num_workers": 1},
         "--resources_per_worker: no node here, and none that the autoscaler can start, has 1 CPU, 9 GPU for one "
         "worker; lower it"),
        ([HEAD, A100, T4], {"resources_per_worker": {"FPGA": 1}, "num_workers": 1},
         "has 1 CPU, 1 FPGA, 1 GPU for one worker; lower it"),
        ([HEAD, PLAIN, DATA], {"num_nodes": 3},
         "--num_nodes 3: a worker needs 0.66 CPU, which at most 2 node(s) can give; use --num_nodes 2 or less"),
        ([HEAD, A100], {"num_workers": 3, "placement_strategy": "STRICT_SPREAD"},
         "--num_workers 3: the nodes have room for 2 workers of 1 CPU, 1 GPU, one on each node; use --num_workers 2 or "
         "less"),
        ([HEAD, LABELLED, DATA], {"num_workers": "1,2"},
         "--num_workers MIN,MAX: Ray reckons only with nodes without the label ray-subcluster, and those that could "
         "train carry it; start them without it, or give one number"),
        ([HEAD, PLAIN], {"num_workers": 2, "resources_per_worker": {"CPU": 1}, "streaming": True, "max_steps": 1},
         "--resources_per_worker: the workers would have all CPUs, and --streaming true reads beside them: lower CPU, "
         "for example '{\"CPU\": 0.9}'"),
    ],
)  # fmt: skip
def test_what_no_node_can_ever_give_is_refused(kinds: list[NodeKind], given: dict[str, Any], expected: str) -> None:
    """In one line, though all nodes together have it."""
    with pytest.raises(UserError) as caught:
        plan_workers(arguments(**given), of(*kinds))
    assert str(caught.value).endswith(expected)


def test_what_the_autoscaler_may_start_is_waited_for() -> None:
    """Its labels are not known before one of the type runs."""
    found = plan_workers(arguments(num_workers=8, node_labels={"zone": "a"}), of(HEAD, UNKNOWN))
    assert (found.largest, found.resources_per_worker["GPU"]) == (8, 1)


@pytest.mark.parametrize(
    ("parallel", "kinds", "refused"),
    [({"tensor_parallel_size": 8}, [HEAD, A100], ""), ({"tensor_parallel_size": 8}, [HEAD, T4, UNKNOWN],
     "lower --vllm_tensor_parallel_size; --vllm_pipeline_parallel_size spreads a model over nodes"),
     ({"pipeline_parallel_size": 8}, [HEAD, T4, UNKNOWN], "")],
)  # fmt: skip
def test_a_tensor_parallel_group_is_on_one_node(parallel: dict[str, int], kinds: list[NodeKind], refused: str) -> None:
    spec = ModelSpec("m", ".", "vllm", use_gpu=True, engine_kwargs=parallel, bundles=[{"GPU": 1.0, "CPU": 1.0}] * 8)
    assert spec.placement_strategy == ("STRICT_PACK" if "tensor_parallel_size" in parallel else "PACK")
    if not refused:
        check_nodes(spec, of(*kinds))
        return
    with pytest.raises(UserError, match=f"m: an engine needs 8 GPU, 8 CPU on one node.*{refused}"):
        check_nodes(spec, of(*kinds))


def test_replicas_and_engines_carry_the_labels() -> None:
    from rayswift.serve.application import build_model

    spec = ModelSpec("m", ".", "vllm", bundles=[{"CPU": 1.0}] * 2, node_labels={"zone": "a"})
    deployment = build_model(spec.to_dict())._bound_deployment
    options = deployment._replica_config
    assert options.placement_group_bundle_label_selector == [{"zone": "a"}] * 2
    assert options.placement_group_strategy == "STRICT_PACK"
    with pytest.raises(UserError, match="--node_labels zone=a: no node here"):
        check_nodes(spec, of(HEAD, A100))


# --- waiting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "starting", "expected"),
    [([], {}, "without an autoscaler: a node has to join, or another job to end"),
     ([("gpu", {}, 4)], {}, "the autoscaler starts none"),
     ([("gpu", {}, 4)], {"gpu": 2, "cpu": 1}, "the autoscaler starts 1 cpu, 2 gpu")],
)  # fmt: skip
def test_a_waiting_run_says_what_is_there(
    monkeypatch: pytest.MonkeyPatch, types: list[Any], starting: dict[str, int], expected: str
) -> None:
    nodes = [NodeKind({"CPU": 4}, {"ray.io/node-id": str(number)}) for number in range(3)]
    nodes.append(NodeKind({"CPU": 4}, {"ray.io/node-id": "data", "ray-subcluster": "data"}))
    free = {"0": {"CPU": 3.0}, "1": {}, "2": {"CPU": 0.5}, "data": {"CPU": 4.0}}
    known = SimpleNamespace(free_resources=lambda: free, starting_nodes=lambda: starting,
                            autoscaler_types=lambda: types)  # fmt: skip
    monkeypatch.setattr(waiting, "private", known)
    monkeypatch.setattr(waiting, "node_kinds", lambda: nodes)
    workers = Workers(4, False, {"CPU": 1.0}, "SPREAD", {"ray-subcluster": "!data"})
    found = waiting.waiting_line(workers.describe(), workers.resources_per_worker, workers.selector)
    line = "waiting for 4 workers of 1 CPU (SPREAD, ray-subcluster=!data): now there is room for 3 on 3 node(s); "
    assert found == line + expected


@pytest.mark.parametrize(
    ("num_workers", "looks", "lines"),
    [(1, [[True]], 0), (1, [[False]], 1), (1, [[False], [True, False], [True]], 2), (1, [[], []], 0),
     ((1, 2), [[], []], 1), ((1, 2), [[], [True]], 0)],
)  # fmt: skip
def test_a_run_waits_while_its_group_has_no_place(
    monkeypatch: pytest.MonkeyPatch, num_workers: Any, looks: list[list[bool]], lines: int
) -> None:
    """An elastic group is not asked for before there is room: without any, the second look is believed."""
    said: list[str] = []
    steps = iter(looks)
    monkeypatch.setattr(waiting, "private", SimpleNamespace(own_groups=lambda: next(steps)))
    monkeypatch.setattr(waiting, "waiting_line", lambda *_: "waiting")
    ends = iter([*([False] * len(looks)), True])
    done: Any = SimpleNamespace(wait=lambda _: next(ends))
    waiting._look(Workers(num_workers, False, {}), done, said.append)
    assert len(said) == lines


@pytest.mark.parametrize("runs_already", [True, False])
def test_a_task_that_no_node_can_take_yet_is_waited_for_aloud(
    monkeypatch: pytest.MonkeyPatch, runs_already: bool
) -> None:
    """One that runs long says nothing. The places of the other workers are asked for while there is no node, and no
    longer: the task may need one of them."""
    said: list[str] = []
    small, large = (NodeKind({"GPU": gpus}, {"ray.io/node-id": str(gpus)}) for gpus in (0, 8))
    looks = iter([[small, UNKNOWN]] * 3 + [[small, large]] * 2)
    ready = iter([[], [], [], [], ["task"]])
    workers = Workers((3, 4), True, {"GPU": 1}, "STRICT_SPREAD", {"zone": "a"} if runs_already else {})
    monkeypatch.setattr("ray.wait", lambda tasks, timeout: (next(ready), said.append("wait") or tasks))
    monkeypatch.setattr("ray.get", lambda task: f"of {task}")
    monkeypatch.setattr("ray.util.placement_group", lambda *words, **labels: said.append(f"ask {words} {labels}"))
    monkeypatch.setattr("ray.util.remove_placement_group", lambda group: said.append("give up"))
    monkeypatch.setattr(waiting, "node_kinds", lambda: [NodeKind({"GPU": 1}, {"ray.io/node-id": "1", "zone": "a"})]
                        if runs_already else next(looks))  # fmt: skip
    monkeypatch.setattr(waiting, "waiting_line", lambda asked, *_: asked)
    monkeypatch.setattr(waiting, "say", said.append)
    assert waiting.wait_for_task("task", "a node", workers) == "of task"
    if runs_already:
        assert said == ["wait"] * 5
    else:
        asked = "ask ([{'GPU': 1}, {'GPU': 1}], 'STRICT_SPREAD') {'bundle_label_selector': None}"
        assert said == [asked, *["wait", "a node"] * 2, "wait", "give up", "wait", "wait"]


def test_ctrl_c_ends_a_run_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its controller does not answer before it has its nodes."""
    from rayswift.train.start.lean_trainer import LeanTorchTrainer

    asked: list[str] = []
    controller = SimpleNamespace(abort=SimpleNamespace(remote=lambda: asked.append("abort")))
    before = signal.getsignal(signal.SIGINT)
    try:
        LeanTorchTrainer._register_sigint_handler(None, controller)  # type: ignore[arg-type]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert asked == ["abort"]


# --- reading ------------------------------------------------------------------------------------------------------


def test_what_was_lost_with_a_node_is_made_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers wait for it: whoever makes it cannot wait for them to train what is ready."""
    monkeypatch.setattr(stream.StreamReader, "_read", lambda *_: None)
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(current_actor=None))
    packed: Any = SimpleNamespace(unpack=lambda: None)
    reader = stream.StreamReader(None, packed, None, stream.StreamPosition(), 1, 1.0)  # type: ignore[arg-type]
    size = stream.READY_BYTES // 2
    assert not reader.pause(0, 0)
    assert not reader.pause(0, size)
    reader._blocks = {0: (None, size), 1: (None, size)}
    assert reader.pause(0, 2 * size)
    assert reader.pause(0, 2 * size)
    assert not reader.pause(0, 0)  # on another node, from the beginning
    assert not reader.pause(0, size)
    assert reader.pause(0, 2 * size)
    reader.task_ended(0)
    assert reader.pause(1, 1)
    assert not reader.pause(0, 2 * size)  # a task that had ended, again
    reader.task_ended(0)
    assert reader._first_task == 1
    assert not reader._ended
