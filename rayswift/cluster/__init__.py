"""Connect to Ray, count what it has, and plan the workers that a run asks for.

No address: Ray starts embedded with this machine's cores. Inside a Ray job, with ``RAY_ADDRESS`` or ``--address``: that
cluster. Nothing else changes.
"""

from rayswift.cluster.connection import Cluster, address_of, connect, cpu_count, has_nvidia_driver, most_cpus
from rayswift.cluster.results import results_at, results_folder
from rayswift.cluster.waiting import wait_for_task, waiting_line, waiting_said
from rayswift.cluster.workers import Workers, check_before_start, plan_workers

__all__ = [
    "Cluster",
    "Workers",
    "address_of",
    "check_before_start",
    "connect",
    "cpu_count",
    "has_nvidia_driver",
    "most_cpus",
    "plan_workers",
    "results_at",
    "results_folder",
    "wait_for_task",
    "waiting_line",
    "waiting_said",
]
