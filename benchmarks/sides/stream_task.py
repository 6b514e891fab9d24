"""Side: what one core reads, encodes and packs of a stream: a task of its plan, as a data node runs it.

python sides/stream_task.py --model DIR --dataset FILE --seconds 20 --out FILE
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="how long to read after the first rows")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before a library counts cores

    import pyarrow.compute as pc

    from rayswift.arguments import make_arguments
    from rayswift.data.flow.plan import plan_streams
    from rayswift.data.flow.stream import task_tokens
    from rayswift.data.names import resolve_datasets
    from rayswift.data.tokens.encoder import Encoder

    args = make_arguments(
        "pt", model=options.model, dataset=[options.dataset], template="chatml", max_length=4096, streaming=True,
        packing=True, max_steps=1_000_000,
    )  # fmt: skip
    encoder = Encoder.from_args(args, args.model)
    (plan,) = plan_streams(args, resolve_datasets(args).train, packing_length=args.max_length).plans
    tables = (table for task in range(len(plan.tasks)) for table in task_tokens(plan, task, 0, encoder, None))
    next(tables)
    began, used, tokens, size = time.perf_counter(), time.process_time(), 0, 0
    for table in tables:
        tokens += pc.sum(pc.list_value_length(table["input_ids"])).as_py()
        size += table.nbytes
        if time.perf_counter() - began > options.seconds:
            break
    seconds = time.perf_counter() - began
    result = {"tokens": tokens, "bytes": size, "seconds": seconds, "cpu_s": time.process_time() - used}
    options.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
