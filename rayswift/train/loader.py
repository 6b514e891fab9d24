"""Micro-batches for one worker, in the plan's order, from any position.

A step trains a number of units (rows or packs) that does not depend on the number of workers; they are dealt into
cells, ``gradient accumulation × world_size`` of them, and each worker takes its cells. Epochs are inside, so that
Transformers' Trainer sees one long pass and the position is the step (and for a stream the place that step ends at).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.data.tokens.table import (
    LazyItems,
    StreamItem,
    StreamPlaces,
    TokenizedRow,
    TokenRows,
    TrainItems,
    iter_items,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch

    from rayswift.train.schedule import StepPlan

Batch = dict[str, "torch.Tensor"]
Collate = Callable[[Sequence[TokenizedRow]], Batch]
#: Steps whose rows are sorted by length together (Transformers takes 50 batches too).
BUCKET_WINDOW = 50


@dataclass(frozen=True)
class Rank:
    """Which share of every global batch this worker takes."""

    rank: int
    world_size: int


# --- rows to tensors --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Collator:
    """Rows to what one ``forward`` takes.

    pad_token_id: what fills up shorter rows. flat: join the rows to one sequence (packing, ``--padding_free``).
    """

    pad_token_id: int
    flat: bool = False

    def __call__(self, rows: Sequence[TokenizedRow]) -> Batch:
        """One micro-batch; without rows, one that trains nothing (other workers wait for every forward pass)."""
        if not rows:
            import numpy as np

            nothing = np.full(2, self.pad_token_id, np.int32)
            rows = [TokenizedRow(nothing, np.full(2, -100, np.int32))]
        return flatten(rows) if self.flat else pad(rows, self.pad_token_id)


@dataclass(frozen=True)
class PairCollator:
    """Pairs to what TRL's ``DPOTrainer`` takes: ``input_ids``, ``attention_mask``, ``completion_mask``, int64
    (2 · pairs, length), all chosen conversations before all rejected ones; and ``num_pairs``, an int64 scalar."""

    pad_token_id: int

    def __call__(self, rows: Sequence[TokenizedRow]) -> Batch:
        """One micro-batch; without pairs, one of a single answered nothing that counts as no pair."""
        import numpy as np
        import torch

        num_pairs = len(rows)
        if not rows:
            nothing = np.full(4, self.pad_token_id, np.int32)
            rows = [TokenizedRow(nothing, np.array([-100, 0, -100, 0], np.int32), rejected_start=2)]
        chosen, rejected = zip(*(row.chosen_and_rejected() for row in rows), strict=True)
        batch = pad([*chosen, *rejected], self.pad_token_id)
        batch["completion_mask"] = (batch.pop("labels") != -100).long()
        return {**batch, "num_pairs": torch.tensor(num_pairs)}


def pad(rows: Sequence[TokenizedRow], pad_token_id: int) -> Batch:
    """Pad rows on the right to the longest: ``input_ids``, ``attention_mask``, ``labels``, int64 (rows, length), and
    ``loss_scale`` float32 if any row has weights."""
    import numpy as np
    import torch

    shape = (len(rows), max(len(row.input_ids) for row in rows))
    arrays = {
        "input_ids": np.full(shape, pad_token_id, np.int64),
        "attention_mask": np.zeros(shape, np.int64),
        "labels": np.full(shape, -100, np.int64),
    }
    if any(row.loss_scale is not None for row in rows):
        arrays["loss_scale"] = np.zeros(shape, np.float32)
    for number, row in enumerate(rows):
        end = len(row.input_ids)
        arrays["input_ids"][number, :end] = row.input_ids
        arrays["attention_mask"][number, :end] = 1
        arrays["labels"][number, :end] = row.labels
        if "loss_scale" in arrays:
            arrays["loss_scale"][number, :end] = weights_of(row)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def flatten(rows: Sequence[TokenizedRow]) -> Batch:
    """Join rows to one sequence that no attention crosses: ``input_ids``, ``labels``, ``position_ids`` int64
    (1, tokens), positions restarting with each row, and the bounds of the rows as variable-length attention wants
    them: ``cu_seq_lens_q``, ``cu_seq_lens_k`` int32 (rows + 1,), ``max_length_q``, ``max_length_k``."""
    import numpy as np
    import torch

    lengths = [len(row.input_ids) for row in rows]
    bounds = torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
    arrays = {
        "input_ids": np.concatenate([row.input_ids for row in rows]).astype(np.int64),
        "labels": np.concatenate([row.labels for row in rows]).astype(np.int64),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
    }
    if any(row.loss_scale is not None for row in rows):
        arrays["loss_scale"] = np.concatenate([weights_of(row) for row in rows])
    batch: dict[str, Any] = {name: torch.from_numpy(array)[None] for name, array in arrays.items()}
    # The first token of a row is predicted by nothing: the last token of the row before must not learn it.
    batch["labels"][0, bounds[:-1].long()] = -100
    longest = max(lengths)
    batch |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return batch


def weights_of(row: TokenizedRow) -> np.ndarray:
    """The training weight of each token, float32."""
    import numpy as np

    return row.loss_scale if row.loss_scale is not None else (row.labels != -100).astype(np.float32)


# --- steps to micro-batches -------------------------------------------------------------------------------------


def deal(costs: Sequence[int], cells: int, size: int) -> list[list[int]]:
    """Which units of a step each cell (one micro-batch of one worker) takes.

    Args:
        costs: tokens of each unit.
        cells: number of cells.
        size: units of a full cell.

    Returns:
        Units in order, ``size`` to a cell; fewer units leave the last cells short or empty, more than fit go one by
        one to the cell where the padded batch stays smallest.
    """
    dealt = [list(range(start, min(start + size, len(costs)))) for start in range(0, cells * size, size)]
    longest = [max((costs[unit] for unit in cell), default=0) for cell in dealt]
    for unit in range(cells * size, len(costs)):
        cell = min(range(cells), key=lambda cell: max(longest[cell], costs[unit]) * (len(dealt[cell]) + 1))
        dealt[cell].append(unit)
        longest[cell] = max(longest[cell], costs[unit])
    return dealt


class _Loader:
    """What the two loaders share: the Trainer iterates one of them once."""

    def __init__(self, plan: StepPlan, rank: Rank, collate: Collate, start_step: int) -> None:
        self.plan, self.rank, self.collate, self.start_step = plan, rank, collate, start_step
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

    def _mine(self, costs: Sequence[int]) -> Iterator[list[int]]:
        """The units of each of this worker's cells in one step."""
        cells = deal(costs, self.plan.accumulation(self.rank.world_size) * self.rank.world_size,
                     self.plan.per_device_batch_size)  # fmt: skip
        return iter(cells[self.rank.rank :: self.rank.world_size])


