"""Ray Train's ``TorchTrainer`` with the processes that a run needs, and no others.

Each process imports Ray before it does anything: seconds of a small machine's time before the first step. What
``TorchTrainer`` adds to a ``DataParallelTrainer`` is the choice of a backend, and PyTorch in the driver's process: 130
MiB and a second that a driver has no use for.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from rayswift import private
from rayswift.errors import one_line
from rayswift.train.failures import Failures
from rayswift.train.start.alone import alone_in_group
from rayswift.train.start.warm_workers import wait_until_warm

#: Seconds between two looks at the workers; Ray Train's default is 2.
HEALTH_CHECK_SECONDS = 0.5


class LeanTorchTrainer(DataParallelTrainer):
    """A trainer whose workers get their data from the token cache or from a stream of their own.

    Without ``datasets`` no process deals them out. On an ``embedded`` Ray the controller runs in this process: neither
    of them could outlive the other. ``alone``: nothing else, Ray Data for one, shares the CPUs while the workers run.
    ``warm``: workers for the first start (see :mod:`rayswift.train.start.warm_workers`). ``start_spares``: starts those
    for another one.
    """

    def __init__(
        self,
        *args: Any,
        torch_config: Any,
        embedded: bool,
        alone: bool,
        warm: list[Any],
        start_spares: Callable[[], list[Any]] = list,
        **options: Any,
    ) -> None:
        super().__init__(*args, backend_config=torch_config, **options)
        self._embedded, self._alone, self._warm, self._start_spares = embedded, alone, warm, start_spares

    def fit(self) -> Any:
        """Train; what Ray Train gives."""
        with private.quiet_train() if self._embedded else nullcontext():
            return super().fit()

    def _create_default_callbacks(self) -> list[Any]:
        unneeded: tuple[type, ...] = () if self.datasets else (DatasetsCallback,)
        if self._embedded:  # a watch over placement groups that a dead controller leaves behind
            unneeded += (PlacementGroupCleanerCallback,)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, unneeded)]

    def _initialize_and_run_controller(self, **options: Any) -> Any:
        options["failure_policy"] = _RetriesWhatMayChange(self.run_config.failure_config)
        controller = self._controller_here(dict(options)) if self._embedded and not _in_event_loop() else None
        if controller is None:
            self._warm.clear()  # they wait for a controller in this process
            return super()._initialize_and_run_controller(**options)
        try:
            with alone_in_group() if self.scaling_config.num_workers == 1 else nullcontext():
                self._run(controller)
        finally:
            self._warm.clear()
        return controller.get_result()

    def _run(self, controller: _ControllerHere) -> None:
        try:
            with _interrupted_at_once():
                asyncio.run(controller.run())
        except BaseException:
            controller.stop_workers()
            raise

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C ends this process at once. Ray Train's own way waits for the controller, which may wait for nodes, and
        ends with status 0."""

        def interrupt(*_: Any) -> None:
            controller.abort.remote()
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)

    def _controller_here(self, options: dict[str, Any]) -> _ControllerHere | None:
        """The controller in this process; None when this Ray Train's cannot be built here."""
        # The group's other process, which makes ranks wait for each other, would take the CPU from their imports.
        wait_until_warm(self._warm)
        try:
            if self._alone and type(options["scaling_policy"]) is FixedScalingPolicy:
                options["scaling_policy"] = _UncoordinatedScaling(self.scaling_config)
            return _ControllerHere(self._warm, self._start_spares, **options)
        except Exception as error:
            private.report("Ray Train's controller", f"training starts some seconds later ({one_line(error)})")
            return None


class _WorkerGroupHere(WorkerGroup):
    """Workers of a controller that is no actor; they would ask it for reported checkpoints, which RaySwift has none of
    (its manifests are what counts)."""

    #: Workers that the next group begins with.
    warm: list[Any]
    #: Starts them. A run that has lost a worker will lose another, and its imports would cost more than all else.
    start_spares: Callable[[], list[Any]]
    is_first = True

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **options: Any
    ) -> list[Worker]:
        if not self.is_first and not self.warm:
            self.warm.extend(self.start_spares())  # one process imports sooner than Ray Train has it all imported
        actors = list(self.warm)
        self.warm.clear()
        workers = self._begin_with(actors, num_workers, resources_per_worker) or super()._create_workers(
            num_workers, placement_group, resources_per_worker, **options
        )
        if not self.is_first:
            self.warm.extend(self.start_spares())
        type(self).is_first = False
        return workers

    def _begin_with(self, actors: list[Any], num_workers: int, resources_per_worker: dict[str, float]) -> list[Worker]:
        """As many workers as asked for, or none."""
        try:
            found = ray.get([actor.get_metadata.remote() for actor in actors])
        except RayActorError:
            found = []  # one did not live to see its work: all anew
        if len(found) != num_workers:
            return []
        workers = [
            Worker(actor, metadata, resources_per_worker, placement_group_bundle_index=bundle)
            for bundle, (actor, metadata) in enumerate(zip(actors, found, strict=True))
        ]
        return WorkerGroup._assign_worker_ranks(workers)

    def _init_train_context_on_workers(
        self, workers: list[Worker], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        waiting = [
            worker.actor.init_train_context.remote(
                train_run_context=self._train_run_context,
                distributed_context=worker.distributed_context,
                synchronization_actor=sync_actor,
                storage_context=self._storage_context,
                worker_callbacks=self._worker_callbacks_to_propagate,
                controller_actor=None,
                **{name: values[number] for name, values in train_context_args.items()},
            )
            for number, worker in enumerate(workers)
        ]
        ray.get(waiting)
        self._decorate_worker_log_file_paths(workers)


class _ControllerHere(TrainController):
    """Ray Train's controller in the driver's process."""

    def __init__(self, warm: list[Any], start_spares: Callable[[], list[Any]], **options: Any) -> None:
        known = {"warm": warm, "start_spares": staticmethod(start_spares)}
        self.worker_group_cls = type("WarmWorkerGroup", (_WorkerGroupHere,), known)
        super().__init__(**options)
        # In this process a look at the workers costs a call: one that has died is replaced at once.
        self._health_check_interval_s = HEALTH_CHECK_SECONDS
        # What it says about failures belongs into its files, as on a cluster; the terminal gets one line at the end.
        log = logging.getLogger("ray.train")
        for handler in [one for one in log.handlers if isinstance(one, logging.StreamHandler)]:
            log.removeHandler(handler)

    def stop_workers(self) -> None:
        """End the workers that still run, without waiting for what they do."""
        if self._worker_group:
            self._worker_group.abort()


class _RetriesWhatMayChange(DefaultFailurePolicy):
    """Ray Train's policy, but for failures that would come again."""

    def __init__(self, failure_config: Any) -> None:
        super().__init__(failure_config)
        self._seen = Failures()

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Whether to start the workers again."""
        if self._seen.is_final(getattr(training_failed_error, "worker_failures", None) or {}):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class _UncoordinatedScaling(FixedScalingPolicy):
    """A fixed number of workers where nobody else asks for CPUs: neither an autoscaler nor Ray Data has to know."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Register nowhere."""

    def _maybe_send_resource_request(self) -> None:
        pass


def _in_event_loop() -> bool:
    """Whether this thread runs an event loop, as notebooks do: no second one can run in it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextmanager
def _interrupted_at_once() -> Iterator[None]:
    """Ctrl-C ends what runs; asyncio's own way is to wait for what blocks, which may be a worker's start."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
