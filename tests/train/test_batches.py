"""Which rows each worker trains on in which step, from token blocks in a real object store."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch

from rayswift.data.blocks import BlockRows
from rayswift.train.batches import Batch, EpochLoader, Rank, StreamLoader, TokenRows, collate, eval_batches
from rayswift.train.plan import StepPlan

PAD = 999


def table(numbers: range | list[int]) -> pa.Table:
    """Token rows that can be told apart: row n is n repeated n % 4 + 1 times, its first token not trained."""
    ids = [[n] * (n % 4 + 1) for n in numbers]
    labels = [[-100, *row[1:]] for row in ids]
    tokens = pa.list_(pa.int32())
    return pa.table({"input_ids": pa.array(ids, tokens), "labels": pa.array(labels, tokens)})


def token_rows(count: int) -> TokenRows:
    """Rows 0 … count-1, spread over blocks of three, whose blocks lie in the store in reverse."""
    import ray

    starts = list(range(0, count, 3))[::-1]
    refs = [ray.put(table(range(start, min(start + 3, count)))) for start in starts]
    index = [(starts.index(n // 3 * 3), n % 3) for n in range(count)]
    return TokenRows(BlockRows(refs, np.array(index, np.int64).reshape(-1, 2), np.zeros(count, np.int64)))


def numbers_of(batch: Batch) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def loader(
    rows: TokenRows, plan: StepPlan, world: tuple[int, int] = (0, 1), start: int = 0, seed: int = 42
) -> EpochLoader:
    return EpochLoader(rows, plan, Rank(*world), PAD, start, seed, shuffle=True)


def trained_on(rows: TokenRows, plan: StepPlan, world_size: int, start: int = 0) -> list[list[list[list[int]]]]:
    """Row numbers as [rank][step][micro-batch]."""
    found = []
    for rank in range(world_size):
        batches = [numbers_of(batch) for batch in loader(rows, plan, (rank, world_size), start)]
        per_step = plan.accumulation(world_size)
        found.append([batches[i : i + per_step] for i in range(0, len(batches), per_step)])
    return found


@pytest.fixture(scope="module")
def rows(ray_cluster: None) -> TokenRows:
    return token_rows(50)


def test_rows_are_fetched_by_number(rows: TokenRows) -> None:
    assert len(rows) == 50
    for number in (0, 49, 7, 8):
        ids, labels = rows[number]
        assert ids.tolist() == [number] * (number % 4 + 1)
        assert labels.tolist() == [-100, *ids.tolist()[1:]]


def test_collate_pads_on_the_right() -> None:
    rows = [(np.array([1, 2, 3], np.int32), np.array([-100, 2, 3], np.int32)), (np.array([4], np.int32),) * 2]
    batch = collate(rows, PAD)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, PAD, PAD]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 2, 3], [4, -100, -100]],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


PLAN = StepPlan(global_batch_size=12, per_device_batch_size=2, max_steps=9, steps_per_epoch=4)


def test_every_worker_count_trains_on_the_same_rows_in_each_step(rows: TokenRows) -> None:
    expected: list[list[int]] | None = None
    for world_size in (1, 2, 3, 6):
        found = trained_on(rows, PLAN, world_size)
        assert [len(steps) for steps in found] == [PLAN.max_steps] * world_size
        assert all(len(micro) == 2 for steps in found for step in steps for micro in step)
        union = [sorted(n for steps in found for micro in steps[step] for n in micro) for step in range(PLAN.max_steps)]
        assert all(len(set(step)) == PLAN.global_batch_size for step in union)
        expected = expected or union
        assert union == expected


def test_each_epoch_has_its_own_order_and_no_row_twice(rows: TokenRows) -> None:
    steps = [[n for micro in step for n in micro] for step in trained_on(rows, PLAN, 1)[0]]
    first, second = ([n for step in steps[a : a + 4] for n in step] for a in (0, 4))
    assert len(set(first)) == len(first) == 48
    assert len(set(second)) == len(second) == 48
    assert first != second
    # The two rows that an epoch leaves over are other ones the next time.
    assert set(range(50)) - set(first) != set(range(50)) - set(second)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("start", [1, 4, 6, 9])
def test_resuming_gives_exactly_the_later_batches(rows: TokenRows, world_size: int, start: int) -> None:
    whole = trained_on(rows, PLAN, world_size)
    assert trained_on(rows, PLAN, world_size, start) == [steps[start:] for steps in whole]


def test_the_seed_decides_the_order(rows: TokenRows) -> None:
    orders = [[numbers_of(batch) for batch in loader(rows, PLAN, seed=seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_without_shuffling_rows_come_in_order(rows: TokenRows) -> None:
    unshuffled = EpochLoader(rows, PLAN, Rank(0, 1), PAD, 0, seed=42, shuffle=False)
    found = [n for batch in unshuffled for n in numbers_of(batch)]
    assert found == [*range(48), *range(48), *range(12)]


def test_a_loader_is_read_once(rows: TokenRows) -> None:
    once = loader(rows, PLAN)
    assert len(list(once)) == 9 * 6
    assert list(once) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_fewer_rows_than_a_global_batch(ray_cluster: None, world_size: int) -> None:
    few = token_rows(3)
    plan = StepPlan(global_batch_size=4, per_device_batch_size=2, max_steps=2, steps_per_epoch=1)
    for step in range(2):
        numbers = [n for rank in range(world_size) for n in loader(few, plan, (rank, world_size)).numbers(step)]
        assert len(numbers) == 4
        assert set(numbers) == {0, 1, 2}


def stream(sizes: list[int]) -> Iterator[pa.Table]:
    first = 0
    for size in sizes:
        yield table(range(first, first + size))
        first += size


@pytest.mark.parametrize("sizes", [[4] * 10, [40], [1] * 40, [3, 11, 0, 2, 9, 15]])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_stream_is_cut_into_steps_whatever_its_blocks_are(sizes: list[int], start: int) -> None:
    plan = StepPlan(global_batch_size=8, per_device_batch_size=2, max_steps=3, steps_per_epoch=None)
    found = StreamLoader(lambda: stream(sizes), plan, Rank(1, 2), PAD, start)
    steps = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert [numbers_of(batch) for batch in found] == steps[2 * start :]


def test_a_stream_that_ends_early_gives_whole_steps_only() -> None:
    plan = StepPlan(global_batch_size=4, per_device_batch_size=4, max_steps=5, steps_per_epoch=None)
    ended = StreamLoader(lambda: stream([4, 4, 3]), plan, Rank(0, 1), PAD, 0)
    assert [numbers_of(batch) for batch in ended] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert list(ended) == []


def test_a_stream_is_read_no_further_than_needed() -> None:
    read = []

    def blocks() -> Iterator[pa.Table]:
        for block in stream([4] * 10):
            read.append(len(block))
            yield block

    plan = StepPlan(global_batch_size=4, per_device_batch_size=4, max_steps=2, steps_per_epoch=None)
    assert len(list(StreamLoader(blocks, plan, Rank(0, 1), PAD, 0))) == 2
    assert len(read) == 2


@pytest.mark.parametrize(
    ("count", "world_size", "size"), [(7, 3, 1), (7, 3, 2), (5, 2, 4), (1, 4, 8), (12, 3, 2), (9, 1, 4)]
)
def test_every_worker_gets_the_same_number_of_evaluation_batches(
    ray_cluster: None, count: int, world_size: int, size: int
) -> None:
    rows = token_rows(count)
    shares = [list(eval_batches(rows, size, Rank(rank, world_size), PAD)) for rank in range(world_size)]
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
