"""Streaming datasets: the same stage as a lazy Ray Data stream, in an order that is a function of the plan alone.

A task of the plan (:mod:`rayswift.data.flow.plan`) is one or more shards: read → standard rows → shuffle → encode →
pack. It is one operator, because two would wait for each other's CPU for ever on a machine that training fills. A place
in the stream is ``(task, item)``, whatever the number of workers: every worker sees every block (those of one node
share its memory) and takes its share of each step, so a resumed run goes on at exactly that place.

``--interleave_prob`` makes a stream of each dataset, read side by side; which one gives the next item is a function of
seed and number of the item alone (:meth:`StreamMix.order`).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rayswift import private
from rayswift.cluster.placement import data_selector, most_free_cpus, node_kinds
from rayswift.data.files import Position
from rayswift.data.flow.plan import StreamMix, StreamPlan
from rayswift.data.flow.ray_data import one_task_each
from rayswift.data.flow.stage import StandardBatch, encode_rows, refuse_bad_rows, standard_batches
from rayswift.data.rows.standard import StandardRow
from rayswift.data.tokens.packed_encoder import PackedEncoder, pack_encoder
from rayswift.data.tokens.row_index import DropReport
from rayswift.data.tokens.table import StreamPlaces, StreamPosition

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from ray.data import Dataset

    from rayswift.data.tokens.encoder import Encoder

#: Blocks leave a task as soon as they are this big, so that training starts before a large file is read. They are as
#: many times as big as there are so many workers: handing one to a worker costs the reader half a millisecond.
STREAM_BLOCK_BYTES, WORKERS_TO_BLOCK = 1 << 20, 64
#: Token rows that wait for training, in bytes: of the task that is being trained, and of all later ones together.
READY_BYTES = 32 << 20
AHEAD_BYTES = 256 << 20
#: Tasks that read at once, beside one for each worker: the CPUs of others are not held by what would only wait.
TASKS_AHEAD = 3
#: Blocks that a worker is given by one call where so many are ready.
BLOCKS_AT_ONCE = 8
#: Seconds until a task that is held back asks again, for each task before it; and the most. Hundreds may be held back.
ASK_SECONDS, MOST_ASK_SECONDS = 0.1, 2.0
#: Rows encoded at a time.
STREAM_BATCH = 64
#: Rows packed together; packs that are not nearly full wait for the next window.
STREAM_PACKING_WINDOW = 1024
NEARLY_FULL = 0.97


# --- one task ---------------------------------------------------------------------------------------------------


def stream_tokens(
    plan: StreamPlan,
    encoder: Encoder,
    drop_log: Any | None = None,
    start: StreamPosition | None = None,
    reader: Any | None = None,
    num_cpus: float = 1,
    most_tasks: int | None = None,
    block_bytes: int = STREAM_BLOCK_BYTES,
) -> Dataset:
    """The stream as a lazy dataset of token rows: ``input_ids``, ``labels``, ``loss_scale``; where each is from:
    ``path``, ``kind``, ``number``; its place: ``task``, ``item`` and ``item_rows``, the number of rows of that item.

    Args:
        plan: the frozen plan.
        encoder: turns standard rows into token ids.
        drop_log: the run's event queue, which is told of dropped rows by ``push`` of ``{"event": "drops", ...}``.
        start: the place to begin at; tasks before it are not run.
        reader: the :class:`StreamReader` that says when enough is ready; None: read on.
        num_cpus: what each task asks of Ray.
        most_tasks: how many run at once; None: as many as there is room for.
        block_bytes: the size at which a block leaves its task.
    """
    import pyarrow as pa
    import ray
    from ray.data import TaskPoolStrategy

    begin = start or StreamPosition()
    packed = ray.put(pack_encoder(encoder))

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        encoder = ray.get(packed).unpack()
        for item in batch["id"]:
            task = begin.task + int(item)
            first = begin.item if task == begin.task else 0
            yield from _in_step(task_tokens(plan, task, first, encoder, drop_log), task, reader, block_bytes)

    tasks = one_task_each(pa.table({"id": range(len(plan.tasks) - begin.task)}), True, block_bytes)
    compute = TaskPoolStrategy(most_tasks) if most_tasks else None
    return tasks.map_batches(read, batch_size=None, num_cpus=num_cpus, compute=compute)


def _in_step(tables: Iterator[pa.Table], task: int, reader: Any | None, block_bytes: int) -> Iterator[pa.Table]:
    """The tables of a task, held back while enough is ready.

    Ray Data can hold back a task's output too, but its scheduling loop then asks without a pause whether it may go on:
    most of a core, on a machine whose cores are training.
    """
    import ray

    made = asked = 0
    for table in tables:
        if reader is not None and made - asked >= block_bytes:
            asked = made
            while pause := ray.get(reader.pause.remote(task, made)):
                time.sleep(pause)
        made += table.nbytes
        yield table
    if reader is not None:
        reader.task_ended.remote(task)


def task_tokens(
    plan: StreamPlan, task: int, first_item: int, encoder: Encoder, drop_log: Any | None
) -> Iterator[pa.Table]:
    """The tables of one task from an item on: a pure function of the plan."""
    import numpy as np
    import pyarrow as pa

    done = 0
    for epoch, shard in plan.tasks[task]:
        for tokens, items in _shard_items(plan, epoch, shard, encoder, drop_log):
            numbers = done + items
            done = int(numbers[-1]) + 1
            skip = int(np.searchsorted(numbers, first_item))
            if skip == len(numbers):
                continue
            columns = {
                "task": np.full(len(numbers), task, np.int32),
                "item": numbers,
                "item_rows": np.bincount(items)[items],
            }
            table = pa.Table.from_batches([tokens]).drop_columns(["source", "length"])
            for name, values in columns.items():
                table = table.append_column(name, pa.array(values))
            yield table.slice(skip)


def _shard_items(
    plan: StreamPlan, epoch: int, number: int, encoder: Encoder, drop_log: Any | None
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Token rows of one shard of one epoch, each batch with its rows' items (int64, from 0 in every batch)."""
    import numpy as np

    shard = plan.shards[number]
    rng = np.random.RandomState((plan.seed, epoch, number)) if plan.shuffle else None
    chunks = [shard.chunks[i] for i in rng.permutation(len(shard.chunks))] if rng else list(shard.chunks)
    batches = (batch for chunk in chunks for batch in standard_batches(chunk, shard.rules))
    rows = _shuffled(itertools.islice(_reported(batches, plan.strict, drop_log), shard.num_samples), plan, rng)
    tokens = _encoded(rows, encoder, plan.strict, drop_log)
    if plan.packing_length is not None:
        yield from _packed(tokens, plan.packing_length)
    else:
        yield from ((batch, np.arange(len(batch))) for batch in tokens if len(batch))


