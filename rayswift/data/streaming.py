"""Streaming datasets: the same stages as a lazy Ray Data stream, in an order that is a function of the plan alone.

``plan`` (files cut into chunks, epochs, seed) → read → standard rows → shuffle inside fixed groups → encode →
blocks of exactly ``rows_per_block`` rows. ``preserve_order`` and strict repartitioning keep the order, so that
``streaming_split`` deals block k to rank k mod world_size and a count of blocks is a position to resume from.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.data.blocks import FATAL, DropReport
from rayswift.data.pipeline import encode_rows, one_task_each, refuse_bad_rows, standard_blocks
from rayswift.data.registry import ResolvedDataset, resolve_dataset_files
from rayswift.data.rows import RowRules
from rayswift.data.sources import Chunk, plan_chunks
from rayswift.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset

    from rayswift.data.encoding import Encoder

#: A stream is planned for as many epochs as fit into this many chunks; far more than --max_steps will ever read.
MAX_PLANNED_CHUNKS = 4096


@dataclass(frozen=True)
class StreamPlan:
    """Everything the order of a stream depends on; frozen when the run starts.

    ``work`` lists, per dataset piece, the chunks one task reads in order, its row rules and ``#N``.
    """

    work: tuple[tuple[tuple[Chunk, ...], RowRules, int | None], ...]
    order: tuple[tuple[int, int], ...]
    seed: int
    shuffle_buffer_size: int
    strict: bool


def plan_stream(args: Any) -> tuple[StreamPlan, dict[str, Any]]:
    """Freeze the plan of ``--dataset`` and read a first row to show and to check.

    Returns:
        The plan, and the first usable standard row.

    Raises:
        UserError: unknown dataset, unreadable first block, or no usable row among the first ones.
    """
    import numpy as np

    resolved = [resolve_dataset_files(text, args) for text in args.dataset]
    first = _first_row(resolved, args)
    work: list[tuple[tuple[Chunk, ...], RowRules, int | None]] = []
    for dataset in resolved:
        chunks = plan_chunks(dataset.files)
        count = dataset.spec.num_samples
        pieces = [tuple(chunks)] if count else [(chunk,) for chunk in chunks]
        work += [(piece, dataset.rules, count) for piece in pieces]
    epochs = max(1, MAX_PLANNED_CHUNKS // len(work))
    order: list[tuple[int, int]] = []
    for epoch in range(epochs):
        shuffled = np.random.RandomState(args.data_seed + epoch).permutation(len(work))
        order += [(epoch, int(item)) for item in (shuffled if args.dataset_shuffle else range(len(work)))]
    buffer = args.shuffle_buffer_size if args.dataset_shuffle else 1
    return StreamPlan(tuple(work), tuple(order), args.data_seed, buffer, args.strict), first


def _first_row(resolved: list[ResolvedDataset], args: Any) -> dict[str, Any]:
    """The first usable row; each dataset's first block is read here, so that a broken one stops the run at once."""
    import json

    first = None
    for dataset in resolved:
        drops, usable = DropReport(), False
        chunk = plan_chunks(dataset.files[:1])[0]
        for table in standard_blocks(chunk, dataset.rules):
            for row in table.to_pylist():
                if row["reason"] is not None:
                    drops.add(row["reason"], 1, row["file"], row["position"])
                elif first is None or not usable:
                    usable, first = True, first or json.loads(row["row"])
            refuse_bad_rows(drops, args.strict)
            if usable:
                break
        if not usable:
            raise UserError(f"--dataset {dataset.spec.text}: no usable row; {'; '.join(drops.lines()) or 'it is empty'}")
    assert first is not None
    return first


def stream_tokens(plan: StreamPlan, encoder: Encoder, rows_per_block: int, drop_log: Any | None = None) -> Dataset:
    """The stream as a lazy dataset of token blocks with exactly ``rows_per_block`` rows each (but for the last).

    Args:
        plan: the frozen plan.
        encoder: turns standard rows into token ids.
        rows_per_block: the rows one worker trains on in one optimiser step.
        drop_log: an actor whose ``push`` takes ``{"event": "drops", ...}``; where dropped rows are reported.
    """

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for item in batch["id"]:
            epoch, number = plan.order[int(item)]
            yield from _read_piece(*plan.work[number], epoch, plan.strict, drop_log)

    def shuffle_and_encode(table: pa.Table) -> pa.Table:
        encoded = encode_rows(_shuffle(table, plan.seed) if plan.shuffle_buffer_size > 1 else table, encoder)
        return _kept(encoded, plan.strict, drop_log).select(["input_ids", "labels"])

    dataset = one_task_each(len(plan.order)).map_batches(read, batch_size=None)
    if plan.shuffle_buffer_size > 1:
        dataset = dataset.repartition(target_num_rows_per_block=plan.shuffle_buffer_size, strict=True)
    dataset = dataset.map_batches(shuffle_and_encode, batch_size=None, batch_format="pyarrow")
    return dataset.repartition(target_num_rows_per_block=rows_per_block, strict=True)


def _read_piece(
    chunks: tuple[Chunk, ...], rules: RowRules, limit: int | None, epoch: int, strict: bool, drop_log: Any
) -> Iterator[pa.Table]:
    import pyarrow as pa

    left = limit
    for chunk in chunks:
        for table in standard_blocks(chunk, rules):
            kept = _kept(table, strict, drop_log)
            if left is not None:
                kept = kept.slice(0, left)
                left -= len(kept)
            yield kept.append_column("epoch", pa.array([epoch] * len(kept), pa.int32()))
            if left == 0:
                return


def _shuffle(table: pa.Table, seed: int) -> pa.Table:
    """One group in an order that depends on the seed and on which rows it holds, not on which task shuffles it."""
    import numpy as np

    if not len(table):
        return table
    head = f"{seed}/{table['epoch'][0]}/{table['file'][0]}/{table['position'][0]}"
    order = np.random.RandomState(zlib.crc32(head.encode())).permutation(len(table))
    return table.take(order)


def _kept(table: pa.Table, strict: bool, drop_log: Any) -> pa.Table:
    """The usable rows; the others are reported with their place, or stop the run under ``--strict true``."""
    import pyarrow.compute as pc

    dropped = table.filter(pc.is_valid(table["reason"]))
    if not len(dropped):
        return table
    drops = DropReport()
    for row in dropped.select(["reason", "file", "position"]).to_pylist():
        drops.add(row["reason"].removeprefix(FATAL), 1, row["file"], row["position"])
    if strict:
        refuse_bad_rows(drops, strict)
    if drop_log is not None:
        drop_log.push.remote({"event": "drops", "lines": drops.lines()})
    return table.filter(pc.is_null(table["reason"]))
