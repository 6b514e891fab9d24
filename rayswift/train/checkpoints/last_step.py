"""The state of a LoRA run after its steps, held beside the driver: a worker that dies costs the steps since then.

It is what a checkpoint holds, as bytes in the memory of the event queue (no file, no bucket, no manifest); workers that
start again take it where no checkpoint is as new. Training waits for a copy of the adapter and its optimiser, the rest
happens on a thread of rank 0.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rayswift.errors import one_line
from rayswift.train.checkpoints.snapshot import checkpoint_bytes, take_snapshot

if TYPE_CHECKING:
    from rayswift.train.checkpoints.store import CheckpointStore
    from rayswift.train.trainers.step import StepTraining

logger = logging.getLogger("rayswift.train")

#: The share of the time that holding states may take: of steps too short for it not every one is held.
SHARE = 0.01
#: Bytes of a state that is too large for it.
LIMIT = 2**30


class LastStep:
    """Holds the states of a run. Use ``is_due`` on rank 0, and ``keep`` on every worker."""

    def __init__(self, store: CheckpointStore) -> None:
        self._store, args = store, store.config.args
        self._thread: threading.Thread | None = None
        self._size: int | None = None
        self.is_on = args.train_type == "lora" and args.max_failures != 0 and not args.deepspeed
        self._next = 0.0 if self.is_on else math.inf

    def is_due(self) -> bool:
        """Whether the state after this step shall be held."""
        return time.monotonic() >= self._next and (self._thread is None or not self._thread.is_alive())

    def step(self) -> int:
        """The step whose state is held; 0 where there is none, and on other ranks than the first."""
        import ray

        events = self._store.config.events
        return int(ray.get(events.kept_step.remote())) if self.is_on and self._store.rank.rank == 0 else 0

    def keep(self, trainer: StepTraining) -> None:
        """Hold the state that training has now."""
        began = time.monotonic()
        if self._size is None:
            self._size = checkpoint_bytes(trainer.model, self._store.config.args)
        write = take_snapshot(trainer, self._store.of_all, bare=True) if self._size < LIMIT else None
        if write is None:
            self._next = math.inf
        elif self._store.rank.rank == 0:
            send = (write, self._store.describer(trainer), trainer.state.global_step, trainer.clock.read())
            self._next = math.inf  # until that is done
            waited = time.monotonic() - began
            self._thread = threading.Thread(target=self._send, args=(*send, waited), name="rayswift-step", daemon=True)
            self._thread.start()

    def _send(
        self,
        write: Callable[[str], None],
        describe: Callable[[str], None],
        step: int,
        seconds: dict[str, float],
        waited: float,
    ) -> None:
        import ray

        began = time.thread_time()
        try:
            with tempfile.TemporaryDirectory(prefix="rayswift-step-") as folder:
                write(folder)
                describe(folder)
                files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            ray.get(self._store.config.events.keep.remote(step, files, seconds))
        except Exception as error:  # no room for its files, the driver is gone: checkpoints are what is left
            logger.warning("the state after step %s is not kept: %s", step, one_line(error))
        worked = (time.thread_time() - began) / (os.cpu_count() or 1)
        self._next = time.monotonic() + (waited + worked) / SHARE
