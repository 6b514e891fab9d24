"""Whatever kills a run and however many workers go on, every epoch trains every row once, in the undisturbed order.

A run is simulated at the level of its loaders: each attempt makes one per worker, from the position that the last
checkpoint holds, and reads some steps from them. Rows, files, packs and stream tasks are real.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rayswift.arguments import make_arguments
from rayswift.data import files as sources
from rayswift.data.flow import plan as planning
from rayswift.data.flow import stream as streaming
from rayswift.data.flow.cache import TokenCache
from rayswift.data.flow.plan import plan_streams
from rayswift.data.flow.prepare import load_train_data
from rayswift.data.flow.stream import task_tokens
from rayswift.data.names import resolve_datasets
from rayswift.data.tokens.encoder import Encoder
from rayswift.data.tokens.packing import pack
from rayswift.data.tokens.table import StreamPlaces, StreamPosition, TokenizedRow, TrainItems
from rayswift.train.collate import Collator
from rayswift.train.loader import EpochLoader, Rank, StreamLoader
from rayswift.train.schedule import StepSchedule

ROWS = 60
PACK = 24
CHECK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@dataclass(frozen=True)
class Source:
    """A dataset as loaders see it; ``loader(rank, plan, step, places)`` makes the loader of one worker."""

    loader: Callable[[Rank, StepSchedule, int, StreamPlaces], Any]
    steps_per_epoch: int | None
    start: StreamPlaces = ()


@pytest.fixture(scope="module")
def encoder(smollm2_dir: str) -> Encoder:
    return Encoder(smollm2_dir, use_chat_template=False, loss_scale="all")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows of 3 to 20 tokens whose first word is their number, over four files."""
    folder = tmp_path_factory.mktemp("dataset")
    rng = np.random.RandomState(0)
    for file in range(4):
        rows = [{"text": f"{file * 15 + n}" + " and" * int(rng.randint(1, 17))} for n in range(15)]
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def number_of(row: TokenizedRow, encoder: Encoder) -> int:
    return int(encoder.tokenizer.decode(row.input_ids, skip_special_tokens=True).split()[0])


BATCH = 6


