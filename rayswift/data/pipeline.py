"""The data path: files → standard rows → token rows, each stage in the token cache; then sample, split and blend.

The unit of work is a chunk of a data file, from file to file, so that rows never pass through the object store: a
plain Ray task on any node. This process does chunks itself while the tasks start, and small datasets alone, because a
task would first have to import and load a tokenizer. Order is a function of the files and the seed, never of timing.
Rows that cannot be used are counted with reason and place. (Streams are Ray Data's: :mod:`rayswift.data.streaming`.)
"""

from __future__ import annotations

import contextlib
import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rayswift.cluster import most_cpus
from rayswift.data import json_text
from rayswift.data.blocks import (
    FATAL,
    FATAL_LINE,
    BlockRows,
    DropReport,
    LazyRows,
    all_rows,
    blend,
    concat,
    iter_standard_rows,
    plain_reason,
    sample_rows,
    split_rows,
)
from rayswift.data.cached_dataset import load_cached_datasets
from rayswift.data.packed_encoder import PackedEncoder, pack_encoder
from rayswift.data.registry import ResolvedDataset, ResolvedDatasets
from rayswift.data.rows import WARNINGS, BrokenLine, Drop, RowRules, standardise_rows
from rayswift.data.sources import BadRow, Chunk, iter_rows, plan_chunks
from rayswift.data.token_cache import TokenCache, default_root, read_columns, tokens_key
from rayswift.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from rayswift.data.encoding import Encoder

#: Rows per call of the tokenizer's batch encoder.
ENCODE_BATCH = 1024
#: A task imports and loads a tokenizer before its first row: in this time a process that has one does so many chunks.
TASK_START_CHUNKS = 6
#: Rows whose token rows are looked up together: the search needs ten times the memory of its answer.
ORDER_PIECE = 2**16

OnProgress = Callable[[str, int], None]


@dataclass
class TrainData:
    """What the data path hands to training: token rows for training (None for a stream, standard rows under
    ``--lazy_tokenize``) and validation, and what was dropped."""

    train: BlockRows | None
    val: BlockRows | None
    drops: DropReport
    val_rows: list[dict[str, Any]] = field(default_factory=list)


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


