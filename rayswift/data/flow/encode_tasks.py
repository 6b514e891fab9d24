"""Chunks of data files → standard rows → token rows, each kept in the token cache; here or by Ray Data.

A chunk goes from file to file, so that rows never pass through the object store. Small data is encoded in this process;
where a machine of few cores has enough to do, by an actor on each other core as well; where there are more cores or
nodes each chunk is a task of Ray Data, which starts, retries and spreads them (measured in ``docs/data.md``).
"""

from __future__ import annotations

import gc
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.cluster import most_cpus
from rayswift.cluster.placement import data_selector, node_kinds
from rayswift.data import json_text
from rayswift.data.files import Chunk, Position
from rayswift.data.flow.cache import TokenCache
from rayswift.data.flow.ray_data import one_task_each
from rayswift.data.flow.stage import StandardBatch, encode_rows, refuse_bad_rows, standard_batches, token_schema
from rayswift.data.rows.standard import RowRules
from rayswift.data.tokens.packed_encoder import PackedEncoder, pack_encoder
from rayswift.data.tokens.row_index import DropReport
from rayswift.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from rayswift.data.tokens.encoder import Encoder

#: What this process encodes in the time that another takes to start, import and load a tokenizer, in bytes of text.
ACTOR_START_BYTES = 24 * 2**20
#: The same for Ray Data, its operators and its processes …
RAY_DATA_START_BYTES = 256 * 2**20
#: … and the cores that Ray Data's tasks take to be as fast as this process and its actors.
CPUS_HERE = 4


@dataclass(frozen=True)
class EncodeTask:
    """What is to be made of one chunk.

    rows_key: its entry of standard rows. tokens_key: its entry of token rows, None to stop at standard rows.
    row_subset: numbers of the standard rows to encode, ascending int64; None for all. size: bytes of text in the chunk.
    """

    chunk: Chunk
    rules: RowRules
    rows_key: str
    tokens_key: str | None = None
    row_subset: np.ndarray | None = None
    size: int = 0

    @property
    def key(self) -> str:
        """The entry this task ends in."""
        return self.tokens_key or self.rows_key


# --- one chunk --------------------------------------------------------------------------------------------------


def encode_chunk(
    task: EncodeTask, encoder: Encoder, cache: TokenCache, on_rows: Callable[[int], None]
) -> dict[str, Any]:
    """Make a chunk's cache entries. A broken file leaves none.

    Returns:
        The summary of the entry: ``rows`` kept, ``rows_in``, and what :meth:`DropReport.as_json` keeps.
    """
    drops = DropReport()
    known = cache.whole(task.rows_key) if cache.reuse or task.row_subset is not None else None
    # Rows are many small objects without cycles: looking through them for cycles costs a tenth of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        batches = _stored_batches(task, cache) if known else _read_batches(task, cache, drops)
        if task.tokens_key is not None:
            _write_tokens(task, task.tokens_key, batches, encoder, cache, drops, on_rows)
        else:
            for batch in batches:
                on_rows(len(batch.rows))
    finally:
        if collecting:
            gc.enable()
    return cache.summary(task.key) or {"rows": 0, "rows_in": drops.rows_in, **drops.as_json()}


def _read_batches(task: EncodeTask, cache: TokenCache, drops: DropReport) -> Iterator[StandardBatch]:
    """Standard rows from the file, kept in the cache on the way."""
    import pyarrow as pa

    schema = pa.schema([("row", pa.large_binary()), ("kind", pa.string()), ("number", pa.int64())])
    kept = 0
    with cache.write(task.rows_key, schema) as file:
        for batch in standard_batches(task.chunk, task.rules):
            texts = [json_text.dumps(row) for row in batch.rows]
            kinds, numbers = zip(*batch.positions, strict=True) if batch.positions else ((), ())
            columns = zip((texts, kinds, numbers), schema.types, strict=True)
            file.write_batch(pa.record_batch([pa.array(values, kind) for values, kind in columns], schema))
            kept += len(batch.rows)
            drops.rows_in += batch.report.rows_in
            drops.merge(batch.report)
            yield batch
            if drops.broken:
                return  # the run stops: what follows is not needed
    cache.finish(task.rows_key, {"rows": kept, "rows_in": drops.rows_in, **drops.as_json()})


