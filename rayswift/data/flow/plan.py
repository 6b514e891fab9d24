"""What a stream reads in which order: a function of files, epochs and seed, frozen when the run starts.

Files are grouped into shards; a task of the stream is a list of (epoch, shard). A mixture (``--interleave_prob``) is a
stream of each dataset, and the order in which they give their items.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rayswift.data.files import Chunk, chunk_bytes, plan_chunks
from rayswift.data.flow.cache import encoder_hash, rules_hash
from rayswift.data.names import ResolvedDataset
from rayswift.data.rows.standard import RowRules
from rayswift.data.tokens.table import StreamPlaces, StreamPosition

if TYPE_CHECKING:
    from rayswift.data.tokens.encoder import Encoder

#: A stream is planned for as many epochs as fit into this many tasks (at least one epoch): millions of rows. Ray
#: Data's scheduling loop looks at every waiting task, so thousands would cost half a core.
MAX_PLANNED_TASKS = 256
#: … and for no more epochs than this.
MAX_PLANNED_EPOCHS = 10_000
#: Small files are read together, so that rows of different files mix: this many bytes make a shard.
SHARD_BYTES = 32 << 20
#: Choices of a stream that are drawn at once; a resumed run draws the ones it is in again.
DRAWS = 1024


@dataclass(frozen=True)
class Shard:
    """What is read and shuffled together: chunks of one dataset, its row rules and its ``#N``; ``size`` in bytes."""

    chunks: tuple[Chunk, ...]
    rules: RowRules
    num_samples: int | None
    size: int


@dataclass(frozen=True)
class StreamPlan:
    """Everything the order of a stream depends on; frozen when the run starts. A task is a list of (epoch, shard).

    ``packing_length``: tokens of a pack, None without packing.
    """

    shards: tuple[Shard, ...]
    tasks: tuple[tuple[tuple[int, int], ...], ...]
    seed: int
    shuffle: bool
    shuffle_buffer_size: int
    packing_length: int | None
    strict: bool

    def fingerprint(self, encoder: Encoder) -> str:
        """A hash of what decides which tokens come at which place; where the files lie does not count."""
        shards = [
            ([(chunk.path.rsplit("/", 1)[-1], chunk.start, chunk.end) for chunk in shard.chunks], shard.num_samples,
             shard.size, rules_hash(shard.rules)) for shard in self.shards
        ]  # fmt: skip
        order = (self.tasks, self.seed, self.shuffle, self.shuffle_buffer_size, self.packing_length)
        return hashlib.sha256(repr((shards, order, encoder_hash(encoder))).encode()).hexdigest()[:40]


@dataclass(frozen=True)
class StreamMix:
    """The streams of a run: one of all datasets in turn, or with ``--interleave_prob`` one of each.

    ``probabilities``: how often each gives the next item.
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
        """The stream that gives item number ``first`` of the run, the one that gives the next, and so on."""
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

    shards = [shard for dataset in datasets for shard in _shards(dataset)]
    tasks: list[list[tuple[int, int]]] = []
    size = SHARD_BYTES
    for epoch in range(MAX_PLANNED_EPOCHS):
        if epoch and len(tasks) >= MAX_PLANNED_TASKS:
            break
        shuffled = np.random.RandomState((args.data_seed, epoch)).permutation(len(shards))
        for number in shuffled if args.dataset_shuffle else range(len(shards)):
            if size >= SHARD_BYTES:
                tasks.append([])
                size = 0
            tasks[-1].append((epoch, int(number)))
            size += max(shards[number].size, 1)
    frozen = tuple(tuple(task) for task in tasks)
    shuffle, buffer = args.dataset_shuffle, args.shuffle_buffer_size
    return StreamPlan(tuple(shards), frozen, args.data_seed, shuffle, buffer, packing_length, args.strict)


def _shards(dataset: ResolvedDataset) -> list[Shard]:
    """Neighbouring chunks together until they are big enough; everything together under ``#N``."""
    chunks = plan_chunks(dataset.files)
    limit = dataset.spec.num_samples
    groups: list[list[Chunk]] = [[]]
    size = 0
    for chunk in chunks:
        if size >= SHARD_BYTES and not limit:
            groups.append([])
            size = 0
        groups[-1].append(chunk)
        size += chunk_bytes(chunk)
    return [Shard(tuple(group), dataset.rules, limit, sum(map(chunk_bytes, group))) for group in groups]
