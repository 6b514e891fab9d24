"""One chunk of a data file → standard rows → token rows, each kept in the token cache; here and in Ray tasks.

A chunk goes from file to file, so that rows never pass through the object store: a plain Ray task on any node. This
process does chunks itself while the tasks start, and small datasets alone, because a task would first have to import
and load a tokenizer.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rayswift.cluster import most_cpus
from rayswift.data import json_text
from rayswift.data.files import BadRow, Chunk, iter_rows
from rayswift.data.flow.cache import TokenCache
from rayswift.data.rows.standard import WARNINGS, BrokenLine, Drop, RowRules, standardise_rows
from rayswift.data.tokens.packed_encoder import PackedEncoder, pack_encoder
from rayswift.data.tokens.row_index import FATAL, FATAL_LINE, DropReport, plain_reason
from rayswift.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from rayswift.data.tokens.encoder import Encoder

#: Rows per call of the tokenizer's batch encoder.
ENCODE_BATCH = 1024
#: A task imports and loads a tokenizer before its first row: in this time a process that has one encodes so many bytes.
TASK_START_BYTES = 24 * 2**20


@dataclass(frozen=True)
class StandardBatch:
    """Neighbouring rows of one file: the usable ones with their positions, and what is to be said of the others."""

    path: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    report: DropReport = field(default_factory=DropReport)

    def add(self, row: dict[str, Any] | Drop, position: int) -> None:
        """Add a row, usable or not."""
        self.report.rows_in += 1
        if isinstance(row, Drop):
            reason = FATAL_LINE + row.reason if isinstance(row, BrokenLine) else row.reason
            self.report.add(reason, 1, self.path, position)
            return
        for text in row.pop(WARNINGS, ()):
            self.report.note(text, 1, self.path, position)
        self.rows.append(row)
        self.positions.append(position)


def standard_batches(chunk: Chunk, rules: RowRules, size: int = ENCODE_BATCH) -> Iterator[StandardBatch]:
    """One chunk as standard rows, about ``size`` at a time; what is broken is counted (:data:`FATAL`)."""
    batch = StandardBatch(chunk.path)
    try:
        for raw, position in iter_rows(chunk):
            for standard in standardise_rows(raw, rules):
                batch.add(standard, position)
            if len(batch.rows) >= size:
                yield batch
                batch = StandardBatch(chunk.path)
    except BadRow as error:
        batch.add(Drop(FATAL + error.reason), error.position)
    if batch.report.rows_in:
        yield batch


def refuse_bad_rows(drops: DropReport, strict: bool) -> None:
    """Stop at a file that is broken, or with ``--strict true`` at any row that was dropped."""
    for reason in drops.counts:
        if reason.startswith(FATAL):
            raise UserError(f"{drops.place(reason)}: {plain_reason(reason)}")
        if strict:
            raise UserError(f"{drops.place(reason)}: {reason} (--strict true stops at the first bad row)")


# --- one chunk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkWork:
    """What is to be made of one chunk.

    rows_key: its entry of standard rows. tokens_key: its entry of token rows, None to stop at standard rows.
    picked: numbers of the standard rows to encode, ascending int64; None for all. size: bytes of text in the chunk.
    """

    chunk: Chunk
    rules: RowRules
    rows_key: str
    tokens_key: str | None = None
    picked: np.ndarray | None = None
    size: int = 0

    @property
    def key(self) -> str:
        """The entry this work ends in."""
        return self.tokens_key or self.rows_key


def build_chunk(work: ChunkWork, encoder: Encoder, cache: TokenCache, on_rows: Callable[[int], None]) -> dict[str, Any]:
    """Make a chunk's cache entries. A broken file leaves none.

    Returns:
        The summary of the entry: ``rows`` kept, ``rows_in``, and what :meth:`DropReport.as_json` keeps.
    """
    drops = DropReport()
    known = cache.summary(work.rows_key) if cache.reuse or work.picked is not None else None
    with _without_gc():
        _build(work, known is not None, encoder, cache, drops, on_rows)
    return cache.summary(work.key) or {"rows": 0, "rows_in": drops.rows_in, **drops.as_json()}


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Rows are many small objects without cycles: looking through them for cycles costs a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _build(
    work: ChunkWork,
    known: bool,
    encoder: Encoder,
    cache: TokenCache,
    drops: DropReport,
    on_rows: Callable[[int], None],
) -> None:
    batches = _stored_batches(work, cache) if known else _read_batches(work, cache, drops)
    if work.tokens_key is None:
        for batch in batches:
            on_rows(len(batch.rows))
    else:
        _write_tokens(work, batches, encoder, cache, drops, on_rows)


def _read_batches(work: ChunkWork, cache: TokenCache, drops: DropReport) -> Iterator[StandardBatch]:
    """Standard rows from the file, kept in the cache on the way."""
    import pyarrow as pa

    schema = pa.schema([("row", pa.large_binary()), ("position", pa.int64())])
    kept, seen = 0, DropReport()
    with cache.write(work.rows_key, schema) as file:
        for batch in standard_batches(work.chunk, work.rules):
            texts = pa.array([json_text.dumps(row) for row in batch.rows], pa.large_binary())
            file.write_batch(pa.record_batch([texts, pa.array(batch.positions, pa.int64())], schema))
            kept += len(batch.rows)
            seen.rows_in += batch.report.rows_in
            seen.merge(batch.report)
            yield batch
            if _broken(batch.report):
                break  # the run stops: what follows is not needed
    drops.rows_in += seen.rows_in
    drops.merge(seen)
    if not _broken(seen):
        cache.finish(work.rows_key, {"rows": kept, "rows_in": seen.rows_in, **seen.as_json()})


def _broken(drops: DropReport) -> bool:
    return any(reason.startswith(FATAL) for reason in drops.counts)


def _stored_batches(work: ChunkWork, cache: TokenCache) -> Iterator[StandardBatch]:
    """Standard rows from the cache."""
    reader = cache.open(work.rows_key)
    for number in range(reader.num_record_batches):
        batch = reader.get_batch(number)
        rows = [json_text.loads(text) for text in batch["row"].to_pylist()]
        yield StandardBatch(work.chunk.path, rows, batch["position"].to_pylist())


def _write_tokens(
    work: ChunkWork,
    batches: Iterable[StandardBatch],
    encoder: Encoder,
    cache: TokenCache,
    drops: DropReport,
    on_rows: Callable[[int], None],
) -> None:
    import numpy as np

    assert work.tokens_key is not None
    number = kept = rows_in = 0
    seen = DropReport()
    with cache.write(work.tokens_key, token_schema()) as file:
        for batch in batches:
            here = np.arange(number, number + len(batch.rows))
            if work.picked is not None:
                here = work.picked[
                    np.searchsorted(work.picked, number) : np.searchsorted(work.picked, number + len(here))
                ]
            rows = [batch.rows[place] for place in here - number]
            places = [(batch.path, batch.positions[place]) for place in here - number]
            tokens = encode_rows(rows, places, encoder, seen, here)
            file.write_batch(tokens)
            kept += len(tokens)
            rows_in += len(rows)
            number += len(batch.rows)
            on_rows(len(rows))
    drops.merge(seen)
    if not _broken(drops):
        cache.finish(work.tokens_key, {"rows": kept, "rows_in": rows_in, **seen.as_json()})


def token_schema() -> pa.Schema:
    """The schema of token rows; see :mod:`rayswift.data.flow.cache`."""
    import pyarrow as pa

    tokens, weights = pa.list_(pa.int32()), pa.list_(pa.float32())
    numbers = [("rejected_start", pa.int32()), ("source", pa.int64()), ("length", pa.int32())]
    return pa.schema([("input_ids", tokens), ("labels", tokens), ("loss_scale", weights), *numbers])


def encode_rows(
    rows: list[dict[str, Any]],
    places: list[tuple[str, int]],
    encoder: Encoder,
    drops: DropReport,
    numbers: np.ndarray,
) -> pa.RecordBatch:
    """Standard rows to token rows.

    Args:
        rows: standard rows.
        places: file and position of each.
        encoder: turns them into token ids.
        drops: where rows that give no tokens are added.
        numbers: int64 (rows,), what the ``source`` column shall say.
    """
    import numpy as np
    import pyarrow as pa

    batch = encoder.encode_columns(rows)
    for dropped in batch.dropped:
        drops.add(dropped.reason, 1, *places[dropped.row])
    offsets = pa.array(batch.offsets, pa.int32())

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    schema = token_schema()
    scale = pa.nulls(len(batch.rows), schema.field("loss_scale").type)
    if batch.loss_scale is not None:
        scale = lists(batch.loss_scale)
    rejected = pa.nulls(len(batch.rows), pa.int32())
    if batch.rejected_starts is not None:
        rejected = pa.array(batch.rejected_starts)
    columns = [lists(batch.input_ids), lists(batch.labels), scale, rejected, pa.array(numbers[batch.rows]),
               pa.array(np.diff(batch.offsets).astype(np.int32))]  # fmt: skip
    return pa.record_batch(columns, schema)


# --- all chunks -------------------------------------------------------------------------------------------------


def build_chunks(
    works: list[ChunkWork], encoder: Encoder, cache: TokenCache, strict: bool, on_rows: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Make the cache entries of these chunks, each once, and return their summaries.

    Raises:
        UserError: a file is broken (names file:line); with ``strict``, any row was dropped.
    """
    summaries = {work.key: cache.summary(work.key) if cache.reuse else None for work in works}
    todo = list({work.key: work for work in works if summaries[work.key] is None}.values())
    for work, summary in _build_everywhere(todo, encoder, cache, on_rows):
        summaries[work.key] = summary
        _refuse(work, summary, cache, strict)
    found = [known for work in works if (known := summaries[work.key]) is not None]
    for work, summary in zip(works, found, strict=True):
        _refuse(work, summary, cache, strict)
    return found


