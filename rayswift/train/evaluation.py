"""``--eval_async true``: a process of its own evaluates checkpoints, on resources that the workers leave.

It builds what a worker trains, loads each checkpoint into it and evaluates as workers do. The first worker asks for
checkpoints as soon as they are whole, and takes the scores between two steps. What has a score says so in its manifest:
an attempt that goes on asks for those without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rayswift.console import say
from rayswift.errors import one_line
from rayswift.train.checkpoints.manifest import list_checkpoints, read_manifest, write_scores
from rayswift.train.hf_arguments import eval_strategy

if TYPE_CHECKING:
    from rayswift.cluster import Workers
    from rayswift.train.checkpoints.store import CheckpointStore
    from rayswift.train.config import WorkerConfig

#: Seconds at the end of training for an evaluator that has not started to find its resources.
START_SECONDS = 300.0


def spare_resources(args: Any, workers: Workers) -> dict[str, float] | None:
    """What the evaluator of a run has: what one more worker would, where the cluster has that. None where workers
    evaluate; a line says so where ``--eval_async`` asks for another."""
    import ray

    if not args.eval_async or eval_strategy(args) == "no":
        return None
    each, every = workers.resources_per_worker, ray.cluster_resources()
    if all(every.get(name, 0.0) >= each[name] * (workers.largest + 1) - 1e-6 for name in each):
        return dict(each)
    say(f"--eval_async true: nothing is left beside {workers.largest} workers of {each}, so they evaluate themselves")
    return None


class Evaluations:
    """The evaluations of an attempt's checkpoints; held by its first worker.

    Args:
        config: what was trained.
        store: where its checkpoints are.
        evaluator: the class of the actor, :class:`rayswift.train.worker.Evaluator`.
    """

    def __init__(self, config: WorkerConfig, store: CheckpointStore, evaluator: type) -> None:
        import ray

        resources = dict(config.spare or {})
        cpus, gpus = resources.pop("CPU", 0.0), resources.pop("GPU", 0.0)
        options = {"num_cpus": cpus, "num_gpus": gpus, "resources": resources, "max_restarts": 3}
        self._actor = ray.remote(evaluator).options(**options, scheduling_strategy="DEFAULT").remote(config)
        self._ready = self._actor.ready.remote()
        self._store = store
        self._unsent: list[int] = []
        self._sent: dict[Any, int] = {}

    def scored(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The checkpoints that have scores already; the others are asked for."""
        for found in list_checkpoints(self._store.filesystem, self._store.run_path):
            scores = (read_manifest(self._store.filesystem, found.path) or {}).get("scores")
            if scores:
                yield found.step, scores
            else:
                self.ask(found.step)

    def ask(self, step: int) -> None:
        """Have a checkpoint evaluated once it is whole."""
        self._unsent.append(step)
        self._store.waiting.add(f"checkpoint-{step}")

    def finished(self, wait: bool, tick: Any) -> Iterator[tuple[int, dict[str, float] | str]]:
        """The scores that came in since the last time, or why there are none; with ``wait`` all that were asked for.
        ``tick`` is called while it waits."""
        import ray

        left = START_SECONDS
        while True:
            self._send()
            if wait:  # all are written: what is not whole never will be
                self._unsent.clear()
            asked = list(self._sent)
            for reference in ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else []:
                step = self._sent.pop(reference)
                self._store.waiting.discard(f"checkpoint-{step}")
                try:
                    yield step, ray.get(reference)
                except Exception as error:  # of the evaluator, whatever it is: training goes on
                    yield step, one_line(error)
            if not wait or not self._sent:
                return
            tick()
            if not ray.wait([self._ready], timeout=0)[0]:
                left -= 1.0
                if left <= 0:
                    yield from ((step, "its resources are not free") for step in self._sent.values())
                    return
            ray.wait(list(self._sent), timeout=1.0)

    def note(self, step: int, scores: dict[str, float], state: Any) -> None:
        """Keep the scores of a checkpoint with it, and the checkpoints that they mean."""
        store = self._store
        write_scores(store.filesystem, f"{store.run_path}/checkpoint-{step}", scores)
        whole = list_checkpoints(store.filesystem, store.run_path)
        with contextlib.suppress(OSError):  # who writes the next one tidies up as well
            store.keep(whole[-1].step if whole else step, state.best_global_step, state.best_model_checkpoint)

    def _send(self) -> None:
        for step in list(self._unsent):
            name = f"checkpoint-{step}"
            if read_manifest(self._store.filesystem, f"{self._store.run_path}/{name}"):
                self._sent[self._actor.evaluate.remote(f"{self._store.config.run_uri}/{name}")] = step
                self._unsent.remove(step)

    def close(self) -> None:
        """End the evaluator."""
        import ray

        ray.kill(self._actor)
