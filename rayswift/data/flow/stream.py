"""Streaming datasets: the same stages as a lazy Ray Data stream, in an order that is a function of the plan alone.

``plan`` (files grouped into pieces, epochs, seed) → tasks of one or more pieces: read → standard rows → shuffle →
encode → pack. It is one operator, because two would wait for each other's CPU for ever on a machine that training
fills. A place in the stream is ``(task, unit)``, whatever the number of workers: every worker sees every block (those
of one node share its memory) and takes its share of each step, so a resumed run goes on at exactly that place.

``--interleave_prob`` makes a stream of each dataset, read side by side; which one gives the next unit is a function of
seed and number of the unit alone (:meth:`StreamMix.order`).
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift import private
from rayswift.data.files import Chunk, Position, chunk_bytes, plan_chunks
from rayswift.data.flow.cache import encoder_hash, rules_hash
from rayswift.data.flow.ray_data import one_task_each
from rayswift.data.flow.stage import StandardBatch, encode_rows, refuse_bad_rows, standard_batches
from rayswift.data.names import ResolvedDataset
from rayswift.data.rows.standard import RowRules, StandardRow
from rayswift.data.tokens.packed_encoder import PackedEncoder, pack_encoder
from rayswift.data.tokens.row_index import DropReport
from rayswift.data.tokens.table import StreamPlaces, StreamPosition

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from ray.data import Dataset

    from rayswift.data.tokens.encoder import Encoder

#: A stream is planned for as many epochs as fit into this many tasks (at least one epoch): millions of rows. Ray
#: Data's scheduling loop looks at every waiting task, so thousands would cost half a core.
MAX_PLANNED_TASKS = 256
#: … and for no more epochs than this.
MAX_PLANNED_EPOCHS = 10_000
#: Small files are read together, so that rows of different files mix: this many bytes make a piece.
PIECE_BYTES = 32 << 20
#: Blocks leave a task as soon as they are this big, so that training starts before a large file is read.
STREAM_BLOCK_BYTES = 1 << 20
#: Token rows that wait for training, in bytes: of the task that is being trained, and of all later ones together.
READY_BYTES = 32 << 20
AHEAD_BYTES = 256 << 20
#: Rows encoded at a time.
STREAM_BATCH = 64
#: Rows packed together; packs that are not nearly full wait for the next window.
STREAM_PACKING_WINDOW = 1024
NEARLY_FULL = 0.97
#: Choices of a stream that are drawn at once; a resumed run draws the ones it is in again.
DRAWS = 1024


@dataclass(frozen=True)
class Piece:
    """What is read and shuffled together: chunks of one dataset, its row rules and its ``#N``; ``size`` in bytes."""

    chunks: tuple[Chunk, ...]
    rules: RowRules
    num_samples: int | None
    size: int


