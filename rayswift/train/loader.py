"""Micro-batches for one worker, in the schedule's order, from any position.

A step trains a number of items (rows or packs) that does not depend on the number of workers; they are distributed over
``gradient accumulation × world_size`` micro-batches, and each worker takes its share of them. Epochs are inside, so
that Transformers' Trainer sees one long pass and the position is the step (and for a stream the place that step ends
at).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.data.tokens.table import (
    LazyItems,
    PlacedRow,
    StreamItem,
    StreamPlaces,
    TokenizedRow,
    TokenRows,
    TrainItems,
    iter_items,
)
from rayswift.train.collate import Batch, Collate

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from rayswift.train.schedule import StepSchedule

#: Steps whose rows are sorted by length together (Transformers takes 50 batches too).
BUCKET_WINDOW = 50


@dataclass(frozen=True)
class Rank:
    """Which share of every global batch this worker takes."""

    rank: int
    world_size: int


def distribute(costs: Sequence[int], micro_batches: int, size: int) -> list[list[int]]:
    """Which items of a step each micro-batch of all workers takes.

    Args:
        costs: tokens of each item.
        micro_batches: how many there are.
        size: items of a full one.

    Returns:
        Items in order, ``size`` to a micro-batch; fewer items leave the last ones short or empty, more than fit go one
        by one to where the padded batch stays smallest.
    """
    batches = [list(range(start, min(start + size, len(costs)))) for start in range(0, micro_batches * size, size)]
    longest = [max((costs[item] for item in batch), default=0) for batch in batches]
    for item in range(micro_batches * size, len(costs)):
        best = min(range(micro_batches), key=lambda one: max(longest[one], costs[item]) * (len(batches[one]) + 1))
        batches[best].append(item)
        longest[best] = max(longest[best], costs[item])
    return batches


class _Loader:
    """What the two loaders share: the Trainer iterates one of them once."""

    def __init__(self, schedule: StepSchedule, rank: Rank, collate: Collate, start_step: int) -> None:
        self.schedule, self.rank, self.collate, self.start_step = schedule, rank, collate, start_step
        self._spent = False

    def __iter__(self) -> Iterator[Batch]:
        # The Trainer asks again when a stream ends before max_steps: there is nothing more.
        if self._spent:
            return iter(())
        self._spent = True
        return (self.collate(rows) for rows in self.micro_batches())

    def micro_batches(self) -> Iterator[list[TokenizedRow]]:
        """The rows of each micro-batch of this worker, from the start step on."""
        raise NotImplementedError

    def stream_places(self, step: int) -> StreamPlaces | None:
        """Where the streams go on after this step; None for a dataset of known length."""
        return None

    def rows_of(self, step: int) -> list[list[PlacedRow]]:
        """The rows of each of this worker's micro-batches in one step, for a stream the one trained last."""
        raise NotImplementedError

    def _mine(self, costs: Sequence[int]) -> list[list[int]]:
        """The items of each of this worker's micro-batches in one step."""
        world_size = self.rank.world_size
        count = self.schedule.accumulation(world_size) * world_size
        return distribute(costs, count, self.schedule.per_device_batch_size)[self.rank.rank :: world_size]