def _stored_batches(task: EncodeTask, cache: TokenCache) -> Iterator[StandardBatch]:
    """Standard rows from the cache."""
    reader = cache.open(task.rows_key)
    for number in range(reader.num_record_batches):
        texts, kinds, numbers = (column.to_pylist() for column in reader.get_batch(number).columns)
        positions = [Position(*place) for place in zip(kinds, numbers, strict=True)]
        yield StandardBatch(task.chunk.path, [json_text.loads(text) for text in texts], positions)


def _write_tokens(
    task: EncodeTask,
    key: str,
    batches: Iterable[StandardBatch],
    encoder: Encoder,
    cache: TokenCache,
    drops: DropReport,
    on_rows: Callable[[int], None],
) -> None:
    """Encode the rows, or the task's subset of them, into the entry ``key``; ``drops`` is what reading them drops."""
    import numpy as np

    number = kept = rows_in = 0
    seen = DropReport()
    with cache.write(key, token_schema()) as file:
        for batch in batches:
            here = np.arange(number, number + len(batch.rows))
            if task.row_subset is not None:
                first, last = np.searchsorted(task.row_subset, [number, number + len(here)])
                here = task.row_subset[first:last]
            rows = [batch.rows[place] for place in here - number]
            places = [(batch.path, batch.positions[place]) for place in here - number]
            tokens = encode_rows(rows, places, encoder, seen, here)
            file.write_batch(tokens)
            kept += len(tokens)
            rows_in += len(rows)
            number += len(batch.rows)
            on_rows(len(rows))
    if not drops.broken:
        cache.finish(key, {"rows": kept, "rows_in": rows_in, **seen.as_json()})


# --- all chunks -------------------------------------------------------------------------------------------------


def encode_all(
    tasks: list[EncodeTask], encoder: Encoder, cache: TokenCache, strict: bool, on_rows: Callable[[int], None]
) -> list[dict[str, Any]]:
    """Make the cache entries of these chunks, each once, and return their summaries.

    Raises:
        UserError: a file is broken (names file:line); with ``strict``, any row was dropped.
    """
    # An entry that came to harm is made again; so is what was made of rows that did, as the rows are read too.
    kept = {task.key: cache.reuse and cache.whole(task.rows_key) and cache.whole(task.key) for task in tasks}
    summaries = {key: summary or None for key, summary in kept.items()}
    todo = list({task.key: task for task in tasks if summaries[task.key] is None}.values())
    cache.counts.update(hits=len(summaries) - len(todo), misses=len(todo))
    if _is_work_for_ray_data(todo):
        made = _encode_by_ray_data(todo, encoder, cache, on_rows)
    else:
        made = _encode_here(todo, encoder, cache, on_rows)
    for task, summary in made:
        if "error" in summary:  # raised in this process, without Ray's words around it
            raise UserError(summary["error"])
        summaries[task.key] = summary
        _refuse(task, summary, cache, strict)
    found = [known for task in tasks if (known := summaries[task.key]) is not None]
    for task, summary in zip(tasks, found, strict=True):
        _refuse(task, summary, cache, strict)
    return found


def _refuse(task: EncodeTask, summary: dict[str, Any], cache: TokenCache, strict: bool) -> None:
    """Stop at what :func:`refuse_bad_rows` refuses, first as the file was read, then as its rows were encoded."""
    read = cache.summary(task.rows_key) if strict else None
    for known in [read, summary] if read else [summary]:
        refuse_bad_rows(report_of([task], [known]), strict)


def _is_work_for_ray_data(tasks: list[EncodeTask]) -> bool:
    """Whether other cores, also those that the cluster may still start, save more time than their processes' start."""
    import ray

    if len(tasks) < 2 or not ray.is_initialized():
        return False
    saved = sum(task.size for task in tasks) * (1 - CPUS_HERE / max(most_cpus(), 1))
    return saved > RAY_DATA_START_BYTES


def _encode_elsewhere(task: EncodeTask, encoder: Encoder, cache: TokenCache) -> dict[str, Any]:
    """:func:`encode_chunk` in another process: its summary, or ``error`` as the user is to read it."""
    try:
        return encode_chunk(task, encoder, cache, lambda _: None)
    except UserError as error:
        return {"error": str(error)}