#: A standard row with its file and position.
PlacedRow = tuple[StandardRow, str, Position]


def _reported(batches: Iterator[StandardBatch], strict: bool, drop_log: Any | None) -> Iterator[PlacedRow]:
    """The usable rows; the others are reported with their place, or stop the run under ``--strict true``."""
    for batch in batches:
        drops = batch.report
        for reason in [reason for reason, broken in drops.broken.items() if broken == "file"]:
            lost = f"{reason}; what follows in this part of the file is lost"
            drops.add(lost, drops.counts.pop(reason), *drops.first[reason])
        drops.broken.clear()  # a stream goes on behind it
        _tell(drops, strict, drop_log)
        yield from ((row, batch.path, position) for row, position in zip(batch.rows, batch.positions, strict=True))


def _tell(drops: DropReport, strict: bool, drop_log: Any | None) -> None:
    if strict:
        refuse_bad_rows(drops, strict)
    if (drops.counts or drops.notes) and drop_log is not None:
        drop_log.tell("push", {"event": "drops", "lines": drops.lines()})


def _shuffled(rows: Iterator[PlacedRow], plan: StreamPlan, rng: Any) -> Iterator[list[PlacedRow]]:
    """Rows in groups of ``shuffle_buffer_size``, each group in random order (in file order without ``rng``)."""
    waiting: list[PlacedRow] = []
    size = plan.shuffle_buffer_size if rng else STREAM_BATCH
    for row in rows:
        waiting.append(row)
        if len(waiting) == size:
            yield [waiting[i] for i in rng.permutation(size)] if rng else waiting
            waiting = []
    if waiting:
        yield [waiting[i] for i in rng.permutation(len(waiting))] if rng else waiting


