"""Side: a stream of many tasks, one for each logical data node, read by many training ranks at once.

Everything is the product's: the plan, Ray Data's tasks, the reader's actor, each rank's ``read_stream`` and
``StreamLoader``. What is simulated: the data nodes are files of one task each, which this machine's cores read one
after the other, and the ranks share a few processes, where they take their steps in turn as training ranks do. Ray
Data's tasks ask for so little CPU that ``--tasks_at_once`` of them run.

    python sides/stream_readers.py --model DIR --nodes 1000 --ranks 512 --processes 8 --rows 64 --tasks_at_once 4 \
        --out FILE
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: What rows are made of.
WORDS = ("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not")


def write_rows(folder: Path, nodes: int, rows: int) -> list[str]:
    """A file for each data node."""
    draw = random.Random(0)
    paths = [folder / f"{node:05d}.jsonl" for node in range(nodes)]
    for path in paths:
        texts = (" ".join(draw.choices(WORDS, k=draw.randint(60, 240))) for _ in range(rows))
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(path) for path in paths]


class Counting:
    """The reader's actor, and how often it was asked."""

    def __init__(self, reader: Any) -> None:
        self._reader, self.calls = reader, 0

    def __getattr__(self, method: str) -> Any:
        self.calls += 1
        return getattr(self._reader, method)


class Ranks:
    """An actor: some of the ranks. They take their steps in turn, each with a loader of its own."""

    def __init__(self, reader: Any, ranks: list[int], world_size: int) -> None:
        from rayswift.data.flow.stream import read_stream
        from rayswift.data.tokens.table import StreamPosition
        from rayswift.train.loader import Rank, StreamLoader
        from rayswift.train.schedule import StepSchedule

        self._reader, self._tables = Counting(reader), 0
        schedule = StepSchedule(world_size, 1, 1_000_000, None)

        def tables(rank: int) -> Iterator[Any]:
            for table in read_stream(self._reader, rank):
                self._tables += 1
                yield table

        self._steps = [
            StreamLoader(
                lambda rank=rank: [tables(rank)], (StreamPosition(),), itertools.repeat(0), schedule,
                Rank(rank, world_size), lambda rows: {}, 0,
            ).step_items()
            for rank in ranks
        ]  # fmt: skip
        self._ranks = len(ranks)

    def read(self) -> dict[str, Any]:
        """Read to the end: where each row that these ranks were given is from, how many tokens."""
        import psutil

        places, tokens = [], 0
        for steps in itertools.zip_longest(*self._steps):
            for item in itertools.chain.from_iterable(itertools.chain.from_iterable(filter(None, steps))):
                for (path, position), row in item.placed:
                    places.append((path, position.number))
                    tokens += len(row.input_ids)
        cpu = sum(psutil.Process().cpu_times()[:2])
        blocks = self._tables / self._ranks
        return {"places": places, "tokens": tokens, "cpu_s": cpu, "calls": self._reader.calls, "blocks": blocks}


def process_of_reader() -> Any:
    """The process of the reader's actor."""
    import psutil

    ours = psutil.Process().children(recursive=True)
    return next(process for process in ours if "ray::StreamReader" in " ".join(process.cmdline()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    for name in ("nodes", "ranks", "processes", "rows", "tasks_at_once"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    import ray

    import rayswift
    from rayswift.arguments import make_arguments
    from rayswift.data.flow import plan, stream
    from rayswift.data.names import resolve_datasets
    from rayswift.data.tokens.encoder import Encoder

    os.chdir(Path(rayswift.__file__).parents[1])  # Ray's workers look there first
    with tempfile.TemporaryDirectory(prefix="rows-", dir=options.out.parent) as folder:
        paths = write_rows(Path(folder), options.nodes, options.rows)
        args = make_arguments(
            "pt", model=options.model, dataset=paths, template="chatml", max_length=2048, streaming=True, packing=True,
            max_steps=1_000_000,
        )  # fmt: skip
        encoder = Encoder.from_args(args, args.model)
        plan.SHARD_BYTES = 1  # every file is a task of its own, as if it were a big one,
        plan.MAX_PLANNED_TASKS = 1  # in one epoch
        ray.init(num_cpus=options.tasks_at_once, include_dashboard=False, log_to_driver=False,
                 object_store_memory=1 << 30)  # fmt: skip
        mix = plan.plan_streams(args, resolve_datasets(args).train, packing_length=args.max_length)
        assert len(mix.plans[0].tasks) == options.nodes, len(mix.plans[0].tasks)
        began = time.perf_counter()
        (reader,) = stream.start_stream_readers(mix, encoder, None, mix.start(), num_workers=options.ranks)
        groups = [list(range(first, options.ranks, options.processes)) for first in range(options.processes)]
        actors = [ray.remote(Ranks).options(num_cpus=0).remote(reader, group, options.ranks) for group in groups]
        found = ray.get([actor.read.remote() for actor in actors])
        seconds = time.perf_counter() - began
        process = process_of_reader()
        scale = getattr(stream, "WORKERS_TO_BLOCK", 2**31)
        places = [tuple(place) for one in found for place in one["places"]]
        result = {
            "ranks": options.ranks,
            "block_bytes": stream.STREAM_BLOCK_BYTES * (options.ranks // scale or 1),
            "rows": len(places),
            "rows_once": len(set(places)),
            "tokens": sum(one["tokens"] for one in found),
            "blocks": found[0]["blocks"],
            "calls": sum(one["calls"] for one in found),
            "seconds": seconds,
            "reader_cpu_s": sum(process.cpu_times()[:2]),
            "reader_mib": process.memory_full_info().pss / 2**20,
            "reader_threads": process.num_threads(),
            "ranks_cpu_s": sum(one["cpu_s"] for one in found),
        }
        options.out.write_text(json.dumps(result))
        ray.shutdown()


if __name__ == "__main__":
    main()
