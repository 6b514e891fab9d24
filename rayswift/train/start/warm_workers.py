"""Training workers whose processes import what they need while the driver still reads and encodes the data.

For a Ray of this machine only, and workers without accelerators. Ray Train starts its workers when the data is ready;
their imports (PyTorch, Transformers, PEFT) take longer than anything else before the first step of a small run.
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from typing import Any

from rayswift import private
from rayswift.plan.memory import free_bytes
from rayswift.train.start.allocator import worker_environment

#: What training imports on its way, the slowest ones.
_MODULES = ("ray.train.torch", "peft", "accelerate", "rayswift.train.trainers.sft", "rayswift.train.worker")

#: Free memory that there must be for each worker that only waits: several times what it takes.
SPARE_BYTES = 2 * 2**30


class RayTrainWorker:
    """Ray Train's worker of the same name, in a process that has imported what training needs.

    This class stands in for it because a driver that imports Ray Train first would start the processes seconds later.
    """

    def __init__(self, model_dir: str) -> None:
        gc.disable()  # modules are not garbage: looking through them again and again takes a fifth of the time
        _import_training(model_dir)
        gc.freeze()
        gc.enable()
        from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker as Worker

        self._worker = Worker()

    def try_packing(self, *args: Any) -> dict[str, Any]:
        """See :func:`rayswift.train.packing.try_packing`."""
        from rayswift.train.packing import try_packing

        return try_packing(*args)


def _forwarded(name: str) -> Callable[..., Any]:
    def call(self: RayTrainWorker, *args: Any, **options: Any) -> Any:
        return getattr(self._worker, name)(*args, **options)

    call.__name__ = name
    return call


for _name in private.WORKER_METHODS:
    setattr(RayTrainWorker, _name, _forwarded(_name))


def start_warm_workers(model_dir: str, count: int) -> list[Any]:
    """Handles of ``count`` workers that begin to import. Ray Train's placement group accounts for their CPUs."""
    import ray

    environment = {"env_vars": worker_environment(use_gpu=False)}
    actor = ray.remote(num_cpus=0, runtime_env=environment)(RayTrainWorker)
    return [actor.remote(model_dir) for _ in range(count)]


def start_spares(model_dir: str, count: int) -> list[Any]:
    """Handles of as many that wait for the next start, where there is memory for them."""
    free = free_bytes()
    return start_warm_workers(model_dir, count) if free is None or free > SPARE_BYTES * count else []


def wait_until_warm(workers: list[Any]) -> None:
    """Wait until they have imported, or died of it."""
    import ray

    if workers:
        ray.wait([worker.get_metadata.remote() for worker in workers], num_returns=len(workers))


def _import_training(model_dir: str) -> None:
    """Import what :func:`rayswift.train.worker.train_loop` will use, the model's own module included."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from rayswift.modeling.loading import read_config

    for name in _MODULES:
        importlib.import_module(name)
    model_type = read_config(model_dir).get("model_type", "")
    if model_type in CONFIG_MAPPING:  # else its code comes with the model
        MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)