def _refuse(work: ChunkWork, summary: dict[str, Any], cache: TokenCache, strict: bool) -> None:
    """Stop at what :func:`refuse_bad_rows` refuses, first as the file was read, then as its rows were encoded."""
    read = cache.summary(work.rows_key) if strict else None
    for known in [read, summary] if read else [summary]:
        refuse_bad_rows(report_of([work], [known]), strict)


def _build_everywhere(
    works: list[ChunkWork], encoder: Encoder, cache: TokenCache, on_rows: Callable[[int], None]
) -> Iterator[tuple[ChunkWork, dict[str, Any]]]:
    """Chunks with their summaries, as they are done: this process takes them from the front, tasks from the back."""
    waiting = deque(works)
    tasks = _Tasks(_other_cores(), encoder, cache)
    while waiting or tasks.running:
        tasks.feed(waiting)
        if waiting:
            work = waiting.popleft()
            yield work, build_chunk(work, encoder, cache, on_rows)
        for work, summary in tasks.ended(wait=not waiting):
            on_rows(summary["rows_in"])
            yield work, summary


def _other_cores() -> int:
    """Cores for tasks, also those that the cluster may still start: all but the one that is busy here."""
    import ray

    return max(int(most_cpus()) - 1, 0) if ray.is_initialized() else 0


