"""Streaming datasets: the same stages as a lazy Ray Data stream, in an order that is a function of the plan alone.

``plan`` (files grouped into pieces, epochs, seed) → tasks of one or more pieces: read → standard rows → shuffle →
encode. It is one operator, because two would wait for each other's CPU for ever on a machine that training fills.
With ``preserve_order`` ``streaming_split`` deals its blocks to the ranks in a fixed way, so that for one number of
workers a count of rows is a position to resume from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.data.blocks import FATAL, DropReport
from rayswift.data.pipeline import encode_rows, one_task_each, refuse_bad_rows, standard_blocks
from rayswift.data.registry import ResolvedDataset
from rayswift.data.rows import RowRules
from rayswift.data.sources import CHUNK_BYTES, Chunk, filesystem_of, plan_chunks

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from rayswift.data.encoding import Encoder

#: A stream is planned for as many epochs as fit into this many tasks (at least one epoch): millions of rows. Ray
#: Data's scheduling loop looks at every waiting task, so thousands would cost half a core.
MAX_PLANNED_TASKS = 256
#: … and for no more epochs than this.
MAX_PLANNED_EPOCHS = 10_000
#: Small files are read together, so that rows of different files mix: this many bytes (compressed) make a piece.
PIECE_BYTES = CHUNK_BYTES
#: Blocks leave a task as soon as they are this big, so that training starts before a large file is read.
STREAM_BLOCK_BYTES = 1 << 20
#: What a stream may hold ready in the object store; reading on would take the CPU from training on a small machine.
STREAM_AHEAD_BYTES = 128 << 20
#: Rows encoded at a time.
STREAM_BATCH = 64


@dataclass(frozen=True)
class Piece:
    """What is read and shuffled together: chunks of one dataset, its row rules and its ``#N``; ``size`` in bytes."""

    chunks: tuple[Chunk, ...]
    rules: RowRules
    num_samples: int | None
    size: int


@dataclass(frozen=True)
class StreamPlan:
    """Everything the order of a stream depends on; frozen when the run starts. A task is a list of (epoch, piece)."""

    pieces: tuple[Piece, ...]
    tasks: tuple[tuple[tuple[int, int], ...], ...]
    seed: int
    shuffle: bool
    shuffle_buffer_size: int
    strict: bool


def plan_stream(args: Any, datasets: list[ResolvedDataset]) -> StreamPlan:
    """Freeze the plan of a stream over these datasets."""
    import numpy as np

    pieces = [piece for dataset in datasets for piece in _pieces(dataset)]
    tasks: list[list[tuple[int, int]]] = []
    size = PIECE_BYTES
    for epoch in range(MAX_PLANNED_EPOCHS):
        if epoch and len(tasks) >= MAX_PLANNED_TASKS:
            break
        shuffled = np.random.RandomState((args.data_seed, epoch)).permutation(len(pieces))
        for number in shuffled if args.dataset_shuffle else range(len(pieces)):
            if size >= PIECE_BYTES:
                tasks.append([])
                size = 0
            tasks[-1].append((epoch, int(number)))
            size += max(pieces[number].size, 1)
    frozen = tuple(tuple(task) for task in tasks)
    shuffle, buffer = args.dataset_shuffle, args.shuffle_buffer_size
    return StreamPlan(tuple(pieces), frozen, args.data_seed, shuffle, buffer, args.strict)


def _pieces(dataset: ResolvedDataset) -> list[Piece]:
    """Neighbouring chunks together until they are big enough; everything together under ``#N``."""
    chunks = plan_chunks(dataset.files)
    limit = dataset.spec.num_samples
    groups: list[list[Chunk]] = [[]]
    size = 0
    for chunk in chunks:
        if size >= PIECE_BYTES and not limit:
            groups.append([])
            size = 0
        groups[-1].append(chunk)
        size += _bytes(chunk)
    return [Piece(tuple(group), dataset.rules, limit, sum(map(_bytes, group))) for group in groups]


