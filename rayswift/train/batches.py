"""Micro-batches for one worker, in the plan's order, from any position.

Both loaders yield what one ``forward`` takes and end after ``max_steps`` optimiser steps or when the stream ends;
epochs are inside, so that Transformers' Trainer sees one long pass and the position is the step alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from rayswift.data.blocks import BlockRows
    from rayswift.train.plan import StepPlan

Row = tuple["np.ndarray", "np.ndarray"]
Batch = dict[str, "torch.Tensor"]


@dataclass(frozen=True)
class Rank:
    """Which share of every global batch this worker takes."""

    rank: int
    world_size: int


class TokenRows:
    """Rows of token blocks in the object store by number: ``(input_ids, labels)``, int32 arrays."""

    def __init__(self, rows: BlockRows) -> None:
        self._rows = rows
        self._tables: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Row:
        import ray

        block, row = (int(value) for value in self._rows.index[number])
        if block not in self._tables:
            # Zero-copy: the table is a view of the node's shared object store.
            self._tables[block] = ray.get(self._rows.refs[block]).select(["input_ids", "labels"])
        return _row_of(self._tables[block], row)


def _row_of(table: pa.Table, row: int) -> Row:
    ids, labels = (table[name][row].values.to_numpy(zero_copy_only=False) for name in ("input_ids", "labels"))
    return ids, labels


def collate(rows: list[Row], pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest: ``input_ids``, ``attention_mask`` and ``labels``, int64 (rows, length)."""
    import numpy as np
    import torch

    length = max(len(ids) for ids, _ in rows)
    input_ids = np.full((len(rows), length), pad_token_id, np.int64)
    labels = np.full((len(rows), length), -100, np.int64)
    attention_mask = np.zeros((len(rows), length), np.int64)
    for number, (ids, targets) in enumerate(rows):
        input_ids[number, : len(ids)] = ids
        labels[number, : len(ids)] = targets
        attention_mask[number, : len(ids)] = 1
    arrays = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


class _Loader:
    """What the two loaders share: the Trainer iterates one of them once."""

    def __init__(self, plan: StepPlan, rank: Rank, pad_token_id: int, start_step: int) -> None:
        self.plan, self.rank, self.pad_token_id, self.start_step = plan, rank, pad_token_id, start_step
        self._spent = False

    def __iter__(self) -> Iterator[Batch]:
        # The Trainer asks again when a stream ends before max_steps: there is nothing more.
        if self._spent:
            return iter(())
        self._spent = True
        return self._batches()

    def _batches(self) -> Iterator[Batch]:
        raise NotImplementedError

    def _collate_all(self, rows: list[Row]) -> Iterator[Batch]:
        size = self.plan.per_device_batch_size
        for start in range(0, len(rows), size):
            yield collate(rows[start : start + size], self.pad_token_id)


class EpochLoader(_Loader):
    """A dataset whose rows can be fetched by number: each epoch is a permutation seeded by ``seed + epoch``."""

    def __init__(
        self, rows: TokenRows, plan: StepPlan, rank: Rank, pad_token_id: int, start_step: int, seed: int, shuffle: bool
    ) -> None:
        super().__init__(plan, rank, pad_token_id, start_step)
        self.rows, self.seed, self.shuffle = rows, seed, shuffle

    def numbers(self, step: int) -> list[int]:
        """The rows this worker trains on in one step: micro-batch by micro-batch, its share of each."""
        import numpy as np

        assert self.plan.steps_per_epoch is not None
        epoch, within = divmod(step, self.plan.steps_per_epoch)
        order = self._order(epoch)
        size = self.plan.global_batch_size
        # A dataset smaller than one global batch is repeated inside it, so that no worker is left without a row.
        batch = order[np.arange(within * size, (within + 1) * size) % len(order)]
        shares = batch.reshape(-1, self.rank.world_size, self.plan.per_device_batch_size)
        return [int(number) for number in shares[:, self.rank.rank].reshape(-1)]

    def _order(self, epoch: int) -> np.ndarray:
        import numpy as np

        if getattr(self, "_cached", (None,))[0] != epoch:
            order = np.arange(len(self.rows))
            if self.shuffle:
                order = np.random.RandomState(self.seed + epoch).permutation(len(self.rows))
            self._cached = (epoch, order)
        return self._cached[1]

    def _batches(self) -> Iterator[Batch]:
        for step in range(self.start_step, self.plan.max_steps):
            yield from self._collate_all([self.rows[number] for number in self.numbers(step)])


class StreamLoader(_Loader):
    """A ``streaming_split`` shard: this worker's rows in order, ``global batch / world_size`` of them per step."""

    def __init__(
        self, blocks: Callable[[], Iterator[pa.Table]], plan: StepPlan, rank: Rank, pad_token_id: int, start_step: int
    ) -> None:
        super().__init__(plan, rank, pad_token_id, start_step)
        self.blocks = blocks

    def _batches(self) -> Iterator[Batch]:
        per_step = self.plan.global_batch_size // self.rank.world_size
        skip, step, waiting = self.start_step * per_step, self.start_step, []
        if step >= self.plan.max_steps:
            return
        for table in self.blocks():
            # Rows of steps that are done are skipped without being touched.
            skipped = min(skip, len(table))
            skip -= skipped
            for row in range(skipped, len(table)):
                waiting.append(_row_of(table, row))
                if len(waiting) == per_step:
                    yield from self._collate_all(waiting)
                    waiting, step = [], step + 1
                    if step == self.plan.max_steps:
                        return


def eval_batches(rows: TokenRows, size: int, rank: Rank, pad_token_id: int) -> Iterator[Batch]:
    """This worker's share of the validation rows; every worker gets the same number of batches.

    A share that runs out repeats a row with nothing to score: under ZeRO-3 a forward pass is collective.
    """
    mine = list(range(rank.rank, len(rows), rank.world_size))
    largest = -(-len(rows) // rank.world_size)
    for start in range(0, largest, size):
        numbers = mine[start : start + size]
        batch = collate([rows[number] for number in numbers or [0]], pad_token_id)
        if not numbers:
            batch["labels"].fill_(-100)
        yield batch
