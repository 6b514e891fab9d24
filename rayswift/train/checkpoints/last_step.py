"""The state of a LoRA run after its steps, held beside the driver: a worker that dies costs the steps since then.

It is in the memory of the event queue (no file, no bucket, no manifest); workers that start again take it where no
checkpoint is as new. Training waits for a copy of the adapter and its optimiser, a thread of rank 0 does the rest.
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
from typing import TYPE_CHECKING, Any

from rayswift.errors import one_line
from rayswift.modeling.adapter_folder import ADAPTER_CONFIG
from rayswift.train.checkpoints.held_state import ADAPTER, FIRST, TRAINER, HeldState
from rayswift.train.checkpoints.packed import packed
from rayswift.train.checkpoints.snapshot import checkpoint_bytes, is_copied, optimizer_states, rng_file

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
        self._is_held: bool | None = None
        self._weights: dict[str, Any] = {}  # of the adapter
        self._config = b""  # the file that says what it is
        self._folder = ""  # where random numbers pass by
        self.is_on = args.train_type == "lora" and args.max_failures != 0 and not args.deepspeed
        self._next = 0.0 if self.is_on else math.inf

    def is_due(self) -> bool:
        """Whether the state after this step shall be held."""
        return time.monotonic() >= self._next and (self._thread is None or not self._thread.is_alive())

    def step(self) -> int:
        """The step whose state is held; 0 where there is none, and on other ranks than the first."""
        events = self._store.config.events
        return int(events.ask("kept_step")) if self.is_on and self._store.rank.rank == 0 else 0

    def keep(self, trainer: StepTraining) -> None:
        """Hold the state that training has now."""
        if self._is_held is None:
            self._is_held = self._look_at(trainer)  # once: not counted
        began, store = time.monotonic(), self._store
        if not self._is_held:
            self._next = math.inf
            return
        rngs = store.of_all(rng_file(trainer, self._folder))
        trainer.store_flos()
        if store.rank.rank > 0:
            return
        places, buffers = packed({
            ADAPTER: self._weights or adapter_tensors(trainer.model),
            FIRST: getattr(trainer.model, "first_values", None),
            **optimizer_states(trainer),
        })  # fmt: skip
        places[TRAINER] = trainer.exported_state()
        describe, step, seconds = store.describer(trainer), trainer.state.global_step, trainer.clock.read()

        def state() -> HeldState:
            with tempfile.TemporaryDirectory(prefix="rayswift-step-") as folder:
                describe(folder)
                files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
            return HeldState.of({ADAPTER_CONFIG: self._config} | files | dict(rngs), places, buffers)

        self._next = math.inf  # until that is done
        send = (state, step, seconds, time.monotonic() - began)
        self._thread = threading.Thread(target=self._send, args=send, name="rayswift-step", daemon=True)
        self._thread.start()

    def _look_at(self, trainer: StepTraining) -> bool:
        """Whether the states of this run are held; what does not change with its steps is found on the way."""
        from torch.nn import Parameter

        size = checkpoint_bytes(trainer.model, self._store.config.args)
        if size >= LIMIT or trainer.is_fsdp_enabled or not is_copied(trainer.model):
            return False
        self._folder = self._store.scratch(f"rng-{self._store.rank.rank}")
        model: Any = trainer.model
        with tempfile.TemporaryDirectory() as folder:
            model.peft_config["default"].save_pretrained(folder)
            self._config = (Path(folder) / ADAPTER_CONFIG).read_bytes()
        weights = adapter_tensors(model)
        if all(isinstance(value, Parameter) for value in weights.values()):  # else a buffer, which may be put anew
            self._weights = weights
        return True

    def _send(self, state: Callable[[], HeldState], step: int, seconds: dict[str, float], waited: float) -> None:
        began = time.thread_time()
        try:
            self._store.config.events.ask("keep", step, state(), seconds)
        except Exception as error:  # no room for its files, the driver is gone: checkpoints are what is left
            logger.warning("the state after step %s is not kept: %s", step, one_line(error))
        worked = (time.thread_time() - began) / (os.cpu_count() or 1)
        self._next = time.monotonic() + (waited + worked) / SHARE


def adapter_tensors(model: Any) -> dict[str, Any]:
    """What an adapter's file holds, by the names there: tensors of the model itself."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, model.state_dict(keep_vars=True)))
