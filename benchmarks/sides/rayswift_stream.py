"""Side: read a dataset as a training run with ``--streaming true`` does, at full speed, for some seconds.

The stream is planned and handed out as the train flow does it for one worker without packing: ``plan_streams``, the
reader's actor, ``read_stream``. Reading begins with the plan; Ray is started before.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="how long to read after the first row")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    import pyarrow.compute as pc
    import ray

    from rayswift.arguments import make_arguments
    from rayswift.cluster import connect
    from rayswift.data.flow.plan import plan_streams
    from rayswift.data.flow.stream import read_stream, start_stream_readers
    from rayswift.data.names import resolve_datasets
    from rayswift.data.tokens.encoder import Encoder

    args = make_arguments(
        "sft", model=options.model, dataset=[options.dataset], template="chatml", max_length=2048, streaming=True,
        max_steps=1_000_000,
    )  # fmt: skip
    encoder = Encoder(args.model, template=args.template, max_length=args.max_length)
    connect(args)
    began = time.time()
    mix = plan_streams(args, resolve_datasets(args).train, packing_length=None)
    (reader,) = start_stream_readers(mix, encoder, None, mix.start(), num_workers=1)
    first, rows, tokens = None, 0, 0
    for table in read_stream(reader, worker=0):
        first = first or time.time()
        rows += len(table)
        tokens += pc.sum(pc.list_value_length(table["input_ids"])).as_py()
        if time.time() - first > options.seconds:
            break
    assert first is not None, "the stream ended without a row"
    result = {"began": began, "first_row": first, "ended": time.time(), "rows": rows, "tokens": tokens}
    options.out.write_text(json.dumps(result))
    ray.shutdown()


if __name__ == "__main__":
    main()