class EpochLoader(_Loader):
    """A dataset whose items can be fetched by number: each epoch is a permutation seeded by ``seed + epoch``.

    An epoch trains every item exactly once. With ``bucket`` (``--train_sampling_strategy group_by_length``) items of
    like length come in one step, so that little is padded: lengths are sorted within windows of many steps, and the
    steps are shuffled again.
    """

    def __init__(
        self,
        items: TrainItems | LazyItems,
        schedule: StepSchedule,
        rank: Rank,
        collate: Collate,
        start_step: int,
        seed: int,
        shuffle: bool,
        bucket: bool = False,
    ) -> None:
        super().__init__(schedule, rank, collate, start_step)
        self.items, self.seed, self.shuffle, self.bucket = items, seed, shuffle, bucket
        self._order: tuple[int, Any] = (-1, None)

    def step_items(self, step: int) -> np.ndarray:
        """The items that all workers together train in one step."""
        steps = self.schedule.steps_per_epoch
        assert steps is not None
        epoch, within = divmod(step, steps)
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        order = self._order[1]
        # Steps of an epoch differ by one item at most.
        return order[within * len(order) // steps : (within + 1) * len(order) // steps]

    def micro_batch_items(self, step: int) -> list[list[int]]:
        """The items of each of this worker's micro-batches in one step."""
        items = self.step_items(step)
        costs = self.items.lengths[items].tolist()
        return [[int(items[place]) for place in places] for places in self._mine(costs)]

    def rows_of(self, step: int) -> list[list[PlacedRow]]:
        return [[row for item in items for row in self.items.placed(item)] for items in self.micro_batch_items(step)]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        import numpy as np

        order, random = np.arange(len(self.items)), np.random.RandomState(self.seed + epoch)
        if self.shuffle:
            order = random.permutation(len(self.items))
        if not self.bucket:
            return order
        size = self.schedule.global_batch_size
        window = BUCKET_WINDOW * size
        parts = [order[start : start + window] for start in range(0, len(order), window)]
        ordered = np.concatenate([part[np.argsort(self.items.lengths[part], kind="stable")] for part in parts])
        steps = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return np.concatenate([steps[step] for step in random.permutation(len(steps))])

    def micro_batches(self) -> Iterator[list[TokenizedRow]]:
        for step in range(self.start_step, self.schedule.max_steps):
            for items in self.micro_batch_items(step):
                yield [row for item in items for row in self.items[item]]


class StreamLoader(_Loader):
    """Streams: every step takes the next ``global batch`` items, the last one of a single stream what is left.

    Args:
        tables: the tables of each stream from its place on.
        start: the place of each stream.
        order: which stream gives the next item.
    """

    def __init__(
        self,
        tables: Callable[[], Sequence[Iterator[pa.Table]]],
        start: StreamPlaces,
        order: Iterator[int],
        schedule: StepSchedule,
        rank: Rank,
        collate: Collate,
        start_step: int,
    ) -> None:
        super().__init__(schedule, rank, collate, start_step)
        self.tables, self.order = tables, order
        self._reached = list(start)
        self._places: dict[int, StreamPlaces] = {}
        self._shared: list[list[StreamItem]] = []

    def stream_places(self, step: int) -> StreamPlaces | None:
        return self._places[step]

    def rows_of(self, step: int) -> list[list[PlacedRow]]:
        return [[row for item in items for row in item.placed] for items in self._shared]

    def step_items(self) -> Iterator[list[list[StreamItem]]]:
        """For each step, the items of each of this worker's micro-batches."""
        step, waiting = self.start_step, []
        if step >= self.schedule.max_steps:
            return
        streams = [iter_items(tables) for tables in self.tables()]
        for stream in self.order:
            item = next(streams[stream], None)
            if item is None:  # planned for many epochs: the first stream that ends is the end of all
                break
            self._reached[stream] = item.next_position
            waiting.append(item)
            if len(waiting) == self.schedule.global_batch_size:
                step += 1
                yield self._share(waiting, step)
                waiting = []
                if step == self.schedule.max_steps:
                    return
        # A mixture ends with its last whole step: its place in the order is the number of steps times their size.
        if waiting and len(self._reached) == 1:
            yield self._share(waiting, step + 1)

    def _share(self, items: list[StreamItem], step: int) -> list[list[StreamItem]]:
        self._places = {step: tuple(self._reached)}
        self._shared = [[items[place] for place in places] for places in self._mine([1] * len(items))]
        return self._shared

    def micro_batches(self) -> Iterator[list[TokenizedRow]]:
        for micro_batches in self.step_items():
            for items in micro_batches:
                yield [row for item in items for row in item.rows]


def eval_batches(rows: TokenRows, size: int, rank: Rank, collate: Collate) -> Iterator[Batch]:
    """This worker's share of the validation rows; every worker gets the same number of batches.

    A share that runs out goes on with batches that score nothing: under ZeRO-3 a forward pass is collective.
    """
    mine = list(range(rank.rank, len(rows), rank.world_size))
    largest = -(-len(rows) // rank.world_size)
    for start in range(0, largest, size):
        yield collate([rows[number] for number in mine[start : start + size]])
