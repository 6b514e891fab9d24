"""Side: the plain loop. ``tokenizers.Tokenizer.encode_batch`` over rendered chat texts, 1,000 at a time, ids taken.

Its threads are on. Timed: the loop. Not timed: imports, loading the tokenizer, reading the texts. Ids are dropped as
soon as they are counted, so that keeping millions of Python numbers costs it nothing; ``--tokens`` encodes once more
to write them.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

BATCH = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="a JSON string per line")
    parser.add_argument("--tokens", type=Path, help="write the ids of all rows to this .npz file")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with options.texts.open(encoding="utf-8") as file:
        texts = [json.loads(line) for line in file]
    tokens = 0
    started = time.perf_counter()
    for start in range(0, len(texts), BATCH):
        ids = [row.ids for row in tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)]
        tokens += sum(map(len, ids))
    seconds = time.perf_counter() - started
    if options.tokens:
        rows = []
        for start in range(0, len(texts), BATCH):
            batch = tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
            rows += [np.array(row.ids, np.int32) for row in batch]
        np.savez(options.tokens, lengths=np.array([len(row) for row in rows]), ids=np.concatenate(rows))
    options.out.write_text(json.dumps({"seconds": seconds, "rows": len(texts), "tokens": tokens}))


if __name__ == "__main__":
    main()
