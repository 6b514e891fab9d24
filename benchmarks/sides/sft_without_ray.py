"""``rayswift sft`` with its worker in this process and no Ray: the same data path, model, trainer and log.

What needs a Ray is replaced: the connection and Ray Train. The process has a worker's environment. How joined rows
are trained must be in the cache already (a run of ``rayswift sft`` puts it there).

    python sft_without_ray.py --model DIR --dataset FILE ...
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from typing import Any
from unittest import mock


def main() -> None:
    import ray.train

    from rayswift import cluster
    from rayswift.arguments import parse_arguments
    from rayswift.cluster import Cluster
    from rayswift.train import driver, packing, worker

    def trainer(loop: Any, *, train_loop_config: Any, **_: Any) -> Any:
        return types.SimpleNamespace(
            fit=lambda: types.SimpleNamespace(return_value=worker.train_loop(train_loop_config))
        )

    def no_trial(*_: Any) -> Any:
        sys.exit("how this model trains joined rows is not in the cache: run rayswift sft first")

    context = types.SimpleNamespace(
        get_world_rank=lambda: 0, get_world_size=lambda: 1, get_local_rank=lambda: 0, get_local_world_size=lambda: 1
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (cluster, "connect", lambda args: Cluster(embedded=True, cpus=2, gpus=0, nodes=1)),
            (driver, "start_warm_workers", lambda *_: []),
            (driver, "make_trainer", trainer),
            (ray.train, "get_context", lambda: context),
            (ray.train, "report", lambda *_, **__: None),
            (ray.train, "get_preemption_info", lambda: None),
            (packing, "_tried", no_trial),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        driver.train(parse_arguments("sft", sys.argv[1:]))


if __name__ == "__main__":
    from rayswift.train.start.allocator import worker_environment

    if environment := worker_environment(use_gpu=False):  # read when a process starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    main()
