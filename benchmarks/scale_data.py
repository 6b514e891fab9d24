"""Streaming at the size of a cluster: 1,000 data nodes' blocks through the reader's actor to 512 training ranks.

The parts are the product's: the plan, Ray Data's tasks, ``StreamReader``, each rank's ``read_stream`` and
``StreamLoader``. Simulated are the machines (``sides/stream_readers.py`` says how): a data node is a task with a file
of its own, the ranks share a few processes of this machine. So what one core does is measured, by the processor time of
the process that does it, and not a network. Every row must come to exactly one rank, once.

``coordination``: the reader's actor, which all ranks and tasks ask: blocks for each second of a core, with so many
ranks and with few, from which its part for each call follows. ``data_node``: what one core reads, encodes and packs,
with Qwen2.5's tokenizer (``sides/stream_task.py``). ``limit``: tokens/s that either gives, blocks being full.

One line of JSON: ``scale_data``. There is no peer: ``--repository DIR`` measures another commit's instead.

    python benchmarks/scale_data.py [--nodes 1000] [--ranks 512] [--repository DIR]
"""

from __future__ import annotations

import os
import runpy
import statistics
import sys
from pathlib import Path
from typing import Any

from harness.corpus import make_corpus
from harness.environments import REPOSITORY
from harness.measure import SIDES, cores, print_line, run_side, scratch_folder, versions
from harness.options import model_folder, parser

#: Ranks with which the reader does little but read: what is left of its work is Ray Data's.
FEW = 8
ROWS = 64
#: Bytes of a token in a block: an id, a label, and what stands beside each row.
TOKEN_BYTES = 8.2


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--nodes", type=int, help="logical data nodes (1,000; --quick: 50)")
    options.add_argument("--ranks", type=int, help="training ranks (512; --quick: 64)")
    options.add_argument("--processes", type=int, default=8, help="processes that the ranks share")
    options.add_argument("--repository", type=Path, default=REPOSITORY, help="checkout whose reader is measured")
    given = options.parse_args()
    given.nodes = given.nodes or (50 if given.quick else 1000)
    given.ranks = given.ranks or (64 if given.quick else 512)
    given.pairs = given.pairs or 1  # every rank walks through every block: ten minutes on two cores
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(given.repository), os.environ.get("PYTHONPATH"))))
    tokenizer = runpy.run_path(str(REPOSITORY / "tools" / "qwen_tokenizer.py"))["build_qwen_tokenizer"](
        REPOSITORY / ".cache" / "qwen2.5-tokenizer"
    )
    many, few, tasks = [], [], []
    with scratch_folder() as folder:
        for number in range(given.pairs):
            few.append(read(given, FEW, folder / f"few-{number}"))
            many.append(read(given, given.ranks, folder / f"many-{number}"))
            tasks.append(encode(tokenizer, 3 if given.quick else 15, folder / f"task-{number}"))
    coordination, full = coordinated(many, few), many[0]["block_bytes"] / TOKEN_BYTES
    rates = [task["tokens"] / task["cpu_s"] for task in tasks]
    per_core = statistics.median(rates)
    print_line(
        "scale_data",
        {
            "data_nodes": given.nodes,
            "ranks": given.ranks,
            "checked": f"each of {given.nodes * ROWS} rows at one rank, once",
            "coordination": coordination,
            "data_node": {"tokens_per_core_s": round(per_core), "spread": spread(rates)},
            "limit": {
                "coordination_tokens_per_s": round(coordination["blocks_per_core_s"] * full),
                "one_core_of_a_data_node_tokens_per_s": round(per_core),
            },
            "pairs": given.pairs,
            "versions": versions("rayswift", "ray", "pyarrow", "tokenizers"),
        },
    )  # fmt: skip


def read(options: Any, ranks: int, cache: Path) -> dict[str, Any]:
    """One reading of the whole stream. Ends the benchmark when a row was lost or came twice."""
    program = [
        sys.executable, SIDES / "stream_readers.py", "--model", model_folder(options), "--nodes", str(options.nodes),
        "--ranks", str(ranks), "--processes", str(min(options.processes, ranks)), "--rows", str(ROWS),
        "--tasks_at_once", str(cores()),
    ]  # fmt: skip
    run = run_side("stream_readers", program, cache)
    if not run["rows"] == run["rows_once"] == options.nodes * ROWS:
        sys.exit(f"{run['rows']} rows came, {run['rows_once']} different ones, of {options.nodes * ROWS}")
    print(f"{ranks} ranks: {run}", file=sys.stderr)
    return run


def encode(tokenizer: str, seconds: float, cache: Path) -> dict[str, Any]:
    """One task on one core."""
    program = [sys.executable, SIDES / "stream_task.py", "--model", tokenizer, "--dataset", make_corpus(0.05)]
    return run_side("stream_task", [*program, "--seconds", str(seconds)], cache)


def coordinated(many: list[dict[str, Any]], few: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the reader's actor."""
    rates = [run["blocks"] / run["reader_cpu_s"] for run in many]
    pairs_of_runs = list(zip(many, few, strict=True))
    each = [(a["reader_cpu_s"] - b["reader_cpu_s"]) / (a["calls"] - b["calls"]) for a, b in pairs_of_runs]
    middle = {name: statistics.median(run[name] for run in many) for name in many[0]}
    return {
        "blocks_per_core_s": round(statistics.median(rates), 1),
        "spread": spread(rates),
        "microseconds_per_call": round(statistics.median(each) * 1e6, 1),
        "calls": round(middle["calls"]),
        "calls_per_block_and_rank": round(middle["calls"] / middle["blocks"] / (many[0]["ranks"]), 3),
        "cpu_s": round(middle["reader_cpu_s"], 1),
        "cpu_s_with_few_ranks": round(statistics.median(run["reader_cpu_s"] for run in few), 1),
        "seconds": round(middle["seconds"], 1),
        "milliseconds_per_block_of_a_rank": round(
            statistics.median(rank_seconds(*two) for two in pairs_of_runs) * 1e3, 2
        ),
        "memory_mib": round(middle["reader_mib"]),
        "threads": round(middle["reader_threads"]),
        "ranks_cpu_s": round(middle["ranks_cpu_s"], 1),
    }


def rank_seconds(many: dict[str, Any], few: dict[str, Any]) -> float:
    """Processor time of one rank for one block."""
    return (many["ranks_cpu_s"] - few["ranks_cpu_s"]) / (many["ranks"] - few["ranks"]) / many["blocks"]


def spread(values: list[float]) -> float:
    """(largest − smallest) / median."""
    return round((max(values) - min(values)) / statistics.median(values), 3)


if __name__ == "__main__":
    main()
