"""How a run is cut into optimiser steps. The global batch is fixed here and stays, whatever the number of workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rayswift.errors import UserError


@dataclass(frozen=True)
class StepSchedule:
    """Batches and steps of a run. An item is a row, or with packing a pack.

    Args:
        global_batch_size: items per optimiser step over all workers; steps of an epoch may hold a few more or less.
        per_device_batch_size: items per forward pass of one worker.
        max_steps: optimiser steps of the whole run.
        steps_per_epoch: optimiser steps per epoch; None for a stream, whose length is unknown.
    """

    global_batch_size: int
    per_device_batch_size: int
    max_steps: int
    steps_per_epoch: int | None

    def accumulation(self, world_size: int) -> int:
        """Gradient accumulation that keeps the global batch on this many workers."""
        return math.ceil(self.global_batch_size / (self.per_device_batch_size * world_size))

    def describe(self, workers: int, items: int | None, what: str) -> str:
        """The steps in one line whose arithmetic holds: ``9060 steps of 16 rows (1 workers × 1 rows × 16
        accumulated)``; where no product gives the rows of a step, what each forward pass takes at most or at least."""
        epoch = self.steps_per_epoch
        rows, larger = divmod(items, epoch) if items and epoch else (self.global_batch_size, 0)
        size, passes = self.per_device_batch_size, self.accumulation(workers)
        full = workers * size * passes
        if rows == full:
            product = f"{workers} workers × {size} {what} × {passes} accumulated"
        else:
            bound = "at least" if rows > full else "at most"
            product = f"{workers} workers × {passes} forward passes of {bound} {size} {what}"
        also = f", {larger} of {epoch} with one more" if larger else ""
        return f"{self.max_steps} steps of {rows} {what} ({product}){also}"

    def epoch_of(self, step: int) -> float:
        """The epoch reached after this many steps; for a stream the share of the run that is done."""
        return step / (self.steps_per_epoch or self.max_steps)


def plan_steps(
    args: Any, world_size: int, items: int | None, *, packed: bool = False, global_batch_size: int | None = None
) -> StepSchedule:
    """The steps of a run.

    Every epoch trains every item exactly once. Rows: an epoch is ``rows // global batch`` steps, as in SWIFT's count
    (48,330 rows, batch 16, 3 epochs → 9,060 steps); the rows left over make some steps one row larger. Packs: it is
    that rounded up, and no step is larger than asked, because a pack fills a worker's memory.

    Args:
        args: training arguments.
        world_size: workers at the start.
        items: rows or packs of the dataset, None for a stream.
        packed: whether items are packs.
        global_batch_size: what a checkpoint says that is resumed from; None for a new run.

    Raises:
        UserError: no way to know the number of steps.
    """
    per_device = args.per_device_train_batch_size
    rows = per_device * world_size
    accumulation = args.gradient_accumulation_steps or max(1, math.ceil(16 / rows))
    if items is not None:
        accumulation = min(accumulation, math.ceil(items / rows))
    global_batch = global_batch_size or rows * accumulation
    if items is None:
        if args.max_steps <= 0:
            raise UserError("--streaming true: the length is unknown, say how long to train with --max_steps")
        return StepSchedule(global_batch, per_device, args.max_steps, None)
    per_epoch = math.ceil(items / global_batch) if packed else max(1, items // global_batch)
    max_steps = args.max_steps if args.max_steps > 0 else max(1, math.ceil(per_epoch * args.num_train_epochs))
    if args.max_epochs:
        max_steps = min(max_steps, max(1, math.ceil(per_epoch * args.max_epochs)))
    return StepSchedule(global_batch, per_device, max_steps, per_epoch)
