"""Connect to Ray, and count what it has.

No address: Ray starts embedded with this machine's cores. Inside a Ray job, with ``RAY_ADDRESS`` or ``--address``:
that cluster. Nothing else changes.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from rayswift import private
from rayswift.cluster.placement import NodeKind, node_kinds
from rayswift.errors import UserError

logger = logging.getLogger("rayswift.cluster")

#: How often an embedded Ray is started.
START_TRIES = 3


@dataclass(frozen=True)
class Cluster:
    """What the connected cluster has, counting the nodes its autoscaler may still start.

    ``embedded``: this machine alone, without an address. ``started``: this connection started the Ray, so its caller
    may end it. ``kinds``: its nodes; empty where only their sums are known.
    """

    embedded: bool
    cpus: float
    gpus: float
    nodes: int
    gpus_per_node: int = 0
    started: bool = False
    kinds: tuple[NodeKind, ...] = ()

    def describe(self) -> str:
        """For messages: ``this machine has 2 CPUs and no GPU``."""
        subject = "this machine has" if self.embedded else f"the cluster ({self.nodes} nodes) has at most"
        return f"{subject} {self.cpus:g} CPUs and {f'{self.gpus:g} GPUs' if self.gpus else 'no GPU'}"


def cpu_count() -> int:
    """CPUs this process may use (affinity and cgroup included where Python knows them)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_nvidia_driver() -> bool:
    """Whether an NVIDIA driver is loaded here."""
    return os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidiactl")


def address_of(args: Any) -> str | None:
    """The cluster to connect to: ``--address``, else ``RAY_ADDRESS`` (set inside a Ray job), else None."""
    return args.address or os.environ.get("RAY_ADDRESS") or None


def connect(args: Any) -> Cluster:
    """Connect to the cluster, or start Ray embedded; a Ray that this process already uses is kept.

    Raises:
        UserError: the cluster at ``--address`` does not answer.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray warns that a future version will no longer clear CUDA_VISIBLE_DEVICES for actors without GPUs.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A busy machine may take longer than Ray's 30 s to start its own processes.
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")
    # Ray's workers would be the first to wait for whatever else runs on this machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # One process for each core, before anybody asks for one: each wakes a hundred times a second while others work.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # RaySwift shows progress itself; Ray Data's full log stays in its file.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    import ray

    address, is_new = address_of(args), not ray.is_initialized()
    if is_new:
        _start_ray(address)
    resources = ray.cluster_resources()
    limits = private.autoscaler_limits()
    kinds, nodes = node_kinds(), sum(node["Alive"] for node in ray.nodes())
    return Cluster(
        embedded=address is None and nodes < 2,  # a program may have connected to a cluster itself
        cpus=most_cpus(),
        gpus=max(resources.get("GPU", 0), limits.get("GPU", 0)),
        nodes=nodes,
        gpus_per_node=int(max((kind.resources.get("GPU", 0) for kind in kinds), default=0)),
        started=is_new and address is None,
        kinds=kinds,
    )


def most_cpus() -> float:
    """CPUs of the connected cluster, counting those that its autoscaler may still start."""
    import ray

    return max(ray.cluster_resources().get("CPU", 0), private.autoscaler_limits().get("CPU", 0))


def _start_ray(address: str | None) -> None:
    """Connect this process to the cluster at ``address``, or to one that it starts itself."""
    import ray

    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options["include_dashboard"] = False
    on_sigterm = signal.getsignal(signal.SIGTERM)
    for left in reversed(range(START_TRIES)):
        try:
            with private.small_ray() if address is None else nullcontext():
                ray.init(address=address or "local", **options)
            # Ray's own handler ends a driver in the middle of everything, with a stack of its C++ code.
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_sigterm)
            return
        except (ConnectionError, ValueError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise UserError(f"--address {address}: no Ray cluster answers there ({reason})") from None
        except Exception as error:
            # On a busy machine Ray's own helper processes miss a deadline of 15 s that no setting moves.
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            if not left:
                raise UserError("Ray could not start: this machine is too busy; stop something, or try again") from None
            logger.warning("Ray did not start in time; trying again")