def _bytes(chunk: Chunk) -> int:
    if chunk.end is not None:
        return chunk.end - chunk.start
    filesystem, inner = filesystem_of(chunk.path)
    return filesystem.get_file_info(inner).size or 0


def stream_tokens(plan: StreamPlan, encoder: Encoder, drop_log: Any | None = None) -> Dataset:
    """The stream as a lazy dataset of token rows (``input_ids``, ``labels``).

    Args:
        plan: the frozen plan.
        encoder: turns standard rows into token ids.
        drop_log: an actor whose ``push`` takes ``{"event": "drops", ...}``; where dropped rows are reported.
    """

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for item in batch["id"]:
            for epoch, piece in plan.tasks[int(item)]:
                yield from piece_tokens(plan, epoch, piece, encoder, drop_log)

    return one_task_each(len(plan.tasks), STREAM_BLOCK_BYTES).map_batches(read, batch_size=None)


def stream_options() -> Any:
    """How a stream is executed: in order, and never further ahead of training than :data:`STREAM_AHEAD_BYTES`."""
    from ray.data import ExecutionOptions, ExecutionResources

    ahead = ExecutionResources(object_store_memory=STREAM_AHEAD_BYTES)
    return ExecutionOptions(preserve_order=True, resource_limits=ahead)


def piece_tokens(plan: StreamPlan, epoch: int, number: int, encoder: Encoder, drop_log: Any) -> Iterator[pa.Table]:
    """One piece of one epoch as token tables (``input_ids``, ``labels``): a pure function of the plan."""
    import numpy as np

    piece = plan.pieces[number]
    rng = np.random.RandomState((plan.seed, epoch, number)) if plan.shuffle else None
    chunks = [piece.chunks[i] for i in rng.permutation(len(piece.chunks))] if rng else list(piece.chunks)
    tables = (_kept(table, plan.strict, drop_log) for chunk in chunks for table in standard_blocks(chunk, piece.rules))
    rows = _limited(tables, piece.num_samples)
    for table in _shuffled(rows, plan.shuffle_buffer_size, rng):
        for start in range(0, len(table), STREAM_BATCH):
            encoded = encode_rows(table.slice(start, STREAM_BATCH), encoder)
            yield _kept(encoded, plan.strict, drop_log).select(["input_ids", "labels"])


def _limited(tables: Iterator[pa.Table], limit: int | None) -> Iterator[pa.Table]:
    for table in tables:
        if limit is None:
            yield table
            continue
        yield table.slice(0, limit)
        limit -= min(len(table), limit)
        if not limit:
            return


def _shuffled(tables: Iterator[pa.Table], size: int, rng: Any) -> Iterator[pa.Table]:
    """Rows in groups of ``size``, each group in random order (in file order without ``rng``)."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        if sum(map(len, waiting)) < size:
            continue
        rows = pa.concat_tables(waiting)
        groups, left = divmod(len(rows), size)
        for group in range(groups):
            part = rows.slice(group * size, size)
            yield part.take(rng.permutation(size)) if rng else part
        waiting = [rows.slice(groups * size, left)]
    if waiting and (rows := pa.concat_tables(waiting)):
        yield rows.take(rng.permutation(len(rows))) if rng else rows


def _kept(table: pa.Table, strict: bool, drop_log: Any) -> pa.Table:
    """The usable rows; the others are reported with their place, or stop the run under ``--strict true``."""
    import pyarrow.compute as pc

    dropped = table.filter(pc.is_valid(table["reason"]))
    if not len(dropped):
        return table
    drops = DropReport()
    for row in dropped.select(["reason", "file", "position"]).to_pylist():
        reason = row["reason"]
        if reason.startswith(FATAL):
            reason = f"{reason.removeprefix(FATAL)}; what follows in this part of the file is lost"
        drops.add(reason, 1, row["file"], row["position"])
    if strict:
        refuse_bad_rows(drops, strict)
    if drop_log is not None:
        drop_log.push.remote({"event": "drops", "lines": drops.lines()})
    return table.filter(pc.is_null(table["reason"]))
