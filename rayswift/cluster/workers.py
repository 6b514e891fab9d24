"""Turn ``--num_workers`` and friends into what Ray Train is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayswift.cluster.connection import Cluster, address_of, cpu_count, has_nvidia_driver
from rayswift.errors import UserError


@dataclass(frozen=True)
class Workers:
    """The worker group to ask Ray Train for. ``num_workers`` is a count, or (min, max) for an elastic group;
    ``spread``: over nodes in turn, not one node after the other."""

    num_workers: int | tuple[int, int]
    use_gpu: bool
    resources_per_worker: dict[str, float]
    spread: bool = False

    @property
    def largest(self) -> int:
        """The most workers the group may grow to: what the global batch is planned for."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


def check_before_start(args: Any) -> None:
    """Refuse what this machine can never give, before Ray is even imported (embedded Ray on CPU only)."""
    if address_of(args) or args.resources_per_worker or args.use_gpu or has_nvidia_driver():
        return
    plan_workers(args, Cluster(embedded=True, cpus=cpu_count(), gpus=0, nodes=1))


def plan_workers(args: Any, cluster: Cluster) -> Workers:
    """How many workers, on what.

    Unset, ``--num_workers`` is one per GPU of ``--num_nodes`` nodes, one per visible GPU on this machine, else 1.
    Workers leave room for Ray Data: with every core promised to training, its tasks would wait for ever.

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
        raise UserError(f"--num_workers {count} needs {count} {unit}s and {cluster.describe()}{least}")
    if use_gpu:
        resources.setdefault("GPU", 1)
    resources.setdefault("CPU", min(1.0, int(max(cluster.cpus - 1, cluster.cpus / 2) * 100 / largest) / 100))
    for name, available in (("CPU", cluster.cpus), ("GPU", cluster.gpus)):
        needed = resources.get(name, 0) * count
        if needed > available:
            raise UserError(
                f"--resources_per_worker {resources} for {count} workers needs {needed:g} {name}s and "
                f"{cluster.describe()}; lower it or --num_workers"
            )
    return Workers(num_workers, use_gpu, resources, (args.num_nodes or 1) > 1)