def _encoded(
    groups: Iterator[list[PlacedRow]], encoder: Encoder, strict: bool, drop_log: Any | None
) -> Iterator[pa.RecordBatch]:
    import numpy as np

    for group in groups:
        for start in range(0, len(group), STREAM_BATCH):
            part = group[start : start + STREAM_BATCH]
            drops = DropReport()
            places = [(path, position) for _, path, position in part]
            tokens = encode_rows([row for row, _, _ in part], places, encoder, drops, np.arange(len(part)))
            yield _with_places(tokens, places)
            _tell(drops, strict, drop_log)


def _with_places(tokens: pa.RecordBatch, places: list[tuple[str, Position]]) -> pa.RecordBatch:
    """Token rows with the file and position of each: ``path``, ``kind``, ``number``."""
    import pyarrow as pa

    table, found = pa.Table.from_batches([tokens]), [places[source] for source in tokens["source"].to_pylist()]
    table = table.append_column("path", pa.array([path for path, _ in found], pa.string()))
    table = table.append_column("kind", pa.array([position.kind for _, position in found], pa.string()))
    table = table.append_column("number", pa.array([position.number for _, position in found], pa.int64()))
    return table.combine_chunks().to_batches()[0] if len(table) else pa.RecordBatch.from_pylist([], table.schema)


