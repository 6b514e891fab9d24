"""The data path on Ray Data: files → standard rows → sample and split → token blocks.

Every stage is a Ray Data operator over Arrow blocks; the driver only holds references, row counts and lengths.
Order is a function of the files and the seed, never of timing. Rows that cannot be used stay in their block with a
``reason`` until they are counted, so nothing vanishes without a word.

Schemas:
    standard block: ``row: large_string`` (a standard row as JSON, null if dropped), ``file: dictionary<string>``,
    ``position: int64`` (see :func:`rayswift.data.sources.locate`), ``reason: string`` (null if kept).
    token block: ``input_ids: list<int32>``, ``labels: list<int32>`` (−100 where not trained), ``origin: int64`` (the
    number of the selected row it came from), ``file``, ``position``, ``reason``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayswift.data.blocks import (
    FATAL,
    BlockRows,
    DropReport,
    blend,
    collect,
    concat,
    iter_standard_rows,
    sample_rows,
    split_rows,
)
from rayswift.data.registry import ResolvedDataset, ResolvedDatasets
from rayswift.data.rows import Drop, RowRules, standardise_row
from rayswift.data.sources import BadRow, Chunk, iter_rows, plan_chunks
from rayswift.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from ray.data import Dataset

    from rayswift.data.encoding import Encoder

#: Rows per Arrow block out of the reader: big enough to amortise a task, small enough to stay far below memory.
ROWS_PER_BLOCK = 4096
#: Rows per call of the tokenizer's batch encoder.
ENCODE_BATCH = 1024

OnProgress = Callable[[str, int], None]


@dataclass
class TrainData:
    """What the data path hands to training: token blocks for training and validation, and what was dropped."""

    train: BlockRows
    val: BlockRows | None
    drops: DropReport
    val_rows: list[dict[str, Any]] = field(default_factory=list)


def load_train_data(args: Any, datasets: ResolvedDatasets, encoder: Encoder, on_progress: OnProgress) -> TrainData:
    """Read, standardise, sample, split and encode ``--dataset`` and ``--val_dataset``.

    Args:
        args: training arguments.
        datasets: where their rows are.
        encoder: turns standard rows into token ids.
        on_progress: called with a stage name and the number of rows done in it.

    Raises:
        UserError: unreadable row (names file:line), no usable row, ``--strict true`` and a bad row.
    """
    import numpy as np

    drops = DropReport()
    rng = np.random.RandomState(args.data_seed)
    ratio = 0.0 if datasets.val else args.split_dataset_ratio
    trains, vals = [], []
    for dataset in datasets.train:
        rows = sample_rows(_read(dataset, args, drops, on_progress), dataset.spec.num_samples, args, rng)
        kept, held_out = split_rows(rows, ratio, rng)
        trains.append(kept)
        vals.append(held_out)
    for dataset in datasets.val:
        vals.append(sample_rows(_read(dataset, args, drops, on_progress), dataset.spec.num_samples, args, rng))
    train = blend(trains, args, rng)
    val = concat(vals)
    if args.val_dataset_shuffle:
        val = val.select(rng.permutation(len(val)))
    val_rows = list(iter_standard_rows(val)) if ratio else []
    encoded = _encode(train, encoder, args, drops, on_progress)
    if not len(encoded):
        raise UserError(f"--dataset {' '.join(args.dataset)}: no row is left to train on; {'; '.join(drops.lines())}")
    encoded_val = _encode(val, encoder, args, drops, on_progress) if len(val) else None
    return TrainData(encoded, encoded_val or None, drops, val_rows)


def first_usable_row(datasets: list[ResolvedDataset], strict: bool) -> dict[str, Any]:
    """Read each dataset up to its first usable block, in this process, before anything expensive starts.

    Returns:
        The first usable standard row.

    Raises:
        UserError: a file is broken there (names file:line), or holds no usable row at all.
    """
    first = None
    for dataset in datasets:
        drops = DropReport()
        chunks = plan_chunks(dataset.files)
        tables = (table for chunk in chunks for table in standard_blocks(chunk, dataset.rules))
        usable = next((row for table in tables for row in _usable_rows(table, drops, strict)), None)
        if usable is None:
            reasons = "; ".join(drops.lines()) or "it is empty"
            raise UserError(f"--dataset {dataset.spec.text}: no usable row: {reasons}")
        first = first or json.loads(usable)
    assert first is not None
    return first


def _usable_rows(table: pa.Table, drops: DropReport, strict: bool) -> list[str]:
    for row in table.to_pylist():
        if row["reason"] is not None:
            drops.add(row["reason"], 1, row["file"], row["position"])
    refuse_bad_rows(drops, strict)
    return [text for text in table["row"].to_pylist() if text is not None]


def data_context(block_bytes: int | None = None) -> Any:
    """A copy of Ray Data's context for training: fixed order, no bars of its own, no time-out while training pauses.

    Args:
        block_bytes: the size at which a task hands on a block; None for Ray's own.
    """
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1
    context.target_max_block_size = block_bytes or context.target_max_block_size
    return context


def _read(dataset: ResolvedDataset, args: Any, drops: DropReport, on_progress: OnProgress) -> BlockRows:
    chunks, rules = plan_chunks(dataset.files), dataset.rules

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for item in batch["id"]:
            yield from standard_blocks(chunks[int(item)], rules)

    source = one_task_each(len(chunks)).map_batches(read, batch_size=None)
    seen = DropReport()
    name = dataset.spec.text
    rows, _ = collect(source, seen, lambda done: on_progress(f"read {name}", done))
    refuse_bad_rows(seen, args.strict)
    if not len(rows):
        reasons = "; ".join(seen.lines()) or "it is empty"
        raise UserError(f"--dataset {name}: none of its {seen.rows_in} rows can be used: {reasons}")
    drops.rows_in += seen.rows_in
    drops.merge(seen)
    return rows


def refuse_bad_rows(drops: DropReport, strict: bool) -> None:
    """Stop at a file that is broken, or with ``--strict true`` at any row that was dropped."""
    for reason in drops.counts:
        if reason.startswith(FATAL):
            raise UserError(f"{drops.place(reason)}: {reason.removeprefix(FATAL)}")
        if strict:
            raise UserError(f"{drops.place(reason)}: {reason} (--strict true stops at the first bad row)")


def one_task_each(count: int, block_bytes: int | None = None) -> Dataset:
    """A dataset of ids 0 … count-1 whose every row is a task of its own."""
    import ray.data
    from ray.data import DataContext

    with DataContext.current(data_context(block_bytes)):
        return ray.data.range(count, override_num_blocks=count)


def standard_blocks(chunk: Chunk, rules: RowRules) -> Iterator[pa.Table]:
    """One chunk as standard blocks of at most :data:`ROWS_PER_BLOCK` rows; a broken row ends the chunk."""
    rows: list[tuple[str | None, int, str | None]] = []
    try:
        for raw, position in iter_rows(chunk):
            standard = standardise_row(raw, rules)
            if isinstance(standard, Drop):
                rows.append((None, position, standard.reason))
            else:
                rows.append((json.dumps(standard, ensure_ascii=False, default=str), position, None))
            if len(rows) == ROWS_PER_BLOCK:
                yield _standard_table(rows, chunk.path)
                rows = []
    except BadRow as error:
        rows.append((None, error.position, FATAL + error.reason))
    if rows:
        yield _standard_table(rows, chunk.path)


def _standard_table(rows: list[tuple[str | None, int, str | None]], path: str) -> pa.Table:
    import pyarrow as pa

    texts, positions, reasons = zip(*rows, strict=True)
    files = pa.DictionaryArray.from_arrays(pa.array([0] * len(rows), pa.int32()), pa.array([path]))
    return pa.table(
        {
            "row": pa.array(texts, pa.large_string()),
            "file": files,
            "position": pa.array(positions, pa.int64()),
            "reason": pa.array(reasons, pa.string()),
        }
    )


def _encode(rows: BlockRows, encoder: Encoder, args: Any, drops: DropReport, on_progress: OnProgress) -> BlockRows:
    """Encode the selected rows, each once and in its block, and put them back into the selected order."""
    import numpy as np
    import ray
    from ray.data import DataContext

    # A row that is selected twice (#N above the size) is encoded once.
    wanted, inverse = np.unique(rows.index, axis=0, return_inverse=True)
    blocks, starts = np.unique(wanted[:, 0], return_index=True)
    take = ray.remote(_take_rows)
    refs = [
        take.remote(rows.refs[block], pick, start)
        for block, pick, start in zip(blocks, np.split(wanted[:, 1], starts[1:]), starts, strict=True)
    ]
    with DataContext.current(data_context()):
        source = ray.data.from_arrow_refs(refs).map_batches(
            encode_rows, fn_kwargs={"encoder": encoder}, batch_format="pyarrow", batch_size=ENCODE_BATCH
        )
    seen = DropReport()
    encoded, origins = collect(source, seen, lambda done: on_progress("encode", done))
    refuse_bad_rows(seen, args.strict)
    drops.merge(seen)
    return encoded.select(_selected_order(origins, inverse.reshape(-1)))


def encode_rows(table: pa.Table, encoder: Encoder) -> pa.Table:
    """A standard block to a token block; a dropped row keeps its place with a reason and no tokens."""
    import pyarrow as pa

    from rayswift.data.encoding import Dropped

    samples = encoder.encode_batch([json.loads(text) for text in table["row"].to_pylist()])
    kept = [None if isinstance(sample, Dropped) else sample for sample in samples]
    tokens = pa.list_(pa.int32())
    columns = {
        "input_ids": pa.array([sample and sample.input_ids for sample in kept], tokens),
        "labels": pa.array([sample and sample.labels for sample in kept], tokens),
    }
    reasons = [sample.reason if isinstance(sample, Dropped) else None for sample in samples]
    carried = table.drop_columns(["row", "reason"]).take(pa.array([sample.row for sample in samples], pa.int64()))
    return pa.table({**columns, **{name: carried[name] for name in carried.column_names},
                     "reason": pa.array(reasons, pa.string())})  # fmt: skip


def _selected_order(origins: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """For each selected row in turn, the token rows that came from it (none if dropped, several if split)."""
    import numpy as np

    by_origin = np.argsort(origins, kind="stable")
    first, last = (np.searchsorted(origins[by_origin], selected, side) for side in ("left", "right"))
    counts = last - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return by_origin[np.repeat(first, counts) + within]


def _take_rows(block: pa.Table, rows: np.ndarray, first_origin: int) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    origins = pa.array(np.arange(first_origin, first_origin + len(rows)))
    return block.take(rows).append_column("origin", origins)