@dataclass(frozen=True)
class StreamPlan:
    """Everything the order of a stream depends on; frozen when the run starts. A task is a list of (epoch, piece).

    ``packing_length``: tokens of a pack, None without packing.
    """

    pieces: tuple[Piece, ...]
    tasks: tuple[tuple[tuple[int, int], ...], ...]
    seed: int
    shuffle: bool
    shuffle_buffer_size: int
    packing_length: int | None
    strict: bool

    def fingerprint(self, encoder: Encoder) -> str:
        """A hash of what decides which tokens come at which place; where the files lie does not count."""
        pieces = [
            ([(chunk.path.rsplit("/", 1)[-1], chunk.start, chunk.end) for chunk in piece.chunks], piece.num_samples,
             piece.size, rules_hash(piece.rules)) for piece in self.pieces
        ]  # fmt: skip
        order = (self.tasks, self.seed, self.shuffle, self.shuffle_buffer_size, self.packing_length)
        return hashlib.sha256(repr((pieces, order, encoder_hash(encoder))).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class StreamMix:
    """The streams of a run: one of all datasets in turn, or with ``--interleave_prob`` one of each.

    ``probabilities``: how often each gives the next unit.
    """

    plans: tuple[StreamPlan, ...]
    probabilities: tuple[float, ...] = (1.0,)

    def fingerprint(self, encoder: Encoder) -> str:
        """A hash of what decides which tokens come at which place."""
        parts = [plan.fingerprint(encoder) for plan in self.plans]
        return hashlib.sha256(repr((parts, self.probabilities)).encode()).hexdigest()[:40]

    def start(self) -> StreamPlaces:
        """The beginning of every stream."""
        return (StreamPosition(),) * len(self.plans)

    def order(self, first: int) -> Iterator[int]:
        """The stream that gives unit number ``first`` of the run, the one that gives the next, and so on."""
        import numpy as np

        if len(self.plans) == 1:
            yield from itertools.repeat(0)
        draws, skip = divmod(first, DRAWS)
        for number in itertools.count(draws):
            random = np.random.RandomState((self.plans[0].seed, number))
            yield from random.choice(len(self.plans), DRAWS, p=self.probabilities)[skip:].tolist()
            skip = 0


def plan_streams(args: Any, datasets: list[ResolvedDataset], packing_length: int | None) -> StreamMix:
    """Freeze the plans of the streams over these datasets."""
    weights = args.interleave_prob
    if not weights:
        return StreamMix((plan_stream(args, datasets, packing_length),))
    chosen = [(dataset, weight) for dataset, weight in zip(datasets, weights, strict=True) if weight]
    plans = tuple(plan_stream(args, [dataset], packing_length) for dataset, _ in chosen)
    total = sum(weights)
    return StreamMix(plans, tuple(weight / total for _, weight in chosen))


def plan_stream(args: Any, datasets: list[ResolvedDataset], packing_length: int | None) -> StreamPlan:
    """Freeze the plan of one stream over these datasets."""
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
    return StreamPlan(tuple(pieces), frozen, args.data_seed, shuffle, buffer, packing_length, args.strict)


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
        size += chunk_bytes(chunk)
    return [Piece(tuple(group), dataset.rules, limit, sum(map(chunk_bytes, group))) for group in groups]


# --- one task ---------------------------------------------------------------------------------------------------


def stream_tokens(
    plan: StreamPlan,
    encoder: Encoder,
    drop_log: Any | None = None,
    start: StreamPosition | None = None,
    reader: Any | None = None,
    num_cpus: float = 1,
) -> Dataset:
    """The stream as a lazy dataset of token rows: ``input_ids``, ``labels``, ``loss_scale``, and the place of each:
    ``task``, ``unit`` and ``unit_rows``, the number of rows of that unit.

    Args:
        plan: the frozen plan.
        encoder: turns standard rows into token ids.
        drop_log: an actor whose ``push`` takes ``{"event": "drops", ...}``; where dropped rows are reported.
        start: the place to begin at; tasks before it are not run.
        reader: the :class:`StreamReader` that says when enough is ready; None: read on.
        num_cpus: what each task asks of Ray.
    """
    import pyarrow as pa
    import ray

    begin = start or StreamPosition()
    packed = ray.put(pack_encoder(encoder))

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        encoder = ray.get(packed).unpack()
        for item in batch["id"]:
            task = begin.task + int(item)
            first = begin.unit if task == begin.task else 0
            yield from _in_step(task_tokens(plan, task, first, encoder, drop_log), task, reader)

    tasks = one_task_each(pa.table({"id": range(len(plan.tasks) - begin.task)}), True, STREAM_BLOCK_BYTES)
    return tasks.map_batches(read, batch_size=None, num_cpus=num_cpus)


def _in_step(tables: Iterator[pa.Table], task: int, reader: Any | None) -> Iterator[pa.Table]:
    """The tables of a task, held back while enough is ready.

    Ray Data can hold back a task's output too, but its scheduling loop then asks without a pause whether it may go on:
    most of a core, on a machine whose cores are training.
    """
    import ray

    made = asked = 0
    for table in tables:
        if reader is not None and made - asked >= STREAM_BLOCK_BYTES:
            asked = made
            while not ray.get(reader.has_room.remote(task, made)):
                time.sleep(0.1)
        made += table.nbytes
        yield table
    if reader is not None:
        reader.task_ended.remote(task)


def task_tokens(
    plan: StreamPlan, task: int, first_unit: int, encoder: Encoder, drop_log: Any | None
) -> Iterator[pa.Table]:
    """The tables of one task from a unit on: a pure function of the plan."""
    import numpy as np
    import pyarrow as pa

    done = 0
    for epoch, piece in plan.tasks[task]:
        for tokens, units in _piece_units(plan, epoch, piece, encoder, drop_log):
            numbers = done + units
            done = int(numbers[-1]) + 1
            skip = int(np.searchsorted(numbers, first_unit))
            if skip == len(numbers):
                continue
            columns = {
                "task": np.full(len(numbers), task, np.int32),
                "unit": numbers,
                "unit_rows": np.bincount(units)[units],
            }
            table = pa.Table.from_batches([tokens]).drop_columns(["source", "length"])
            for name, values in columns.items():
                table = table.append_column(name, pa.array(values))
            yield table.slice(skip)


def _piece_units(
    plan: StreamPlan, epoch: int, number: int, encoder: Encoder, drop_log: Any | None
) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    """Token rows of one piece of one epoch, each batch with its rows' units (int64, from 0 in every batch)."""
    import numpy as np

    piece = plan.pieces[number]
    rng = np.random.RandomState((plan.seed, epoch, number)) if plan.shuffle else None
    chunks = [piece.chunks[i] for i in rng.permutation(len(piece.chunks))] if rng else list(piece.chunks)
    batches = (batch for chunk in chunks for batch in standard_batches(chunk, piece.rules))
    rows = _shuffled(_limited(_reported(batches, plan.strict, drop_log), piece.num_samples), plan, rng)
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
        drop_log.push.remote({"event": "drops", "lines": drops.lines()})


def _limited(rows: Iterator[PlacedRow], limit: int | None) -> Iterator[PlacedRow]:
    for number, row in enumerate(rows):
        if number == limit:
            return
        yield row


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
            yield encode_rows([row for row, _, _ in part], places, encoder, drops, np.arange(len(part)))
            _tell(drops, strict, drop_log)


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
    """Packs filled to at least this share, as rows and their units; and the rows that wait."""
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
    units = np.repeat(np.arange(int(enough.sum())), counts[enough])
    return (batch[0], units) if batch else None, rows.take(np.sort(packs.rows[~taken]))


# --- handing it out ---------------------------------------------------------------------------------------------


class StreamReader:
    """Runs a stream once and hands its blocks, by number, to every worker. An actor of a worker group's first worker.

    Ray Data's ``streaming_split`` would deal out blocks, so that what a worker trains depends on how many there are.
    """

    def __init__(
        self,
        plan: StreamPlan,
        packed: PackedEncoder,
        drop_log: Any,
        start: StreamPosition,
        num_workers: int,
        num_cpus: float = 1,
    ) -> None:
        import ray

        self._asked = dict.fromkeys(range(num_workers), 0)
        self._blocks: dict[int, tuple[Any, int]] = {}  # by number: reference and bytes
        self._end = 0
        self._over = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._made: dict[int, int] = {}  # bytes that unfinished tasks have made
        self._first_task = start.task
        self._ended: set[int] = set()
        stream = (plan, packed.unpack(), drop_log, start, ray.get_runtime_context().current_actor, num_cpus)
        threading.Thread(target=self._read, args=stream, daemon=True).start()

    def _read(self, *stream: Any) -> None:
        from ray.data import DataContext

        try:
            dataset = stream_tokens(*stream)
            with DataContext.current(dataset.context):
                for ref, size in private.iter_block_refs(dataset):
                    self._add(ref, size)
        except BaseException as error:
            self._error = error
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def _add(self, ref: Any, size: int) -> None:
        with self._changed:
            self._blocks[self._end] = (ref, size)
            self._end += 1
            self._changed.notify_all()

    def has_room(self, task: int, made: int) -> bool:
        """Whether a task that has made so many bytes may make more.

        The first task that has not ended never waits for another: only for the workers to train what is ready.
        """
        with self._changed:
            self._made[task] = made
            if task == self._first_task:
                return sum(size for _, size in self._blocks.values()) < READY_BYTES
            return sum(bytes_ for other, bytes_ in self._made.items() if other != self._first_task) < AHEAD_BYTES

    def task_ended(self, task: int) -> None:
        """A task has handed on its last table."""
        with self._changed:
            self._made.pop(task, None)
            self._ended.add(task)
            while self._first_task in self._ended:
                self._ended.remove(self._first_task)
                self._first_task += 1

    def block(self, worker: int, number: int) -> list[Any] | None:
        """A block, as a list with its reference; None after the last.

        Raises:
            Exception: what stopped the stream.
        """
        with self._changed:
            self._asked[worker] = number
            for done in [known for known in self._blocks if known < min(self._asked.values())]:
                del self._blocks[done]
            self._changed.wait_for(lambda: number < self._end or self._over)
            if number < self._end:
                return [self._blocks[number][0]]
            if self._error is not None:
                raise self._error
            return None


def start_stream_readers(
    mix: StreamMix, encoder: Encoder, drop_log: Any, start: StreamPlaces, num_workers: int
) -> list[Any]:
    """Start an actor for each stream; they end with the process that started them.

    A task that has made enough waits, and keeps its CPU. So a task of each stream fits into what training always leaves
    free: a CPU, or half of the only one.
    """
    import ray

    options = {"num_cpus": 0, "max_concurrency": num_workers + 2}
    actor = ray.remote(StreamReader).options(**options)
    num_cpus = min(1.0, ray.cluster_resources().get("CPU", 1) / 2) / len(mix.plans)
    num_cpus = max(int(num_cpus * 10_000), 1) / 10_000  # Ray's finest share
    packed = ray.put(pack_encoder(encoder))
    return [
        actor.remote(plan, packed, drop_log, place, num_workers, num_cpus)
        for plan, place in zip(mix.plans, start, strict=True)
    ]


def read_stream(reader: Any, worker: int) -> Iterator[pa.Table]:
    """The stream's tables in order, as one worker sees them; the next one is asked for while one is used."""
    import ray

    number, coming = 0, reader.block.remote(worker, 0)
    while (found := ray.get(coming)) is not None:
        number += 1
        coming = reader.block.remote(worker, number)
        yield ray.get(found[0])
