"""Side: RaySwift's rows → token blocks, by the call that ``rayswift sft`` makes.

Timed: :func:`load_train_data` alone, from files to token blocks that training can read, starting Ray's worker
processes and loading the tokenizer in each of them included. Not timed: this process's imports, starting Ray itself,
loading the tokenizer here.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True, help="data file")
    parser.add_argument("--max_length", type=int, required=True)
    parser.add_argument("--num_proc", type=int, required=True)
    parser.add_argument("--tokens", type=Path, help="write the ids of rows to this .npz file")
    parser.add_argument("--sample", type=int, help="how many rows of it, evenly spread (all)")
    parser.add_argument("--where", choices=["here", "ray_data"], help="where rows are encoded (as sft decides)")
    parser.add_argument("--nodes", type=int, default=1, help="Ray nodes on this machine, which share its cores")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    import ray

    from rayswift.arguments import make_arguments
    from rayswift.cluster import connect
    from rayswift.data.flow import encode_tasks
    from rayswift.data.flow.prepare import load_train_data
    from rayswift.data.names import resolve_datasets
    from rayswift.data.tokens.encoder import Encoder

    args = make_arguments(
        "sft",
        model=options.model,
        dataset=[options.rows],
        template="chatml",
        max_length=options.max_length,
        dataset_num_proc=options.num_proc,
        dataset_shuffle=False,
        split_dataset_ratio=0.0,
        load_from_cache_file=True,  # the benchmark decides by the cache folder it gives
    )
    datasets = resolve_datasets(args)
    if options.where:
        encode_tasks.RAY_DATA_START_BYTES = -1 if options.where == "ray_data" else 2**63
        encode_tasks.CPUS_HERE = 0
    if options.nodes > 1:
        from ray.cluster_utils import Cluster

        cores = {"num_cpus": max(options.num_proc // options.nodes, 1)}
        cluster = Cluster(initialize_head=True, head_node_args=cores)
        for _ in range(options.nodes - 1):
            cluster.add_node(**cores)
        args.address = cluster.address
    connect(args)
    encoder = Encoder(args.model, template=args.template, max_length=args.max_length)
    assert encoder.template_name == "chatml"
    done: dict[str, int] = {}
    started = time.perf_counter()
    data = load_train_data(args, datasets, encoder, done.__setitem__)
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "rows": len(data.train),
        "tokens": int(data.train.lengths.sum()),
        # Rows by stage as the user sees them: a warm run encodes none.
        "stages": {stage.split(" ")[0]: count for stage, count in done.items()},
    }
    if options.tokens:
        write_tokens(options.tokens, data.train, options.sample)
    options.out.write_text(json.dumps(result))
    ray.shutdown()


def write_tokens(path: Path, train: Any, sample: int | None) -> None:
    """All lengths, and ids and labels of evenly spread rows, end to end."""
    from rayswift.data.tokens.table import TokenRows

    rows = TokenRows(train)
    numbers = np.linspace(0, len(rows) - 1, min(sample or len(rows), len(rows))).astype(int)
    ids, labels = zip(*(rows[int(number)][:2] for number in numbers), strict=True)
    np.savez(path, lengths=train.lengths, numbers=numbers, ids=np.concatenate(ids), labels=np.concatenate(labels))


if __name__ == "__main__":
    main()