class _ChunkEncoder:
    """An actor that encodes chunks one after the other."""

    def __init__(self, packed: PackedEncoder, cache: TokenCache) -> None:
        self.encoder, self.cache = packed.unpack(), cache

    def encode(self, task: EncodeTask) -> dict[str, Any]:
        return _encode_elsewhere(task, self.encoder, self.cache)


def _encode_here(
    tasks: list[EncodeTask], encoder: Encoder, cache: TokenCache, on_rows: Callable[[int], None]
) -> Iterator[tuple[EncodeTask, dict[str, Any]]]:
    """Chunks with their summaries, as they are done: this process takes them from the front, actors from the back.

    It never waits for a process that has not started: a chunk that no actor can have begun is made here, and so is
    one whose actor was lost. Made twice, it is the same entry.
    """
    import ray

    waiting = deque(tasks)
    others = int(most_cpus()) - 1 if ray.is_initialized() else 0
    others = min(others, sum(task.size for task in tasks) // ACTOR_START_BYTES)
    actors: list[Any] = []
    if others > 0:
        packed = ray.put(pack_encoder(encoder))
        where = {"scheduling_strategy": "SPREAD", "label_selector": data_selector(node_kinds())}
        kind = ray.remote(_ChunkEncoder).options(num_cpus=1, **where)
        actors = [kind.remote(packed, cache) for _ in range(others)]
    free = deque(actors * 2)  # each holds two chunks, lest it wait while this process is busy with one
    held: dict[Any, tuple[Any, EncodeTask]] = {}
    started: set[Any] = set()
    try:
        while waiting or held:
            while free and len(waiting) > 1:
                actor, task = free.popleft(), waiting.pop()
                held[actor.encode.remote(task)] = actor, task
            if not waiting:
                holders = Counter(actor for actor, _ in held.values())
                idle = [ref for ref, (actor, _) in held.items() if actor not in started or holders[actor] > 1]
                if idle:
                    waiting.append(held.pop(idle[-1])[1])
            done = ray.wait(list(held), timeout=0 if waiting else None)[0] if held else []
            for ref in done:
                actor, task = held.pop(ref)
                try:
                    summary = ray.get(ref)
                except ray.exceptions.RayError:
                    waiting.append(task)
                    continue
                started.add(actor)
                free.append(actor)
                on_rows(summary.get("rows_in", 0))
                yield task, summary
            if waiting:
                task = waiting.popleft()
                yield task, encode_chunk(task, encoder, cache, on_rows)
    finally:
        for actor in actors:
            ray.kill(actor)


def _encode_by_ray_data(
    tasks: list[EncodeTask], encoder: Encoder, cache: TokenCache, on_rows: Callable[[int], None]
) -> Iterator[tuple[EncodeTask, dict[str, Any]]]:
    """Each chunk as a task on any node; with their summaries, as they are done."""
    import pyarrow as pa
    import ray
    from ray import cloudpickle

    shared = ray.put((pack_encoder(encoder), cache))

    def encode(batch: pa.Table) -> pa.Table:
        packed, cache = ray.get(shared)
        task = cloudpickle.loads(batch["task"][0].as_py())
        summary = json.dumps(_encode_elsewhere(task, packed.unpack(), cache))
        return pa.table({"number": batch["number"], "summary": [summary]})

    rows = pa.table({"number": range(len(tasks)), "task": [cloudpickle.dumps(task) for task in tasks]})
    done = one_task_each(rows, preserve_order=False).map_batches(
        encode, batch_size=None, batch_format="pyarrow", num_cpus=1
    )
    for row in done.iter_rows():
        task, summary = tasks[row["number"]], json.loads(row["summary"])
        on_rows(summary.get("rows_in", 0))
        yield task, summary


def report_of(tasks: list[EncodeTask], summaries: list[dict[str, Any]]) -> DropReport:
    """What was dropped of these chunks, from their summaries."""
    drops = DropReport()
    for task, summary in zip(tasks, summaries, strict=True):
        drops.rows_in += summary["rows_in"]
        drops.add_json(summary, task.chunk.path)
    return drops