class EpochLoader(_Loader):
    """A dataset whose units can be fetched by number: each epoch is a permutation seeded by ``seed + epoch``.

    An epoch trains every unit exactly once. With ``bucket`` (``--train_sampling_strategy group_by_length``) units of
    like length come in one step, so that little is padded: lengths are sorted within windows of many steps, and the
    steps are shuffled again.
    """

    def __init__(
        self,
        units: TrainItems | LazyItems,
        plan: StepPlan,
        rank: Rank,
        collate: Collate,
        start_step: int,
        seed: int,
        shuffle: bool,
        bucket: bool = False,
    ) -> None:
        super().__init__(plan, rank, collate, start_step)
        self.units, self.seed, self.shuffle, self.bucket = units, seed, shuffle, bucket
        self._order: tuple[int, Any] = (-1, None)

    def step_units(self, step: int) -> np.ndarray:
        """The units that all workers together train in one step."""
        steps = self.plan.steps_per_epoch
        assert steps is not None
        epoch, within = divmod(step, steps)
        order = self._epoch_order(epoch)
        # Steps of an epoch differ by one unit at most.
        return order[within * len(order) // steps : (within + 1) * len(order) // steps]

    def unit_cells(self, step: int) -> list[list[int]]:
        """The units of each of this worker's micro-batches in one step."""
        units = self.step_units(step)
        costs = self.units.lengths[units].tolist()
        return [[int(units[place]) for place in cell] for cell in self._mine(costs)]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        import numpy as np

        if self._order[0] != epoch:
            order, random = np.arange(len(self.units)), np.random.RandomState(self.seed + epoch)
            if self.shuffle:
                order = random.permutation(len(self.units))
            if self.bucket:
                order = self._by_length(order, random)
            self._order = (epoch, order)
        return self._order[1]

    def _by_length(self, order: np.ndarray, random: np.random.RandomState) -> np.ndarray:
        import numpy as np

        window, size = BUCKET_WINDOW * self.plan.global_batch_size, self.plan.global_batch_size
        parts = [order[start : start + window] for start in range(0, len(order), window)]
        ordered = np.concatenate([part[np.argsort(self.units.lengths[part], kind="stable")] for part in parts])
        steps = [ordered[start : start + size] for start in range(0, len(ordered), size)]
        return np.concatenate([steps[step] for step in random.permutation(len(steps))])

    def micro_batches(self) -> Iterator[list[TokenizedRow]]:
        for step in range(self.start_step, self.plan.max_steps):
            for cell in self.unit_cells(step):
                yield [row for unit in cell for row in self.units[unit]]


class StreamLoader(_Loader):
    """Streams: every step takes the next ``global batch`` units, the last one of a single stream what is left.

    Args:
        tables: the tables of each stream from its place on.
        start: the place of each stream.
        order: which stream gives the next unit.
    """

    def __init__(
        self,
        tables: Callable[[], Sequence[Iterator[pa.Table]]],
        start: StreamPlaces,
        order: Iterator[int],
        plan: StepPlan,
        rank: Rank,
        collate: Collate,
        start_step: int,
    ) -> None:
        super().__init__(plan, rank, collate, start_step)
        self.tables, self.order = tables, order
        self._reached = list(start)
        self._places: dict[int, StreamPlaces] = {}

    def stream_places(self, step: int) -> StreamPlaces | None:
        return self._places[step]

    def step_cells(self) -> Iterator[list[list[StreamItem]]]:
        """For each step, the units of each of this worker's micro-batches."""
        step, waiting = self.start_step, []
        if step >= self.plan.max_steps:
            return
        for unit in self._units():
            waiting.append(unit)
            if len(waiting) == self.plan.global_batch_size:
                step += 1
                yield self._cells(waiting, step)
                waiting = []
                if step == self.plan.max_steps:
                    return
        # A mixture ends with its last whole step: its place in the order is the number of steps times their size.
        if waiting and len(self._reached) == 1:
            yield self._cells(waiting, step + 1)

    def _units(self) -> Iterator[StreamItem]:
        """Units until one of the streams ends, which is planned for many epochs."""
        streams = [iter_items(tables) for tables in self.tables()]
        for stream in self.order:
            unit = next(streams[stream], None)
            if unit is None:
                return
            self._reached[stream] = unit.next_position
            yield unit

    def _cells(self, units: list[StreamItem], step: int) -> list[list[StreamItem]]:
        self._places = {step: tuple(self._reached)}
        return [[units[place] for place in cell] for cell in self._mine([1] * len(units))]

    def micro_batches(self) -> Iterator[list[TokenizedRow]]:
        for cells in self.step_cells():
            for cell in cells:
                yield [row for unit in cell for row in unit.rows]


def eval_batches(rows: TokenRows, size: int, rank: Rank, collate: Collate) -> Iterator[Batch]:
    """This worker's share of the validation rows; every worker gets the same number of batches.

    A share that runs out goes on with batches that score nothing: under ZeRO-3 a forward pass is collective.
    """
    mine = list(range(rank.rank, len(rows), rank.world_size))
    largest = -(-len(rows) // rank.world_size)
    for start in range(0, largest, size):
        yield collate([rows[number] for number in mine[start : start + size]])
