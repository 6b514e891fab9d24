"""How a run is cut into optimiser steps. The global batch is fixed here and stays, whatever the number of workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rayswift.errors import UserError


@dataclass(frozen=True)
class StepPlan:
    """Batches and steps of a run.

    Args:
        global_batch_size: rows per optimiser step over all workers.
        per_device_batch_size: rows per forward pass of one worker.
        max_steps: optimiser steps of the whole run.
        steps_per_epoch: optimiser steps per epoch; None for a stream, whose length is unknown.
    """

    global_batch_size: int
    per_device_batch_size: int
    max_steps: int
    steps_per_epoch: int | None

    def accumulation(self, world_size: int) -> int:
        """Gradient accumulation that keeps the global batch on this many workers.

        Raises:
            UserError: the global batch does not divide.
        """
        rows = self.per_device_batch_size * world_size
        if self.global_batch_size % rows:
            raise UserError(
                f"--num_workers {world_size}: the global batch of {self.global_batch_size} rows does not divide into "
                f"{world_size} workers × --per_device_train_batch_size {self.per_device_batch_size}"
            )
        return self.global_batch_size // rows

    def epoch_of(self, step: int) -> float:
        """The epoch reached after this many steps; for a stream the share of the run that is done."""
        return step / (self.steps_per_epoch or self.max_steps)


def plan_steps(args: Any, world_size: int, num_rows: int | None) -> StepPlan:
    """The steps of a run over ``num_rows`` rows (None for a stream).

    An epoch is ``num_rows // global batch`` steps, as in SWIFT's count (48,330 rows, batch 16, 3 epochs → 9,060
    steps); the rows left over differ each epoch, because each epoch has its own order. A dataset smaller than one
    global batch makes one smaller step per epoch.

    Raises:
        UserError: no way to know the number of steps.
    """
    rows = args.per_device_train_batch_size * world_size
    accumulation = args.gradient_accumulation_steps or max(1, math.ceil(16 / rows))
    if num_rows is not None and num_rows < rows * accumulation:
        accumulation = max(1, num_rows // rows)
    global_batch = rows * accumulation
    if num_rows is None:
        if args.max_steps <= 0:
            raise UserError("--streaming true: the length is unknown, say how long to train with --max_steps")
        return StepPlan(global_batch, args.per_device_train_batch_size, args.max_steps, None)
    per_epoch = max(1, num_rows // global_batch)
    max_steps = args.max_steps if args.max_steps > 0 else max(1, math.ceil(per_epoch * args.num_train_epochs))
    return StepPlan(global_batch, args.per_device_train_batch_size, max_steps, per_epoch)