@cache
def epoch_source(dataset: str, encoder: Encoder, cache_dir: str, packing: bool, seed: int) -> Source:
    args = make_arguments("sft", model="m/m", dataset=[dataset], split_dataset_ratio=0, data_seed=seed)
    data = load_train_data(args, resolve_datasets(args), encoder, lambda *_: None, TokenCache(cache_dir))
    assert data.train is not None
    units = TrainItems(data.train, pack(data.train.lengths, PACK) if packing else None)
    steps = -(-len(units) // BATCH) if packing else len(units) // BATCH

    def loader(rank: Rank, plan: StepSchedule, step: int, _: StreamPlaces) -> EpochLoader:
        return EpochLoader(units, plan, rank, Collator(0, packing), step, seed, shuffle=True)

    return Source(loader, steps)


@cache
def stream_source(
    datasets: tuple[str, ...], encoder: Encoder, packing: bool, seed: int, mix: tuple[float, ...] | None
) -> Source:
    args = make_arguments(
        "sft", model="m/m", dataset=list(datasets), streaming=True, max_steps=10**6, data_seed=seed,
        shuffle_buffer_size=7, interleave_prob=list(mix) if mix else None,
    )  # fmt: skip
    streams = plan_streams(args, resolve_datasets(args).train, PACK if packing else None)
    for plan in streams.plans:
        assert len({epoch for task in plan.tasks for epoch, _ in task}) == 2

    @cache
    def task_tables(stream: int, task: int, first_unit: int) -> list[pa.Table]:
        """A task from a unit on, encoded once for all runs that read it from there."""
        return list(task_tokens(streams.plans[stream], task, first_unit, encoder, None))

    def tables(stream: int, start: StreamPosition) -> Iterator[pa.Table]:
        """What a reader hands out, without Ray."""
        for task in range(start.task, len(streams.plans[stream].tasks)):
            yield from task_tables(stream, task, start.item if task == start.task else 0)

    def loader(rank: Rank, steps: StepSchedule, step: int, places: StreamPlaces) -> StreamLoader:
        order = streams.order(step * steps.global_batch_size)
        return StreamLoader(lambda: list(map(tables, range(len(places)), places)), places, order, steps, rank,
                            Collator(0, packing), step)  # fmt: skip

    return Source(loader, None, streams.start())


Attempt = tuple[int, int]  # (workers, steps until they are killed)


def run(source: Source, plan: StepSchedule, attempts: list[Attempt], encoder: Encoder) -> list[list[list[int]]]:
    """Row numbers as [step][micro-batch in the order of the world]; the last attempt goes on to the end."""
    trained: list[list[list[int]]] = []
    places = source.start
    for number, (workers, steps) in enumerate(attempts):
        accumulation = plan.accumulation(workers)
        loaders = [source.loader(Rank(rank, workers), plan, len(trained), places) for rank in range(workers)]
        streams = [loader.micro_batches() for loader in loaders]
        left = steps if number < len(attempts) - 1 else 10**6
        while left and len(trained) < plan.max_steps:
            shares = [[rows for _ in range(accumulation) for rows in _take(stream)] for stream in streams]
            if not shares[0]:
                break
            assert len({len(share) for share in shares}) == 1
            micro = [rows for together in zip(*shares, strict=True) for rows in together]
            trained.append([[number_of(row, encoder) for row in rows] for rows in micro])
            left -= 1
            # What a checkpoint after this step holds; every worker agrees on it.
            reached = {loader.stream_places(len(trained)) for loader in loaders}
            assert len(reached) == 1
            places = reached.pop() or ()
        # A killed worker group has often read on; that must not matter.
        for stream in streams:
            next(stream, None)
    return trained


def _take(stream: Iterator[list[TokenizedRow]]) -> list[list[TokenizedRow]]:
    found = next(stream, None)
    return [] if found is None else [found]


attempts = st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(0, 9)), min_size=1, max_size=5)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming_", [False, True])
@CHECK
@example(attempts=[(1, 2), (2, 3), (3, 1), (1, 4)], seed=0)
@given(attempts=attempts, seed=st.integers(0, 3))
def test_any_kill_and_any_worker_count(
    packing: bool,
    streaming_: bool,
    attempts: list[Attempt],
    seed: int,
    dataset: str,
    encoder: Encoder,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_shards(monkeypatch)
    if streaming_:
        source = stream_source((dataset,), encoder, packing, seed, None)
        plan = StepSchedule(BATCH, 1, 10**6, None)
    else:
        cache_dir = str(tmp_path_factory.getbasetemp() / "cache")
        source = epoch_source(dataset, encoder, cache_dir, packing, seed)
        assert source.steps_per_epoch is not None
        plan = StepSchedule(BATCH, 1, 2 * source.steps_per_epoch, source.steps_per_epoch)
    found = run(source, plan, attempts, encoder)
    rows = [n for step in found for micro in step for n in micro]
    # Two epochs, each of them the whole dataset. A stream's step may hold the end of one and the start of the next.
    assert sorted(rows[:ROWS]) == sorted(rows[ROWS:]) == list(range(ROWS))
    # For the same number of workers, the same micro-batches in the same order as an undisturbed run; for another
    # number, the same rows in the same step.
    check_undisturbed(found, source, plan, attempts, encoder)


def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream of several tasks of several shards, over two epochs."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)
    monkeypatch.setattr(planning, "SHARD_BYTES", 700)
    monkeypatch.setattr(streaming, "STREAM_PACKING_WINDOW", 20)
    monkeypatch.setattr(planning, "MAX_PLANNED_TASKS", 10**6)
    monkeypatch.setattr(planning, "MAX_PLANNED_EPOCHS", 2)


def check_undisturbed(
    found: list[list[list[int]]], source: Source, plan: StepSchedule, attempts: list[Attempt], encoder: Encoder
) -> None:
    """Each step's rows are those of a run that nothing disturbs, with the same number of workers in the same order."""
    expected = undisturbed(source, plan, attempts[-1][0], encoder)
    assert [sorted(n for micro in step for n in micro) for step in found] == [
        sorted(n for micro in step for n in micro) for step in expected
    ]
    if len({workers for workers, _ in attempts}) == 1:
        assert found == expected


@cache
def undisturbed(source: Source, plan: StepSchedule, workers: int, encoder: Encoder) -> list[list[list[int]]]:
    return run(source, plan, [(workers, 0)], encoder)


@pytest.mark.parametrize("packing", [False, True])
@CHECK
@example(attempts=[(1, 2), (2, 1), (3, 1), (1, 2)], seed=0)
@given(attempts=attempts, seed=st.integers(0, 3))
def test_mixed_streams_resume_each_at_its_place(
    packing: bool,
    attempts: list[Attempt],
    seed: int,
    dataset: str,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_shards(monkeypatch)
    # Rows 0 to 14, 15 to 29 and 30 to 44, a file each.
    files = tuple(f"{dataset}/{file}.jsonl" for file in range(3))
    source = stream_source(files, encoder, packing, seed, (0.6, 0.3, 0.1))
    plan = StepSchedule(BATCH, 1, 10**6, None)
    found = run(source, plan, attempts, encoder)
    trained = [[n for step in found for micro in step for n in micro if n // 15 == file] for file in range(3)]
    for file, rows in enumerate(trained):
        # Every pass over a dataset trains each of its rows once; the last one may be cut short.
        passes = [rows[start : start + 15] for start in range(0, len(rows), 15)]
        assert all(sorted(whole) == list(range(file * 15, file * 15 + 15)) for whole in passes[:-1])
        assert all(len(set(rows)) == len(rows) for rows in passes[-1:])
    if not packing:  # packs are too few to show their shares
        # The likeliest stream ends the mixture after its two planned passes, with the last whole step.
        assert 30 - BATCH < len(trained[0]) <= 30
        assert len(trained[0]) > len(trained[1]) > len(trained[2])
    check_undisturbed(found, source, plan, attempts, encoder)
