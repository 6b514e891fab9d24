"""Which rows each worker trains on in which step, from token files."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from rayswift.data.flow.encode_tasks import token_schema
from rayswift.data.tokens.packing import pack
from rayswift.data.tokens.row_index import RowIndex
from rayswift.data.tokens.table import StreamPosition, TokenizedRow, TokenRows, TrainItems
from rayswift.train.collate import Batch, Collator, flatten, pad
from rayswift.train.loader import EpochLoader, Rank, StreamLoader, distribute, eval_batches
from rayswift.train.schedule import StepSchedule

PAD = 999
COLLATE = Collator(PAD)


def table(numbers: range | list[int]) -> pa.Table:
    """Token rows that can be told apart: row n is n repeated n % 4 + 1 times, its first token not trained."""
    ids = [[n] * (n % 4 + 1) for n in numbers]
    columns = {
        "input_ids": ids,
        "labels": [[-100, *row[1:]] for row in ids],
        "loss_scale": [None] * len(ids),
        **dict.fromkeys(("rejected_start", "text_ends", "targets"), [None] * len(ids)),
        "source": list(numbers),
        "length": [len(row) for row in ids],
    }
    return pa.table(columns, token_schema())


def block_rows(count: int, folder: Path) -> RowIndex:
    """Rows 0 … count-1, spread over files of six rows in batches of two, the files in reverse."""
    starts = list(range(0, count, 6))[::-1]
    files = [str(folder / f"{start}.arrow") for start in starts]
    for start, file in zip(starts, files, strict=True):
        with pa.ipc.new_file(file, token_schema()) as writer:
            writer.write_table(table(range(start, min(start + 6, count))), max_chunksize=2)
    index = np.array([(starts.index(n // 6 * 6), n % 6) for n in range(count)], np.int64).reshape(-1, 2)
    return RowIndex(files, index, np.array([n % 4 + 1 for n in range(count)]))


def numbers_of(batch: Batch) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def loader(
    rows: RowIndex, plan: StepSchedule, world: tuple[int, int] = (0, 1), start: int = 0, seed: int = 42
) -> EpochLoader:
    return EpochLoader(TrainItems(rows, None), plan, Rank(*world), COLLATE, start, seed, shuffle=True)


def trained_on(rows: RowIndex, plan: StepSchedule, world_size: int, start: int = 0) -> list[list[list[list[int]]]]:
    """Row numbers as [rank][step][micro-batch]."""
    found = []
    for rank in range(world_size):
        batches = [numbers_of(batch) for batch in loader(rows, plan, (rank, world_size), start)]
        per_step = plan.accumulation(world_size)
        found.append([batches[i : i + per_step] for i in range(0, len(batches), per_step)])
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> RowIndex:
    return block_rows(50, tmp_path_factory.mktemp("rows"))


def test_rows_are_fetched_by_number(rows: RowIndex) -> None:
    read = TokenRows(rows)
    assert len(read) == 50
    for number in (0, 49, 7, 8):
        found = read[number]
        assert found.input_ids.tolist() == [number] * (number % 4 + 1)
        assert found.labels.tolist() == [-100, *found.input_ids.tolist()[1:]]
        assert (found.loss_scale, found.rejected_start) == (None, None)


def row(ids: list[int], labels: list[int], weights: list[float] | None = None) -> TokenizedRow:
    scale = None if weights is None else np.array(weights, np.float32)
    return TokenizedRow(np.array(ids, np.int32), np.array(labels, np.int32), scale)


TWO_ROWS = [row([1, 2, 3], [-100, 2, 3], [0.0, 2.0, 0.5]), row([4, 5], [4, 5])]


def test_padding_is_on_the_right() -> None:
    batch = pad(TWO_ROWS, PAD)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 5, PAD]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 2, 3], [4, 5, -100]],
        "loss_scale": [[0.0, 2.0, 0.5], [1.0, 1.0, 0.0]],
    }
    assert {batch[name].dtype for name in ("input_ids", "attention_mask", "labels")} == {torch.int64}
    assert "loss_scale" not in pad(TWO_ROWS[1:], PAD)


def test_joined_rows_restart_their_positions_and_never_predict_each_other() -> None:
    batch = flatten(TWO_ROWS)
    assert (batch.pop("max_length_q"), batch.pop("max_length_k")) == (3, 3)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[-100, 2, 3, -100, 5]],
        "position_ids": [[0, 1, 2, 0, 1]],
        "loss_scale": [[0.0, 2.0, 0.5, 1.0, 1.0]],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
        "seq_idx": [[0, 0, 0, 1, 1]],
    }


@pytest.mark.parametrize("flat", [True, False])
def test_a_micro_batch_without_rows_trains_nothing(flat: bool) -> None:
    batch = Collator(PAD, flat)([])
    assert batch["input_ids"].numel() > 0
    assert (batch["labels"] == -100).all()


def test_items_are_distributed_evenly_and_surplus_ones_go_where_padding_is_least() -> None:
    assert distribute([1] * 8, micro_batches=4, size=2) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert distribute([1] * 5, micro_batches=4, size=2) == [[0, 1], [2, 3], [4], []]
    assert distribute([9, 3, 8, 7, 3], micro_batches=4, size=1) == [[0], [1, 4], [2], [3]]


PLAN = StepSchedule(global_batch_size=12, per_device_batch_size=2, max_steps=9, steps_per_epoch=4)


def test_every_worker_count_trains_on_the_same_rows_in_each_step(rows: RowIndex) -> None:
    expected: list[list[int]] | None = None
    for world_size in (1, 2, 3, 6):
        found = trained_on(rows, PLAN, world_size)
        assert [len(steps) for steps in found] == [PLAN.max_steps] * world_size
        assert all(len(micro) in (2, 3) for steps in found for step in steps for micro in step)
        union = [sorted(n for steps in found for micro in steps[step] for n in micro) for step in range(PLAN.max_steps)]
        assert all(12 <= len(set(step)) <= 13 for step in union)
        expected = expected or union
        assert union == expected


def test_each_epoch_trains_every_row_once_in_its_own_order(rows: RowIndex) -> None:
    steps = [[n for micro in step for n in micro] for step in trained_on(rows, PLAN, 1)[0]]
    first, second = ([n for step in steps[a : a + 4] for n in step] for a in (0, 4))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("start", [1, 4, 6, 9])
def test_resuming_gives_exactly_the_later_batches(rows: RowIndex, world_size: int, start: int) -> None:
    whole = trained_on(rows, PLAN, world_size)
    assert trained_on(rows, PLAN, world_size, start) == [steps[start:] for steps in whole]


def test_the_seed_decides_the_order(rows: RowIndex) -> None:
    orders = [[numbers_of(batch) for batch in loader(rows, PLAN, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffling_rows_come_in_order(rows: RowIndex) -> None:
    plan = StepSchedule(global_batch_size=10, per_device_batch_size=2, max_steps=11, steps_per_epoch=5)
    unshuffled = EpochLoader(TrainItems(rows, None), plan, Rank(0, 1), COLLATE, 0, seed=42, shuffle=False)
    found = [n for batch in unshuffled for n in numbers_of(batch)]
    assert found == [*range(50), *range(50), *range(10)]


def test_a_loader_is_read_once(rows: RowIndex) -> None:
    once = loader(rows, PLAN)
    assert len(list(once)) == 9 * 6
    assert list(once) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_fewer_rows_than_a_global_batch(tmp_path: Path, world_size: int) -> None:
    few = block_rows(3, tmp_path)
    plan = StepSchedule(global_batch_size=4, per_device_batch_size=2, max_steps=2, steps_per_epoch=1)
    for step in range(2):
        shares = [loader(few, plan, (rank, world_size)).micro_batch_items(step) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        assert sorted(n for share in shares for batch in share for n in batch) == [0, 1, 2]


def test_packs_are_trained_whole(rows: RowIndex) -> None:
    packs = pack(rows.lengths, max_length=8)
    assert len(packs) == -(-int(rows.lengths.sum()) // 8)
    plan = StepSchedule(global_batch_size=2, per_device_batch_size=1, max_steps=8, steps_per_epoch=8)
    batches = list(
        EpochLoader(TrainItems(rows, packs), plan, Rank(0, 1), Collator(PAD, flat=True), 0, 42, shuffle=True)
    )
    assert max(batch["input_ids"].numel() for batch in batches) == 8
    found = [int(batch["input_ids"][0, start]) for batch in batches for start in batch["cu_seq_lens_q"][:-1]]
    assert sorted(found) == list(range(50))


def test_rows_of_like_length_come_in_one_step(rows: RowIndex) -> None:
    def lengths(bucket: bool) -> list[set[int]]:
        units = TrainItems(rows, None)
        found = EpochLoader(units, plan, Rank(0, 1), COLLATE, 0, 42, shuffle=True, bucket=bucket)
        steps = [found.step_items(step).tolist() for step in range(10)]
        assert sorted(n for step in steps for n in step) == list(range(50))
        return [{int(rows.lengths[n]) for n in step} for step in steps]

    plan = StepSchedule(global_batch_size=5, per_device_batch_size=5, max_steps=10, steps_per_epoch=10)
    assert sum(map(len, lengths(bucket=True))) <= 14 < 25 < sum(map(len, lengths(bucket=False)))


# --- streams ----------------------------------------------------------------------------------------------------


def stream(sizes: list[int]) -> Iterator[pa.Table]:
    """Tables of these sizes, rows numbered through, each row a unit; a task ends with every second table."""
    first = 0
    for number, size in enumerate(sizes):
        units = np.arange(size) + (sizes[number - 1] if number % 2 else 0)
        places = {"task": np.full(size, number // 2), "item": units, "item_rows": np.ones(size, np.int64)}
        found = table(range(first, first + size))
        for name, values in places.items():
            found = found.append_column(name, pa.array(values))
        yield found
        first += size


def one_stream(tables: Callable[[], Iterator[pa.Table]], plan: StepSchedule, rank: Rank) -> StreamLoader:
    start = (StreamPosition(),)
    return StreamLoader(lambda: [tables()], start, itertools.repeat(0), plan, rank, COLLATE, 0)


@pytest.mark.parametrize("sizes", [[4] * 10, [40], [1] * 40, [3, 11, 0, 2, 9, 15]])
def test_a_stream_is_cut_into_steps_whatever_its_blocks_are(sizes: list[int]) -> None:
    plan = StepSchedule(global_batch_size=8, per_device_batch_size=2, max_steps=3, steps_per_epoch=None)
    found = one_stream(lambda: stream(sizes), plan, Rank(1, 2))
    assert [numbers_of(batch) for batch in found] == [[2, 3], [6, 7], [10, 11], [14, 15], [18, 19], [22, 23]]


def test_a_stream_that_ends_early_ends_with_a_smaller_step() -> None:
    plan = StepSchedule(global_batch_size=4, per_device_batch_size=2, max_steps=5, steps_per_epoch=None)
    shares = [one_stream(lambda: stream([4, 4, 2]), plan, Rank(rank, 2)) for rank in range(2)]
    trained = [[numbers_of(batch) for batch in share if (batch["labels"] != -100).any()] for share in shares]
    assert trained == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7]]]
    assert shares[0].stream_places(3) == ((1, 2),)
    assert list(shares[0]) == []


def test_a_stream_is_read_no_further_than_needed() -> None:
    read = []

    def blocks() -> Iterator[pa.Table]:
        for block in stream([4] * 10):
            read.append(len(block))
            yield block

    plan = StepSchedule(global_batch_size=4, per_device_batch_size=4, max_steps=2, steps_per_epoch=None)
    assert len(list(one_stream(blocks, plan, Rank(0, 1)))) == 2
    assert len(read) == 2


def test_streams_are_mixed_in_the_given_order_and_each_keeps_its_place() -> None:
    def tables() -> list[Iterator[pa.Table]]:
        return [stream([4, 4]), (table.slice(1) for table in stream([3, 3]))]

    plan = StepSchedule(global_batch_size=3, per_device_batch_size=3, max_steps=9, steps_per_epoch=None)
    order = itertools.cycle([0, 1, 0])
    start = (StreamPosition(), StreamPosition(0, 1))
    found = StreamLoader(tables, start, order, plan, Rank(0, 1), COLLATE, 0)
    steps, places = [], []
    for batch in found:
        steps.append(numbers_of(batch))
        places.append(found.stream_places(len(steps)))
    # The second stream's rows are 1, 2 of its first table and 4, 5 of its second; it ends the mixture.
    assert steps == [[0, 1, 1], [2, 2, 3], [4, 4, 5], [6, 5, 7]]
    assert places == [((0, 2), (0, 2)), ((0, 4), (0, 3)), ((0, 6), (0, 5)), ((0, 8), (0, 6))]


@pytest.mark.parametrize(
    ("count", "world_size", "size"), [(7, 3, 1), (7, 3, 2), (5, 2, 4), (1, 4, 8), (12, 3, 2), (9, 1, 4)]
)
def test_every_worker_gets_the_same_number_of_evaluation_batches(
    tmp_path: Path, count: int, world_size: int, size: int
) -> None:
    rows = TokenRows(block_rows(count, tmp_path))
    shares = [list(eval_batches(rows, size, Rank(rank, world_size), COLLATE)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    trained = [n for n in range(count) if n % 4]  # row n has n % 4 trained tokens
    scored = [
        int(row[0])
        for share in shares
        for batch in share
        for row, labels in zip(batch["input_ids"], batch["labels"], strict=True)
        if (labels != -100).any()
    ]
    assert sorted(scored) == trained