def _packed(batches: Iterator[pa.RecordBatch], packing_length: int) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Rows in packs; a window's packs that are not nearly full are opened again with the next window's rows."""
    import pyarrow as pa

    waiting: pa.Table | None = None
    for batch in batches:
        table = pa.Table.from_batches([batch])
        waiting = table if waiting is None else pa.concat_tables([waiting, table])
        if len(waiting) >= STREAM_PACKING_WINDOW:
            full, waiting = _pack_window(waiting, packing_length, NEARLY_FULL)
            if full is not None:
                yield full
    if waiting is not None and len(waiting):
        full, _ = _pack_window(waiting, packing_length, 0.0)
        assert full is not None
        yield full


def _pack_window(
    rows: pa.Table, packing_length: int, least: float
) -> tuple[tuple[pa.RecordBatch, np.ndarray] | None, pa.Table]:
    """Packs filled to at least this share, as rows and their items; and the rows that wait."""
    import numpy as np

    from rayswift.data.tokens.packing import pack

    lengths = rows["length"].to_numpy().astype(np.int64)
    packs = pack(lengths, packing_length)
    filled = np.add.reduceat(lengths[packs.rows], packs.offsets[:-1])
    # With nothing full enough the fullest goes, so that a window of short rows cannot grow for ever.
    enough = filled >= min(least * packing_length, filled.max())
    counts = np.diff(packs.offsets)
    taken = np.repeat(enough, counts)
    batch = rows.take(packs.rows[taken]).combine_chunks().to_batches()
    items = np.repeat(np.arange(int(enough.sum())), counts[enough])
    return (batch[0], items) if batch else None, rows.take(np.sort(packs.rows[~taken]))


# --- handing it out ---------------------------------------------------------------------------------------------


class StreamReader:
    """Runs a stream once and hands its blocks, by number, to every worker. An actor of a worker group's first worker.

    Ray Data's ``streaming_split`` would deal out blocks, so that what a worker trains depends on how many there are.
    """

    def __init__(
        self, plan: StreamPlan, packed: PackedEncoder, drop_log: Any, start: StreamPosition, num_workers: int,
        num_cpus: float,
    ) -> None:  # fmt: skip
        import ray

        self._asked, self._scale = dict.fromkeys(range(num_workers), 0), max(1, num_workers // WORKERS_TO_BLOCK)
        self._blocks: dict[int, tuple[Any, int]] = {}  # by number: reference and bytes
        self._first = self._end = 0  # of their numbers
        self._asking = Counter({0: num_workers})  # by number: workers that have all before it
        self._over = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._made: dict[int, int] = {}  # bytes that unfinished tasks have made
        self._allowed: dict[int, int] = {}  # … at which they were told to go on
        self._first_task = start.task
        self._ended: set[int] = set()
        own = ray.get_runtime_context().current_actor
        limits = (num_workers + TASKS_AHEAD, STREAM_BLOCK_BYTES * self._scale)
        stream = (plan, packed.unpack(), drop_log, start, own, num_cpus, *limits)
        threading.Thread(target=self._read, args=stream, daemon=True).start()

    def _read(self, *stream: Any) -> None:
        from ray.data import DataContext

        try:
            dataset = stream_tokens(*stream)
            with DataContext.current(dataset.context):
                for ref, size in private.iter_block_refs(dataset):
                    with self._changed:
                        self._blocks[self._end] = (ref, size)
                        self._end += 1
                        self._changed.notify_all()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def pause(self, task: int, made: int) -> float:
        """Seconds until a task that has made so many bytes asks again; none when it may make more.

        The first task that has not ended never waits for another: only for the workers to train what is ready. Who
        makes again what was lost with a node waits for nobody: the workers wait for it.
        """
        with self._changed:
            if task < self._first_task or made <= self._allowed.get(task, -1):
                return 0.0
            self._made[task] = made
            if task == self._first_task:
                has_room = sum(size for _, size in self._blocks.values()) < READY_BYTES * self._scale
            else:
                ahead = (bytes_ for other, bytes_ in self._made.items() if other != self._first_task)
                has_room = sum(ahead) < AHEAD_BYTES
            if has_room:
                self._allowed[task] = made
                return 0.0
            return min(ASK_SECONDS * (1 + task - self._first_task), MOST_ASK_SECONDS)

    def task_ended(self, task: int) -> None:
        """A task has handed on its last table."""
        with self._changed:
            self._made.pop(task, None)
            if task >= self._first_task:
                self._ended.add(task)
            while self._first_task in self._ended:
                self._ended.remove(self._first_task)
                self._first_task += 1

    def blocks(self, worker: int, number: int) -> list[Any]:
        """References of the blocks from this number on that are ready, at most :data:`BLOCKS_AT_ONCE`; waits for the
        first of them. Empty after the last.

        Raises:
            Exception: what stopped the stream.
        """
        with self._changed:
            self._asking[self._asked[worker]] -= 1
            self._asking[number] += 1
            self._asked[worker] = number
            while not self._asking[self._first]:  # every worker has it
                del self._asking[self._first], self._blocks[self._first]
                self._first += 1
            self._changed.wait_for(lambda: number < self._end or self._over)
            if number == self._end and self._error is not None:
                raise self._error
            return [self._blocks[one][0] for one in range(number, min(number + BLOCKS_AT_ONCE, self._end))]


def start_stream_readers(
    mix: StreamMix, encoder: Encoder, drop_log: Any, start: StreamPlaces, num_workers: int
) -> list[Any]:
    """Start an actor for each stream; they end with the process that started them.

    They are on this process's node: that of another may be lost while this one goes on. A task that has made enough
    waits, and keeps its CPU. So a task of each stream fits into what training leaves free on the node with most of it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": num_workers + 2, "scheduling_strategy": here}
    actor = ray.remote(StreamReader).options(**options)
    free = most_free_cpus(data_selector(node_kinds()))
    num_cpus = max(int(min(1.0, free / len(mix.plans)) * 10_000), 1) / 10_000  # Ray's finest share
    packed = ray.put(pack_encoder(encoder))
    return [
        actor.remote(plan, packed, drop_log, place, num_workers, num_cpus)
        for plan, place in zip(mix.plans, start, strict=True)
    ]


def read_stream(reader: Any, worker: int) -> Iterator[pa.Table]:
    """The stream's tables in order, as one worker sees them; the next ones are asked for while these are used."""
    import ray

    number, coming = 0, reader.blocks.remote(worker, 0)
    while found := ray.get(coming):
        number += len(found)
        coming = reader.blocks.remote(worker, number)
        found.reverse()
        while found:  # what was used is held no longer
            yield ray.get(found.pop())
