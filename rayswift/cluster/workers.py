"""Turn ``--num_workers`` and friends into what Ray Train is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rayswift.cluster.connection import Cluster, address_of, cpu_count, has_nvidia_driver
from rayswift.cluster.placement import SUBCLUSTER, NodeKind, others_read, total, train_selector
from rayswift.errors import UserError


@dataclass(frozen=True)
class Workers:
    """The worker group to ask Ray Train for. ``num_workers`` is a count, or (min, max) for an elastic group;
    ``strategy``: how it lies on nodes, Ray's name for it; ``selector``: the labels of the nodes that it may lie on."""

    num_workers: int | tuple[int, int]
    use_gpu: bool
    resources_per_worker: dict[str, float]
    strategy: str = "PACK"
    selector: dict[str, str] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """The most workers the group may grow to: what the global batch is planned for."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def where(self) -> list[str]:
        """Where they may lie, for messages: ``["SPREAD", "ray-subcluster=!data"]``."""
        labels = [f"{key}={value}" for key, value in self.selector.items()]
        return labels if self.strategy == "PACK" else [self.strategy, *labels]

    def describe(self) -> str:
        """For messages: ``2 to 4 workers of 1 CPU, 1 GPU (SPREAD, ray-subcluster=!data)``."""
        count = self.num_workers if isinstance(self.num_workers, int) else " to ".join(map(str, self.num_workers))
        where = f" ({', '.join(self.where)})" if self.where else ""
        return f"{count} workers of {_listed(self.resources_per_worker)}{where}"


def _listed(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()))


def check_before_start(args: Any) -> None:
    """Refuse what this machine can never give, before Ray is even imported (embedded Ray on CPU only)."""
    if address_of(args) or args.resources_per_worker or args.use_gpu or has_nvidia_driver():
        return
    cpus = cpu_count()
    plan_workers(args, Cluster(embedded=True, cpus=cpus, gpus=0, nodes=1, kinds=(NodeKind({"CPU": cpus}, None),)))


def plan_workers(args: Any, cluster: Cluster) -> Workers:
    """How many workers, on what.

    Unset, ``--num_workers`` is one per GPU of ``--num_nodes`` nodes, one per visible GPU on this machine, else 1.
    Where no other nodes read and encode, workers leave room for Ray Data: with every core promised to training, its
    tasks would wait for ever.

    Raises:
        UserError: the cluster can never give what is asked.
    """
    use_gpu = cluster.gpus > 0 if args.use_gpu is None else args.use_gpu
    if use_gpu and not cluster.gpus:
        raise UserError(f"--use_gpu true: {cluster.describe()}; leave it out, or set --address to a cluster with GPUs")
    default = args.num_nodes or 1
    if use_gpu and args.num_nodes:
        default = args.num_nodes * max(cluster.gpus_per_node, 1)
    elif use_gpu and cluster.embedded:
        default = int(cluster.gpus)
    num_workers = args.num_workers or default
    count, largest = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    resources = {key: float(value) for key, value in (args.resources_per_worker or {}).items()}
    unit, available = ("GPU", cluster.gpus) if use_gpu else ("CPU", cluster.cpus)
    if unit not in resources and count > available:
        least = f"; use --num_workers {int(available)} or less" if available >= 1 else ""
        asked = f"--num_workers {count}" if args.num_workers or not args.num_nodes else f"--num_nodes {args.num_nodes}"
        raise UserError(f"{asked} needs {count} {unit}s and {cluster.describe()}{least}")
    if use_gpu:
        resources.setdefault("GPU", 1)
    selector = train_selector(cluster.kinds, args.node_labels)
    kinds = [kind for kind in cluster.kinds if kind.takes(selector)]
    cpus = min(cluster.cpus, total(kinds, "CPU")) if kinds else cluster.cpus
    left_free = 0.0 if others_read(cluster.kinds, selector) else 1.0
    share = min(1.0, int(max(cpus - left_free, cpus / 2) * 100 / largest) / 100)
    strategy = args.placement_strategy or _strategy(args, num_workers, cluster)
    if "CPU" not in resources:
        # Less where nodes have few cores for their GPUs.
        less = [share, *(int(share * 100 / 2**halved) / 100 for halved in range(1, 7))]
        fitting = (one for one in less if one and _places(kinds, resources | {"CPU": one}, strategy) >= count)
        resources["CPU"] = next(fitting, share)
    for name, available in (("CPU", cluster.cpus), ("GPU", cluster.gpus)):
        needed = resources.get(name, 0) * count
        if needed > available:
            raise UserError(
                f"--resources_per_worker {resources} for {count} workers needs {needed:g} {name}s and "
                f"{cluster.describe()}; lower it or --num_workers"
            )
    workers = Workers(num_workers, use_gpu, resources, strategy, selector)
    if cluster.kinds:
        _check_nodes(args, workers, cluster, kinds, count)
    return workers


def _strategy(args: Any, num_workers: int | tuple[int, int], cluster: Cluster) -> str:
    """``PACK`` fills one node after the other: also where ``--num_nodes`` nodes are full of the workers."""
    nodes = args.num_nodes or 1
    if nodes == 1 or num_workers == nodes * cluster.gpus_per_node:
        return "PACK"
    return "STRICT_SPREAD" if num_workers == nodes else "SPREAD"


def _places(kinds: list[NodeKind], bundle: dict[str, float], strategy: str) -> int:
    """How many workers these nodes have room for."""
    most = 1 if strategy == "STRICT_SPREAD" else 2**31
    return sum(min(kind.room(bundle), most) * kind.count for kind in kinds)


def _check_nodes(args: Any, workers: Workers, cluster: Cluster, kinds: list[NodeKind], count: int) -> None:
    """Refuse what no nodes can ever give, whatever all of them have together."""
    bundle, where = workers.resources_per_worker, "no node here, and none that the autoscaler can start,"
    if not kinds:
        asked = ", ".join(f"{key}={value}" for key, value in args.node_labels.items())
        labels = {f"{key}={kind.labels[key]}" for kind in cluster.kinds for key in args.node_labels
                  if kind.labels and key in kind.labels}  # fmt: skip
        raise UserError(
            f"--node_labels {asked}: {where} has them; there is {', '.join(sorted(labels)) or 'none like it'}"
        )
    places, nodes = _places(kinds, bundle, workers.strategy), _places(kinds, bundle, "STRICT_SPREAD")
    if not places:
        raise UserError(f"--resources_per_worker: {where} has {_listed(bundle)} for one worker; lower it")
    if (args.num_nodes or 1) > nodes:
        raise UserError(f"--num_nodes {args.num_nodes}: a worker needs {_listed(bundle)}, which at most {nodes} "
                        f"node(s) can give; use --num_nodes {nodes} or less")  # fmt: skip
    if places < count:
        each = ", one on each node" if workers.strategy == "STRICT_SPREAD" else ""
        raise UserError(f"--num_workers {count}: the nodes have room for {places} workers of {_listed(bundle)}{each}; "
                        f"use --num_workers {places} or less")  # fmt: skip
    unlabelled = any(kind.labels is None or SUBCLUSTER not in kind.labels for kind in kinds if kind.room(bundle))
    if not isinstance(workers.num_workers, int) and not unlabelled:
        raise UserError(f"--num_workers MIN,MAX: Ray reckons only with nodes without the label {SUBCLUSTER}, and those "
                        "that could train carry it; start them without it, or give one number")  # fmt: skip
    left = total(kinds, "CPU") - bundle["CPU"] * min(workers.largest, places)
    if args.streaming and left < 0.01 and not others_read(cluster.kinds, workers.selector):
        lower = f"'{{\"CPU\": {bundle['CPU'] * 0.9:g}}}'"
        raise UserError("--resources_per_worker: the workers would have all CPUs, and --streaming true reads beside "
                        f"them: lower CPU, for example {lower}")  # fmt: skip