class _Tasks:
    """Chunks in Ray tasks, in one lane for each core: a task of a lane starts when the one before it has ended.

    Were there more tasks at a time than cores, Ray would start more processes than cores, and hold their memory.
    """

    def __init__(self, lanes: int, encoder: Encoder, cache: TokenCache) -> None:
        self._encoder, self._cache = encoder, cache
        self._lanes: list[deque[Any]] = [deque() for _ in range(lanes)]
        self._cold = [True] * lanes
        self._works: dict[Any, ChunkWork] = {}
        self._packed: Any = None

    @property
    def running(self) -> bool:
        """Whether a task has not ended."""
        return bool(self._works)

    def feed(self, waiting: deque[ChunkWork]) -> None:
        """Give each lane up to two chunks, but none that this process would have done by the time the lane gets to
        it."""
        for ahead in range(2):
            for lane, cold in zip(self._lanes, self._cold, strict=True):
                start = TASK_START_BYTES if cold else 0
                if len(lane) == ahead and len(waiting) > ahead + 1 and _hold(waiting, start):
                    self._submit(lane, waiting.pop())

    def ended(self, wait: bool) -> list[tuple[ChunkWork, dict[str, Any]]]:
        """What has ended since the last call, with its summary; with ``wait`` at least one if any runs."""
        if not self._works:
            return []
        import ray

        refs = list(self._works)
        done, _ = ray.wait(refs, num_returns=1 if wait else len(refs), timeout=None if wait else 0)
        for number, lane in enumerate(self._lanes):
            while lane and lane[0] in done:
                lane.popleft()
                self._cold[number] = False
        return [(self._works.pop(ref), _task_result(ref)) for ref in done]

    def _submit(self, lane: deque[Any], work: ChunkWork) -> None:
        import ray

        if self._packed is None:
            self._packed = ray.put(pack_encoder(self._encoder))
        task = ray.remote(_build_in_task).options(scheduling_strategy="SPREAD")
        ref = task.remote(work, self._packed, self._cache, lane[-1] if lane else None)
        lane.append(ref)
        self._works[ref] = work


def _hold(waiting: deque[ChunkWork], size: int) -> bool:
    """Whether the chunks before the last one have so many bytes; only as many are looked at as that takes."""
    total = itertools.accumulate(work.size for work in itertools.islice(waiting, len(waiting) - 1))
    return any(reached >= size for reached in total)


def _build_in_task(work: ChunkWork, packed: PackedEncoder, cache: TokenCache, _after: Any) -> dict[str, Any]:
    """``_after``: the task before it in its lane; Ray starts this one when that has ended."""
    return build_chunk(work, packed.unpack(), cache, lambda _: None)


def _task_result(ref: Any) -> dict[str, Any]:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None


def report_of(works: list[ChunkWork], summaries: list[dict[str, Any]]) -> DropReport:
    """What was dropped of these chunks, from their summaries."""
    drops = DropReport()
    for work, summary in zip(works, summaries, strict=True):
        drops.rows_in += summary["rows_in"]
        drops.add_json(summary, work.chunk.path)
    return drops