def first_usable_row(datasets: list[ResolvedDataset], strict: bool) -> dict[str, Any] | None:
    """Read each dataset up to its first usable batch, in this process, before anything expensive starts.

    Returns:
        The first usable standard row; None without a dataset.

    Raises:
        UserError: a file is broken there (names file:line), or holds no usable row at all.
    """
    first = None
    for dataset in datasets:
        drops = DropReport()
        usable = None
        for batch in (
            batch for chunk in plan_chunks(dataset.files) for batch in standard_batches(chunk, dataset.rules)
        ):
            drops.merge(batch.report)
            refuse_bad_rows(drops, strict)
            if batch.rows:
                usable = batch.rows[0]
                break
        if usable is None:
            reasons = "; ".join(drops.lines()) or "it is empty"
            raise UserError(f"--dataset {dataset.spec.text}: no usable row: {reasons}")
        first = first or usable
    return first


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
    picked: numbers of the standard rows to encode, ascending int64; None for all.
    """

    chunk: Chunk
    rules: RowRules
    rows_key: str
    tokens_key: str | None = None
    picked: np.ndarray | None = None

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
    """The schema of token rows; see :mod:`rayswift.data.token_cache`."""
    import pyarrow as pa

    tokens, weights = pa.list_(pa.int32()), pa.list_(pa.float32())
    numbers = [("source", pa.int64()), ("length", pa.int32())]
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
    columns = [lists(batch.input_ids), lists(batch.labels), scale, pa.array(numbers[batch.rows]),
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
        refuse_bad_rows(_report([work], [known]), strict)


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
                start = ahead + (TASK_START_CHUNKS if cold else 0)
                if len(lane) == ahead and len(waiting) > start + 1:
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


def _build_in_task(work: ChunkWork, packed: PackedEncoder, cache: TokenCache, _after: Any) -> dict[str, Any]:
    """``_after``: the task before it in its lane; Ray starts this one when that has ended."""
    return build_chunk(work, packed.unpack(), cache, lambda _: None)


def _task_result(ref: Any) -> dict[str, Any]:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None


def _report(works: list[ChunkWork], summaries: list[dict[str, Any]]) -> DropReport:
    drops = DropReport()
    for work, summary in zip(works, summaries, strict=True):
        drops.rows_in += summary["rows_in"]
        drops.add_json(summary, work.chunk.path)
    return drops


# --- a run's data -----------------------------------------------------------------------------------------------


def load_train_data(
    args: Any,
    datasets: ResolvedDatasets,
    encoder: Encoder,
    on_progress: OnProgress,
    cache: TokenCache | None = None,
) -> TrainData:
    """Read, standardise, sample, split and encode ``--dataset`` and ``--val_dataset``; what is cached is not redone.

    Args:
        args: training arguments.
        datasets: where their rows are.
        encoder: turns standard rows into token ids.
        on_progress: called with a stage name and the number of rows done in it.
        cache: where rows and tokens are kept; None for this machine's.

    Raises:
        UserError: unreadable row (names file:line), no usable row, ``--strict true`` and a bad row.
    """
    import numpy as np

    cache = cache or TokenCache(default_root(), args.load_from_cache_file)
    lazy = bool(getattr(args, "lazy_tokenize", False))  # a command that only encodes has no such flag
    run = _Load(encoder, cache, args.strict, lazy, on_progress)
    rng = np.random.RandomState(args.data_seed)
    ratio = 0.0 if datasets.val else args.split_dataset_ratio

    def sampled(dataset: ResolvedDataset) -> BlockRows:
        return sample_rows(run.standard_rows(dataset), dataset.spec.num_samples, args, rng)

    # A stream is read while it trains; nothing is held out of it.
    parts = [split_rows(sampled(dataset), ratio, rng) for dataset in ([] if args.streaming else datasets.train)]
    trained = [kept for kept, _ in parts]
    val = concat([held_out for _, held_out in parts] + [sampled(dataset) for dataset in datasets.val])
    if args.val_dataset_shuffle:
        val = val.select(rng.permutation(len(val)))
    run.encode([val] if lazy else [*trained, val])
    encoded_val = run.token_rows(val)
    encoded = run.lazy_rows(blend(trained, args, rng)) if lazy else run.blended(trained, args, rng)
    if args.cached_dataset:
        cached, cached_val = load_cached_datasets(args.cached_dataset, encoder)
        encoded, encoded_val = concat([encoded, cached]), concat([encoded_val, cached_val])
        if args.dataset and args.dataset_shuffle:
            encoded = encoded.select(rng.permutation(len(encoded)))
    if not args.streaming and not len(encoded):
        reasons = "; ".join(run.drops.lines())
        raise UserError(f"--dataset {' '.join(args.dataset)}: no row is left to train on; {reasons}")
    val_rows = list(iter_standard_rows(val)) if ratio and len(val) else []
    return TrainData(None if args.streaming else encoded, encoded_val or None, run.drops, val_rows)


class _Load:
    """The chunks of one run: their standard rows, then the token rows of those that were chosen."""

    def __init__(self, encoder: Encoder, cache: TokenCache, strict: bool, lazy: bool, on_progress: OnProgress) -> None:
        self.encoder, self.cache, self.strict, self.lazy, self.on_progress = encoder, cache, strict, lazy, on_progress
        self.drops = DropReport()
        # By the path of its standard rows, what was or will be made of a chunk.
        self.works: dict[str, ChunkWork] = {}

    def standard_rows(self, dataset: ResolvedDataset) -> BlockRows:
        """All usable rows of a dataset. Where every row will be wanted as tokens, it is encoded on the way."""
        import numpy as np

        name = dataset.spec.text
        works = []
        for chunk in plan_chunks(dataset.files):
            key = self.cache.rows_key(chunk, dataset.rules)
            every = dataset.spec.num_samples is None and not self.lazy
            wanted = tokens_key(key, self.encoder) if every else None
            works.append(ChunkWork(chunk, dataset.rules, key, wanted))
        self._build(works, f"read {name}")
        seen = _report(works, [self._summary(work.rows_key) for work in works])
        self.drops.rows_in += seen.rows_in
        self.drops.merge(seen)
        files = [self.cache.path(work.rows_key) for work in works]
        self.works |= dict(zip(files, works, strict=True))
        counts = [self._summary(work.rows_key)["rows"] for work in works]
        if not sum(counts):
            reasons = "; ".join(seen.lines()) or "it is empty"
            raise UserError(f"--dataset {name}: none of its {seen.rows_in} rows can be used: {reasons}")
        return BlockRows(files, all_rows(counts), np.zeros(sum(counts), np.int32))

    def encode(self, parts: list[BlockRows]) -> None:
        """Encode the rows of these parts that are not encoded yet."""
        import numpy as np

        wanted = dict.fromkeys(file for part in parts for file in _files_of(part))
        unencoded = [file for file in wanted if self.works[file].tokens_key is None]
        picks: dict[str, list[np.ndarray]] = {}
        for file, rows in ((file, rows) for part in parts if unencoded for file, rows in _rows_by_file(part)):
            picks.setdefault(file, []).append(rows)
        for file in unencoded:
            work, numbers = self.works[file], np.unique(np.concatenate(picks[file]))
            picked = None if len(numbers) == self._summary(work.rows_key)["rows"] else numbers
            key = tokens_key(work.rows_key, self.encoder, picked)
            self.works[file] = replace(work, tokens_key=key, picked=picked)
        self._build([self.works[file] for file in unencoded], "encode")
        works = [self.works[file] for file in wanted]
        self.drops.merge(_report(works, [self._summary(work.key) for work in works]))

    def token_rows(self, rows: BlockRows) -> BlockRows:
        """For each standard row in turn, the token rows that came from it (none if dropped, several if split)."""
        import numpy as np

        files = _files_of(rows)
        places: dict[str, list[int]] = {}
        for place, file in enumerate(rows.files):
            places.setdefault(file, []).append(place)
        sizes = [self._summary(self.works[file].rows_key)["rows"] for file in files]
        total = sum(sizes)
        # Numbers of all rows together: as small as they can be.
        bases = np.zeros(len(rows.files), np.int32 if total < 2**31 else np.int64)
        base = 0
        origins, lengths = [bases[:0]], [np.zeros(0, np.int32)]
        for file, size in zip(files, sizes, strict=True):
            source, length = read_columns(self.cache.path(self.works[file].key), ["source", "length"])
            bases[places[file]] = base
            origins.append(source.astype(bases.dtype) + bases.dtype.type(base))
            lengths.append(length)
            base += size
        order = _selected_order(np.concatenate(origins), bases, rows.index)
        index = all_rows([len(length) for length in lengths[1:]])
        paths = [self.cache.path(self.works[file].key) for file in files]
        return BlockRows(paths, index, np.concatenate(lengths)).select(order)

    def blended(self, parts: list[BlockRows], args: Any, rng: np.random.RandomState) -> BlockRows:
        """The token rows of several datasets together."""
        tokens = [self.token_rows(part) for part in parts]
        empty = next((number for number, rows in enumerate(tokens) if not len(rows)), None)
        if args.interleave_prob and empty is not None:
            reasons = "; ".join(self.drops.lines())
            raise UserError(f"--dataset {args.dataset[empty]}: no row is left to mix in; {reasons}")
        return blend(tokens, args, rng)

    def lazy_rows(self, rows: BlockRows) -> LazyRows:
        """Standard rows with what is needed to encode each when it is trained."""
        import numpy as np

        origins = [self.works[file].chunk.path for file in rows.files]
        return LazyRows(rows.files, rows.index, np.ones(len(rows), np.int32), origins)

    def _build(self, works: list[ChunkWork], stage: str) -> None:
        done = 0

        def count(rows: int) -> None:
            nonlocal done
            done += rows
            self.on_progress(stage, done)

        build_chunks(works, self.encoder, self.cache, self.strict, count)

    def _summary(self, key: str) -> dict[str, Any]:
        summary = self.cache.summary(key)
        if summary is None:
            raise UserError(f"the token cache {self.cache.root} lost an entry; run again, or set RAYSWIFT_CACHE")
        return summary


def _files_of(rows: BlockRows) -> list[str]:
    """The files that rows come from, each once."""
    import numpy as np

    return list(dict.fromkeys(rows.files[number] for number in np.unique(rows.index[:, 0])))


def _rows_by_file(rows: BlockRows) -> Iterator[tuple[str, np.ndarray]]:
    """Each file that rows come from, once, with the numbers of these rows in it."""
    import numpy as np

    order = np.argsort(rows.index[:, 0], kind="stable")
    numbers, starts = np.unique(rows.index[order, 0], return_index=True)
    found: dict[str, list[np.ndarray]] = {}
    parts_by_file = np.split(rows.index[order, 1], starts[1:]) if len(rows) else []
    for number, part in zip(numbers, parts_by_file, strict=True):
        found.setdefault(rows.files[number], []).append(part)
    return ((file, np.concatenate(parts)) for file, parts in found.items())


def _selected_order(origins: np.ndarray, bases: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The token rows of each selected row in turn.

    Args:
        origins: the standard row that each token row came from, ascending, numbered over all files.
        bases: the number of each file's first standard row.
        index: the selected rows, ``BlockRows.index``.
    """
    import numpy as np

    pieces = [origins[:0]]
    for start in range(0, len(index), ORDER_PIECE):
        piece = index[start : start + ORDER_PIECE]
        selected = bases[piece[:, 0]] + piece[:, 1]
        first, last = (np.searchsorted(origins, selected, side) for side in ("left", "right"))
        counts = last - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces.append((np.repeat(first, counts) + within).astype(origins.dtype))
    return np.concatenate(pieces)
